"""The exact posterior of a finite training set, and its derivative along a path: what the router's
networks learn.

With `w_i = exp(-|x - a x_i|^2 / 2 s^2)`, alpha_k is the sum of the w_i of cluster k over that of
all; where the mixture's weights are not the numbers of images, each w_i of cluster k counts pi_k /
n_k times. With x0 and eps held, x = a x0 + s eps, u_i = x0 - x_i and q = a/s, all dependence on time is
in q:

    log w_i = -(q^2/2) |u_i|^2 - q u_i.eps + const
    g_i = d log w_i / dt = -dq/dt (q |u_i|^2 + u_i.eps)

which is DESIGN's `g_i` after its terms in |eps|^2, equal for all i, have cancelled by hand rather
than in floating point. The sums run over chunks of the images with an online softmax, in float64:
where |dalpha| is 30, float32 products of 3072 coordinates leave an error of 4e-4 (TF32 far more),
and float64 is neither subject to TF32 settings nor to autocast.

A GPU that multiplies float64 at a 32nd of its float32 or less takes the products of uint8 images
apart instead (Ozaki's scheme, arXiv 2306.11975, with float32): the queries into digits of 9 bits,
the coordinates into blocks, so small that every sum is a whole number below 2^24, which float32,
TF32 and bfloat16 with float32 sums add without an error.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.schedules import Schedule
from ddm.training import to_float

_CHUNK_BYTES = defaultdict(lambda: 2**27, cpu=2**25)  # of float64 images at a time
_DIGITS = 4  # of a query, together 35 bits below the largest coordinate of its row
_BLOCK = 512  # coordinates: sums of 512 products of at most 256 and 128 are at most 2^24
# Compute capabilities with float64 at half of float32 or more.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


class _Chunk(NamedTuple):
    """Products of B queries with M images, float64: `|x_i|^2` `[M]`, and a `[B, M]` of dot products
    for each query.
    """

    square: Tensor
    dots: list[Tensor]


class Sums(NamedTuple):
    """What K clusters add to the posterior at B queries, float64 `[B, K]`.

    log_mass: the logarithm of the sum of a cluster's w_i, but for a term that all clusters share.
    rate: the mean of its g_i weighted by w_i; 0 where it was not asked for.
    """

    log_mass: Tensor
    rate: Tensor


def mirrored(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images `[N, C, H, W]` and their mirror images, with the labels of both."""
    return torch.cat([images, images.flip(3)]), labels.repeat(2)


def weights_of_images(pi: Tensor, labels: Tensor) -> Tensor | None:
    """What an image of each cluster counts in the mixture, `pi_k / n_k`, float64 `[K]`; None if that
    is the same for all. On the labels' device.

    pi `[K]`; labels int64 `[N]` in 0 ... K-1.
    """
    counts = torch.bincount(labels.cpu(), minlength=len(pi))
    weights = pi.cpu().double() / counts
    alike = torch.allclose(weights * len(labels), torch.ones_like(weights))
    return None if alike else weights.to(labels.device)


