"""The exact posterior of a finite training set, and its derivative along a path: what the router's
networks learn.

With `w_i = exp(-|x - a x_i|^2 / 2 s^2)`, alpha_k is the sum of the w_i of cluster k over that of
all. With x0 and eps held, x = a x0 + s eps, u_i = x0 - x_i and q = a/s, all dependence on time is
in q:

    log w_i = -(q^2/2) |u_i|^2 - q u_i.eps + const
    g_i = d log w_i / dt = -dq/dt (q |u_i|^2 + u_i.eps)

which is DESIGN's `g_i` after its terms in |eps|^2, equal for all i, have cancelled by hand rather
than in floating point. The sums run over chunks of the images with an online softmax, in float64:
where |dalpha| is 30, float32 products of 3072 coordinates leave an error of 4e-4 (TF32 far more),
and float64 is neither subject to TF32 settings nor to autocast.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.schedules import Schedule
from ddm.training import to_float

_CHUNK = 4096  # images at a time


class _Chunk(NamedTuple):
    """Products of B queries with M images, float64: `|x_i|^2` `[M]`, and a `[B, M]` of dot products
    for each query.
    """

    square: Tensor
    dots: list[Tensor]


def exact_posterior(
    x: Tensor, t: Tensor, images: Tensor, labels: Tensor, schedule: Schedule, k: int | None = None
) -> Tensor:
    """The exact `alpha_k(x, t)` over a training set, float32 `[B, K]`.

    x `[B, ...]`; t `[]` or `[B]` in (0, 1]; images `[N, ...]` uint8 or float in [-1, 1]; labels
    int64 `[N]` in 0 ... K-1; `k` the number of clusters, default `labels.max() + 1`.
    """
    a, s, _, _ = (c[:, None] for c in schedule(_times(x, t)))

    def log_weight(chunk: _Chunk) -> tuple[Tensor, None]:
        return a / s**2 * (chunk.dots[0] - a / 2 * chunk.square), None

    return _online([x], images, labels, k, log_weight)[0]


def exact_posterior_rate(
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(alpha, dalpha)` at `x_t = a x0 + s eps`, float32 `[B, K]` each; rows sum to 1 and to 0.

    dalpha is the derivative along `dx = da x0 + ds eps`. Its mean given x_t is `d_t alpha + grad
    alpha . v`, the total derivative along the probability-flow ODE, because `E[da x0 + ds eps |
    x_t] = v`.  Arguments as in `exact_posterior`.
    """
    a, s, da, ds = (c[:, None] for c in schedule(_times(x0, t)))
    q, dq = a / s, (da * s - a * ds) / s**2
    own_square = x0.double().flatten(1).square().sum(dim=1, keepdim=True)
    own_dot = (x0.double() * eps.double()).flatten(1).sum(dim=1, keepdim=True)

    def log_weight(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        u_square = own_square - 2 * chunk.dots[0] + chunk.square
        u_eps = own_dot - chunk.dots[1]
        return -q * (q / 2 * u_square + u_eps), -dq * (q * u_square + u_eps)

    return _online([x0, eps], images, labels, k, log_weight)


def _times(x: Tensor, t: Tensor) -> Tensor:
    return t.to(x.device, torch.float64).expand(len(x))


@torch.no_grad()
def _online(
    queries: list[Tensor],
    images: Tensor,
    labels: Tensor,
    k: int | None,
    log_weight: Callable[[_Chunk], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor]:
    """Softmax over all images, summed by cluster, in one pass over the chunks; and with it each
    weight's log-derivative g.

    Returns alpha and `sum_{i in k} r_i (g_i - sum_j r_j g_j)`.
    """
    count = int(labels.max()) + 1 if k is None else k
    flat = [query.double().flatten(1) for query in queries]
    best = flat[0].new_full((len(flat[0]), 1), -torch.inf)
    mass = best.new_zeros(len(best), count)
    moment = torch.zeros_like(mass)
    for chunk, label in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        points = to_float(chunk.to(best.device)).double().flatten(1)
        member = torch.nn.functional.one_hot(label.to(best.device), count).double()
        log_w, g = log_weight(
            _Chunk(points.square().sum(dim=1), [query @ points.T for query in flat])
        )
        new_best = torch.maximum(best, log_w.max(dim=1, keepdim=True).values)
        decay, w = (best - new_best).exp(), (log_w - new_best).exp()
        mass = mass * decay + w @ member
        if g is not None:
            moment = moment * decay + (w * g) @ member
        best = new_best
    total = mass.sum(dim=1, keepdim=True)
    alpha = mass / total
    rate = moment / total - alpha * (moment.sum(dim=1, keepdim=True) / total)
    return alpha.float(), rate.float()
