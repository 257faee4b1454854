"""Muon: the polar factor, the size of an update, what is left to Adam, and going on from a state."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ddm.muon import Muon, orthogonalized
from ddm.training import FitConfig


def gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (16, 27), (1, 9)])
def test_the_polar_factor_keeps_the_directions_and_evens_their_lengths(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    lengths = u.T @ orthogonalized(matrix[None])[0] @ v.T
    assert ((lengths.diagonal() > 0.6) & (lengths.diagonal() < 1.3)).all()
    torch.testing.assert_close(lengths, torch.diag(lengths.diagonal()), rtol=0, atol=1e-3)
    assert orthogonalized(torch.zeros(2, *shape)).eq(0).all()


def test_an_update_is_as_large_as_adam_s_and_vectors_are_adam_s() -> None:
    ours, plain = network(), network()
    muon = Muon(ours, lr=0.01, fused=True)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    for each, optimizer in ((ours, muon), (plain, adam)):
        gradients(each, 1)
        optimizer.step()
    for old, mine, other in zip(before, ours.parameters(), plain.parameters(), strict=True):
        if old.ndim == 1:
            torch.testing.assert_close(mine, other)
        else:
            step = (mine - old).square().mean().sqrt()
            assert 0.6 * 0.2 * 0.01 < step < 1.3 * 0.2 * 0.01


def test_a_state_that_was_saved_goes_on_as_if_never_left() -> None:
    def run(count: int, net: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0) -> None:
        for step in range(first, count):
            gradients(net, step)
            optimizer.step()
            optimizer.zero_grad()

    def made(net: nn.Module) -> torch.optim.Optimizer:
        config = FitConfig(optimizer="muon", learning_rate=0.01, warmup_steps=0)
        found: torch.optim.Optimizer = config.optimization(net)["optimizer"]
        return found

    whole = network()
    run(6, whole, made(whole))
    part = network()
    optimizer = made(part)
    run(3, part, optimizer)
    resumed = network()
    resumed.load_state_dict(part.state_dict())
    other = made(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(6, resumed, other, first=3)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert one.equal(two)


def test_a_weight_without_a_gradient_stays() -> None:
    net = network()
    muon = Muon(net, lr=0.1, fused=False)
    before = net[0].weight.detach().clone()
    found: Tensor = net[2](torch.ones(1, 8)).sum()
    found.backward()
    muon.step()
    assert net[0].weight.equal(before)


def test_weights_of_one_shape_move_as_they_would_alone() -> None:
    torch.manual_seed(0)
    together = nn.Sequential(*(nn.Conv2d(4, 6, 3, bias=False) for _ in range(3)))
    alone = copy.deepcopy(together)
    optimizers = [Muon(together, lr=0.1, fused=True), *(Muon(one, 0.1, True) for one in alone)]
    weights = [*zip(together.parameters(), alone.parameters(), strict=True)]
    for _ in range(3):
        for one, other in weights:
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in weights:
        torch.testing.assert_close(one, other)
