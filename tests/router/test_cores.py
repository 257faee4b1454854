"""Experts on several cores: the answers are those of one core."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ddm.condition import Condition
from router.routing import RoutedDenoiser
from tests.router.mixture import mixture, noise


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Noted(nn.Module):
    """A convolution that notes which thread used it, and with how many images."""

    def __init__(self, k: int) -> None:
        super().__init__()
        torch.manual_seed(k)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.notes: list[tuple[str, int]] = []

    def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
        self.notes.append((threading.current_thread().name, len(x)))
        answer: Tensor = self.conv(x) * t.reshape(-1, 1, 1, 1)
        return answer if vector is None else answer + vector.sum(1).reshape(-1, 1, 1, 1)


def router(x: Tensor, t: Tensor) -> Tensor:
    return torch.softmax(x.flatten(1)[:, :3] * (1 + t.reshape(-1, 1)), dim=1)


@pytest.mark.parametrize("own_times", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
def test_several_cores_give_what_one_gives(
    two_threads: None, own_times: bool, conditional: bool
) -> None:
    experts = [Noted(k) for k in range(3)]
    x = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.1, 1, 60) if own_times else torch.tensor(0.5)
    given = Condition(torch.ones(2), 3.0, interval=(0.2, 0.6)) if conditional else None
    found, counts = [], []
    for grad in (False, True):  # one thread alone keeps gradients
        for expert in experts:
            expert.notes.clear()
        routed = RoutedDenoiser(experts, router, "stochastic", seed=4, condition=given)
        with torch.set_grad_enabled(grad):
            found.append(routed(x, t))
        counts.append(routed.calls)
        names = {name for expert in experts for name, _ in expert.notes}
        assert all(name.startswith("expert") is not grad for name in names)
        assert grad or max(n for expert in experts for _, n in expert.notes) <= 16
    torch.testing.assert_close(found[0], found[1].detach())
    assert counts[0] == counts[1]
    assert torch.get_num_threads() == 2


def test_one_image_has_all_cores(two_threads: None) -> None:
    experts = [Noted(k) for k in range(3)]
    with torch.no_grad():
        RoutedDenoiser(experts, router, "stochastic")(torch.zeros(1, 1, 4, 4), torch.tensor(0.5))
    assert [name for expert in experts for name, _ in expert.notes] == ["MainThread"]


def test_an_error_of_an_expert_is_raised(two_threads: None) -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise ValueError("broken")

    oracle = mixture()
    routed = RoutedDenoiser([broken] * 4, oracle.posterior)
    with torch.no_grad(), pytest.raises(ValueError, match="broken"):
        routed(noise(40), torch.tensor(0.5))


def test_autocast_of_the_caller_holds(two_threads: None) -> None:
    found = []

    class Halved(Noted):
        def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
            found.append(self.conv(x).dtype)
            return x

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        RoutedDenoiser([Halved(0)] * 3, router, "fixed")(
            torch.zeros(40, 1, 4, 4), torch.tensor(0.5)
        )
    assert set(found) == {torch.bfloat16}
