"""Muon: steps along the orthogonalized momentum of each matrix."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_RMS = 0.2  # of an update over the learning rate: that of Adam's (arXiv 2502.16982, equation 4)
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial in an iteration
_ITERATIONS = 5


class Muon(torch.optim.Adam):
    """Adam, but for weights of matrices and convolutions: those move along the polar factor of
    their momentum, so that all its singular directions are learned alike (arXiv 2502.16982,
    algorithm 1, without weight decay; a convolution is a matrix of its outputs by all else).

    The learning rate is Adam's: an update has the same root mean square.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, fused: bool) -> None:
        every = list(parameters)
        matrices = [parameter for parameter in every if parameter.ndim >= 2]
        others = [parameter for parameter in every if parameter.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others}]
        super().__init__(groups, lr=lr, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; the loss of `closure`, if there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        group = self.param_groups[0]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())  # Adam asks for it when a state is loaded
                state["momentum"] = torch.zeros_like(weight)
            momentum: Tensor = state["momentum"].lerp_(weight.grad, 1 - _MOMENTUM)
            update = weight.grad.lerp(momentum, _MOMENTUM).flatten(1)  # Nesterov's
            scale = _RMS * max(update.shape) ** 0.5
            polar = orthogonalized(update).reshape(weight.shape)
            weight.add_(polar, alpha=-group["lr"] * scale)
            weight.grad = None  # which Adam leaves alone
        super().step()
        return loss


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the polar factor U V^T of a matrix U S V^T, `[m, n]`, by five Newton-Schulz iterations:
    singular values in about [0.7, 1.2].

    x_{i+1} = P(x_i x_i^T) x_i with a polynomial P, so the iteration is one of the smaller Gram
    matrix, and the matrix itself is multiplied once, by the product of all P.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp_min(1e-7)
    gram = x @ x.T
    a, b, c = _COEFFICIENTS
    product = None
    for _ in range(_ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x if wide is matrix else x.T
