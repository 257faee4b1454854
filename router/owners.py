"""The router's targets from owners who keep their images.

The exact posterior and its derivative are sums over all images, so each owner can add up its own:
to a query it answers with two numbers (`Sums`), and those of all owners are merged. Each step, the
images of its batch leave their owners as well: a few at a time, but in the end all of them. So this
spares copying data sets to one place; it keeps no secret. A query has an image and its noise in it,
and an answer at little noise says how near the owner's nearest image is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddm.errors import require
from ddm.gaussian import moments
from ddm.schedules import Schedule
from router.targets import Sums, merged, posterior_sums, rate_sums

# Calls the method of that name of each owner, with the arguments for it; the results, in order.
Ask = Callable[[str, Sequence[tuple[Any, ...]]], list[Any]]


class Owner:
    """An owner's images, uint8 `[N, C, H, W]`, beside which it runs; `flip` adds the mirror images,
    after the others.
    """

    def __init__(self, images: Tensor, schedule: Schedule, flip: bool = False) -> None:
        self.held = torch.cat([images, images.flip(3)]) if flip else images
        self.schedule, self.flip = schedule, flip

    def settings(self) -> tuple[Tensor, Tensor]:
        """What must be alike here and there: the process, by its a and s at a few times `[2, T]`, and
        whether mirror images are added, bool `[]`.
        """
        a, s, _, _ = self.schedule(torch.linspace(0.1, 1, 10))
        return torch.stack([a, s]), torch.tensor(self.flip)

    def count(self) -> Tensor:
        """The number of images, without mirror images, `[]`."""
        return torch.tensor(len(self.held) // (2 if self.flip else 1))

    def images(self, place: Tensor) -> Tensor:
        """The images at these places, int64 `[n]`."""
        return self.held[place]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, as `ddm.gaussian.moments` gives them: the mean is an image."""
        return moments(self.held)

    def posterior(self, x: Tensor, t: Tensor) -> Sums:
        """The sums at x `[B, C, H, W]` and t `[B]`: `[B, 1]` each."""
        return posterior_sums(x, t, self.held, self._labels(), self.schedule, 1)

    def rate(self, x: Tensor, dx: Tensor, t: Tensor) -> Sums:
        """The sums at x and t with those of the derivative along dx, both float64, because the
        derivative is a small difference at little noise: `[B, 1]` each.
        """
        c = self.schedule(t.to(x)).broadcast_to(x)
        determinant = c.a * c.ds - c.s * c.da
        # x = a x0 + s eps and dx = da x0 + ds eps, solved
        x0, eps = (c.ds * x - c.s * dx) / determinant, (c.a * dx - c.da * x) / determinant
        return rate_sums(x0, eps, t, self.held, self._labels(), self.schedule, 1)

    def _labels(self) -> Tensor:
        return torch.zeros(len(self.held), dtype=torch.int64)


class Owners:
    """K owners, as a set of images and as the source of the targets.

    ask: reaches `k` of them. schedule, flip: as theirs. `bytes_out` and `bytes_in` are what they have received
    and sent.

    An image's place is that among the images of all owners, one owner after another, and the
    mirror images after all others. Raises `ConfigError` for an owner with another schedule or flip.
    """

    dtype = torch.uint8

    def __init__(self, ask: Ask, k: int, schedule: Schedule, flip: bool = False) -> None:
        self._ask, self.k, self.schedule = ask, k, schedule
        self.bytes_out = self.bytes_in = 0
        process, flips = Owner(torch.empty(0, 1, 1, 1), schedule, flip).settings()
        for place, (theirs, flipped) in enumerate(self.ask("settings", [()] * k)):
            rule = f"be that of the owner of cluster {place}"
            require(bool(flipped == flips), "data.flip", rule, flip)
            require(torch.allclose(theirs, process), "schedule", rule, "another one")
        counts = torch.stack(self.ask("count", [()] * k))
        owner = torch.arange(k).repeat_interleave(counts)
        within = torch.cat([torch.arange(count) for count in counts.tolist()])
        self.cluster = owner.repeat(2) if flip else owner
        mirrored = within + counts[owner]
        self._within = torch.cat([within, mirrored]) if flip else within
        mean, _ = self.moments()[0]
        self.shape = torch.Size([len(self.cluster), *mean.shape])
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.cluster)

    def to(self, device: torch.device) -> "Owners":
        """Answer on this device from now on."""
        self.device = device
        return self

    def __getitem__(self, place: Tensor) -> Tensor:
        """The images at these places, int64 `[B]`, from their owners."""
        place = place.cpu()
        owner = self.cluster[place]
        rows = [(owner == k).nonzero()[:, 0] for k in range(self.k)]
        parts = self.ask("images", [(self._within[place[row]],) for row in rows])
        whole = torch.empty(len(place), *self.shape[1:], dtype=self.dtype)
        return whole.index_copy_(0, torch.cat(rows), torch.cat(parts)).to(self.device)

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each owner's images."""
        return self.ask("moments", [()] * self.k)

    def posterior(self, x: Tensor, t: Tensor, weights: Tensor | None = None) -> Tensor:
        """As `exact_posterior` over the images of all."""
        query = x.cpu(), t.cpu()
        return self._merged(self.ask("posterior", [query] * self.k), weights)[0]

    def rate(
        self, x0: Tensor, eps: Tensor, t: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `exact_posterior_rate` over the images of all."""
        x0, eps, t = x0.double().cpu(), eps.double().cpu(), t.cpu()
        c = self.schedule(t.double()).broadcast_to(x0)
        query = c.a * x0 + c.s * eps, c.da * x0 + c.ds * eps, t
        return self._merged(self.ask("rate", [query] * self.k), weights)

    def _merged(self, answers: list[Sums], weights: Tensor | None) -> tuple[Tensor, Tensor]:
        sums = Sums(*(torch.cat(part, dim=1) for part in zip(*answers, strict=True)))
        alpha, rate = merged(sums, weights)
        return alpha.to(self.device), rate.to(self.device)

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of each owner."""
        answers = self._ask(method, arguments)
        self.bytes_out += sum(map(_size, arguments))
        self.bytes_in += sum(map(_size, answers))
        return answers


def _size(tensors: Any) -> int:
    parts = (tensors,) if isinstance(tensors, Tensor) else tensors
    return sum(part.numel() * part.element_size() for part in parts)


def here(owners: Sequence[Owner]) -> Ask:
    """Reach owners in this process."""

    def ask(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = zip(owners, arguments, strict=True)
        return [getattr(owner, method)(*each) for owner, each in calls]

    return ask
