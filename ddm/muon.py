"""Muon: steps along the orthogonalized momentum of each matrix."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_RMS = 0.2  # of an update over the learning rate: that of Adam's (arXiv 2502.16982, equation 4)
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial in an iteration
_ITERATIONS = 5


def polar_factors(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalized` of each stack of matrices."""
    return [orthogonalized(stack) for stack in matrices]


@cache
def _cuda_graph() -> Callable[[list[Tensor]], list[Tensor]]:
    """`polar_factors` as one CUDA graph: a GPU would wait for its hundreds of launches."""
    return torch.compile(polar_factors, backend="cudagraphs", dynamic=False)


def orthogonalized(matrices: Tensor) -> Tensor:
    """About the polar factors U V^T of matrices U S V^T, `[B, m, n]`, by five Newton-Schulz
    iterations: singular values in about [0.7, 1.2].

    x_{i+1} = P(x_i x_i^T) x_i with a polynomial P, so the iteration is one of the smaller Gram
    matrix, and the matrix itself is multiplied once, by the product of all P.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram = x @ x.mT
    a, b, c = _COEFFICIENTS
    product = None
    for _ in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x if wide is matrices else x.mT


class Muon(torch.optim.Adam):
    """Adam, but for the weights of a module's `Linear` and `Conv2d`: those move along the polar factor of
    their momentum, so that all its singular directions are learned alike (arXiv 2502.16982,
    algorithm 1, without weight decay; a convolution is a matrix of its outputs by all else).

    The learning rate is Adam's: an update has the same root mean square. compiled: on a GPU the polar
    factors of all weights are launched as one CUDA graph.
    """

    # Copies of an optimizer lose what is not its state.
    polar_factors: Callable[[list[Tensor]], list[Tensor]] = staticmethod(polar_factors)

    def __init__(self, module: nn.Module, lr: float, fused: bool, compiled: bool = False) -> None:
        kinds = nn.Linear, nn.Conv2d
        matrices = [part.weight for part in module.modules() if isinstance(part, kinds)]
        taken = {id(weight) for weight in matrices}
        others = [weight for weight in module.parameters() if id(weight) not in taken]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others}]
        super().__init__(groups, lr=lr, fused=fused)
        if compiled and all(matrix.is_cuda for matrix in matrices):
            self.polar_factors = _cuda_graph()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; the loss of `closure`, if there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        group = self.param_groups[0]
        alike: dict[torch.Size, list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault(weight.shape, []).append(weight)
        momenta = [self._momenta(weights) for weights in alike.values()]
        super().step()  # before the polar factors: a graph of theirs takes the gradients' memory
        for weights, polar in zip(alike.values(), self.polar_factors(momenta), strict=True):
            scale = _RMS * max(polar.shape[1:]) ** 0.5
            rows = polar.flatten(0, 1).view(-1, *weights[0].movedim(1, -1).shape[1:])
            steps = [*rows.movedim(-1, 1).chunk(len(weights))]
            torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)
        return loss

    def _momenta(self, weights: list[Tensor]) -> Tensor:
        """Nesterov's momenta of weights of one shape, `[n, outputs, all else]`. The channels come last,
        as they do in the memory of weights in channels_last: a polar factor's columns keep any order.
        """
        for weight in weights:
            if not self.state[weight]:
                # Adam asks for the step when a state is loaded.
                self.state[weight].update(step=torch.zeros(()), momentum=torch.zeros_like(weight))
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        momenta: list[Tensor] = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        nesterov = [*torch._foreach_lerp(gradients, momenta, _MOMENTUM)]
        for weight in weights:
            weight.grad = None  # which Adam leaves alone
        return torch.cat(nesterov).movedim(1, -1).flatten(1).unflatten(0, (len(weights), -1))