def exact_posterior(
    x: Tensor,
    t: Tensor,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    k: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The exact `alpha_k(x, t)` over a training set, float32 `[B, K]`.

    x `[B, ...]`; t `[]` or `[B]` in (0, 1]; images `[N, ...]` uint8 or float in [-1, 1]; labels
    int64 `[N]` in 0 ... K-1; `k` the number of clusters, default `labels.max() + 1`; weights as of
    `weights_of_images`.
    """
    return merged(posterior_sums(x, t, images, labels, schedule, k), weights)[0]


def posterior_sums(
    x: Tensor, t: Tensor, images: Tensor, labels: Tensor, schedule: Schedule, k: int | None = None
) -> Sums:
    """The sums of `exact_posterior`, without the derivative's."""
    a, s, _, _ = (c[:, None] for c in schedule(_times(x, t)))

    def log_weight(chunk: _Chunk) -> tuple[Tensor, None]:
        return chunk.dots[0].sub_(a / 2 * chunk.square).mul_(a / s**2), None

    return _online([x], images, labels, k, log_weight)


def exact_posterior_rate(
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    k: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(alpha, dalpha)` at `x_t = a x0 + s eps`, float32 `[B, K]` each; rows sum to 1 and to 0.

    dalpha is the derivative along `dx = da x0 + ds eps`. Its mean given x_t is `d_t alpha + grad
    alpha . v`, the total derivative along the probability-flow ODE, because `E[da x0 + ds eps |
    x_t] = v`.  Arguments as in `exact_posterior`.
    """
    return merged(rate_sums(x0, eps, t, images, labels, schedule, k), weights)


def rate_sums(
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    k: int | None = None,
) -> Sums:
    """The sums of `exact_posterior_rate`."""
    a, s, da, ds = (c[:, None] for c in schedule(_times(x0, t)))
    q, dq = a / s, (da * s - a * ds) / s**2
    own_square = x0.double().flatten(1).square().sum(dim=1, keepdim=True)
    own_dot = (x0.double() * eps.double()).flatten(1).sum(dim=1, keepdim=True)

    def log_weight(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        u_square = (own_square + chunk.square).sub_(chunk.dots[0], alpha=2)
        u_eps = own_dot - chunk.dots[1]
        q_u_square = u_square.mul_(q)
        log_w = torch.add(u_eps, q_u_square, alpha=0.5).mul_(-q)
        return log_w, u_eps.add_(q_u_square).mul_(-dq)

    return _online([x0, eps], images, labels, k, log_weight)


def merged(sums: Sums, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(alpha, dalpha)`, float32 `[B, K]` each, of the sums of all clusters."""
    log_mass = sums.log_mass
    if weights is not None:
        log_mass = log_mass + weights.to(log_mass).log()
    alpha = log_mass.softmax(dim=1)
    rate = alpha * (sums.rate - (alpha * sums.rate).sum(dim=1, keepdim=True))
    return alpha.float(), rate.float()


def _times(x: Tensor, t: Tensor) -> Tensor:
    return t.to(x.device, torch.float64).expand(len(x))


@torch.no_grad()
def _online(
    queries: list[Tensor],
    images: Tensor,
    labels: Tensor,
    k: int | None,
    log_weight: Callable[[_Chunk], tuple[Tensor, Tensor | None]],
) -> Sums:
    """The sums of each cluster, in one pass over the chunks."""
    count = int(labels.max()) + 1 if k is None else k
    flat = torch.cat([query.double().flatten(1) for query in queries])
    multiply = _multiplier(flat, images)
    best = flat.new_full((len(queries[0]), 1), -torch.inf)
    mass = best.new_zeros(len(best), count)
    moment = torch.zeros_like(mass)
    size = _chunk(flat)
    for chunk, label in zip(images.split(size), labels.split(size), strict=True):
        member = torch.nn.functional.one_hot(label.to(best.device), count).double()
        square, dots = multiply(chunk.to(best.device).flatten(1))
        log_w, g = log_weight(_Chunk(square, [*dots.split(len(best))]))
        new_best = torch.maximum(best, log_w.amax(dim=1, keepdim=True))
        decay, w = (best - new_best).exp(), log_w.sub_(new_best).exp_()
        mass = mass * decay + w @ member
        if g is not None:
            moment = moment * decay + g.mul_(w) @ member
        best = new_best
    return Sums(best + mass.log(), (moment / mass).nan_to_num(0))  # far clusters have no mass


def _chunk(queries: Tensor) -> int:
    """How many images at a time: enough for large products, and memory that does not grow with the
    images' size.
    """
    return max(64, _CHUNK_BYTES[queries.device.type] // (8 * queries.shape[1]))


_Multiply = Callable[[Tensor], tuple[Tensor, Tensor]]


def _multiplier(queries: Tensor, images: Tensor) -> _Multiply:
    """What gives `|x_i|^2` `[M]` and the products with the queries `[R, M]` of M flat images."""
    if images.dtype != torch.uint8 or not _slow_float64(queries.device):

        def plain(images: Tensor) -> tuple[Tensor, Tensor]:
            points = to_float(images).double()
            return torch.linalg.vector_norm(points, dim=1).square(), queries @ points.T

        return plain
    scaled = queries / 127.5
    digits, weights = _digits(scaled)
    half = scaled.sum(dim=1, keepdim=True) / 2
    rough = queries.float()

    def apart(images: Tensor) -> tuple[Tensor, Tensor]:
        points = to_float(images).double()
        levels = images.float() - 128
        # An image is (level + 1/2) / 127.5, but for float32's rounding, which near twins show.
        rounding = (points - (levels.double() + 0.5) / 127.5).float()
        with torch.autocast(images.device.type, enabled=False):  # it would round the sums
            dots = _exact_products(digits, weights, levels) + half + rough @ rounding.T
        return torch.linalg.vector_norm(points, dim=1).square(), dots

    return apart


def _slow_float64(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) not in _FAST_FLOAT64


def _digits(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-256, 256], float32 `[digits, R, D]`, and their weights `[digits, R, 1]`:
    the sum of their products is the queries.
    """
    # A power of two, by which nothing is rounded.
    weight = torch.exp2(queries.abs().amax(dim=1, keepdim=True).log2().ceil().clamp_min(-1000))
    rest = queries / weight
    digits, weights = [], []
    for base in (256, *[512] * (_DIGITS - 1)):
        rest, weight = rest * base, weight / base
        digits.append(rest.round())
        weights.append(weight)
        rest = rest - digits[-1]
    return torch.stack(digits).float(), torch.stack(weights)


def _exact_products(digits: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """The products of the queries that the digits stand for with whole numbers, float64 `[R, M]`."""
    rows = digits.shape[1]
    total = weights.new_zeros(rows, len(levels))
    blocks = levels.split(_BLOCK, dim=1)
    for part, block in zip(digits.flatten(0, 1).split(_BLOCK, dim=1), blocks, strict=True):
        for exact, weight in zip((part @ block.T).split(rows), weights, strict=True):
            total.addcmul_(exact.double(), weight)
    return total
