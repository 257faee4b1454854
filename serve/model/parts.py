"""What a trained bundle consists of, on a device."""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from ddm.bundle import Bundle
from ddm.condition import Vocabulary
from ddm.device import pick_device
from ddm.errors import ConfigError
from ddm.gaussian import Gaussians
from ddm.schedules import Schedule
from ddm.seed_model import learned_from
from router.networks import DerivativeNet, PosteriorNet
from router.sources import Alpha
from router.targets import exact_posterior, mirrored, weights_of_images
from serve.model.build import (
    build_counts,
    build_experts,
    build_gaussians,
    build_router,
    build_schedule,
)


class Half(nn.Module):
    """An expert's network in bfloat16, with its convolutions and products; x and the answer are
    not.
    """

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert.to(torch.bfloat16)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.expert(x, *given)

    @property
    def seed_model(self) -> "Half | None":
        """The expert's, if it has one."""
        found = getattr(self.expert, "seed_model", None)
        return None if found is None else Half(found)


class Parts:
    """The experts, the router and the facts of a bundle.

    shape: of an image, `[C, H, W]`
    names, pi: of the clusters, `[K]`
    version: the SHA-256 of the manifest
    vocabulary: what a condition may name, None if the experts take none
    seeded: whether the bundle has a seed model, which has learned t from `seeded_from` on; above: the
        time above which it moves the images, 1 for none
    schedule, experts, gaussians, posterior, derivative: the parts; the last two are None for a
        bundle without a router
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device,
        images: Callable[[], dict[str, Tensor]] | None,
        experts: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.shape = bundle.mixture.shape
        self.names = bundle.mixture.names
        self.version = bundle.version
        self.pi = bundle.mixture.pi.to(self.device)
        self.schedule: Schedule = build_schedule(bundle)
        self.above, seed_model = bundle.above, bundle.seed_model
        self.seeded = seed_model is not None
        self.seeded_from = 0.0
        if seed_model is not None:
            self.seeded_from = learned_from(seed_model.json, seed_model.facts, bundle.schedule)
        self.experts: list[nn.Module] = []
        if experts:
            self.experts = [*build_experts(bundle, self.schedule, self.device)]
        self.gaussians = build_gaussians(bundle.experts, self.schedule, self.device)
        self.posterior: PosteriorNet | None = None
        self.derivative: DerivativeNet | None = None
        if bundle.router:
            self.posterior, self.derivative = build_router(
                bundle.router, self.shape, self.pi, self.gaussians, self.device
            )
        self._counts = [one for one in map(build_counts, bundle.experts) if one is not None]
        self.vocabulary: Vocabulary | None = self._counts[0].vocabulary if self._counts else None
        self._images = images
        # Whether the experts have learned the mirror images, too.
        self._mirrored = all(expert.facts.get("flip", False) for expert in bundle.experts)
        self._old_router = bundle.old_router is not None
        self._analytic: Alpha | None = None
        self.manifest = bundle.manifest

    def __repr__(self) -> str:
        lines = {
            "data": f"{' x '.join(map(str, self.shape))} images of {len(self.names)} clusters: "
            f"{'; '.join(self.names[:8])}{'; ...' if len(self.names) > 8 else ''}",
            "experts": self._experts_in_words(),
            "router": self._router_in_words(),
            "process": str(self.schedule),
        }
        head = f"Model on {self.device}, version {self.version[:12]}"
        return "\n".join([head, *(f"  {name:<9} {words}" for name, words in lines.items())])

    def _experts_in_words(self) -> str:
        if not self.experts:
            return f"{len(self.names)}, not loaded"
        dtype = next(self.experts[0].parameters()).dtype
        told = ""
        if self.vocabulary is not None:
            names = self.vocabulary.names
            told = f", told the {self.vocabulary.kind}, one of {len(names)}"
            if self.vocabulary.kind == "attributes":
                told = f", told {len(names)} attributes"
        # A seed model is one more network of their size.
        millions = _parameters(self.experts) / (len(self.experts) + self.seeded) / 1e6
        high = f" above t = {self.above:g}" if self.above < 1 else ""
        high = f", a seed model{high}" if self.seeded else ""
        return f"{len(self.experts)} of {millions:.2f}M parameters, {str(dtype)[6:]}{told}{high}"

    def _router_in_words(self) -> str:
        if self.posterior is None:
            return "none: source prior, gaussian or analytic"
        millions = _parameters(self.networks[len(self.experts) :]) / 1e6
        return f"posterior and derivative nets of {millions:.2f}M parameters"

    def to(self, device: str | torch.device) -> Self:
        """The same model, moved to a device (`auto`: cuda if there is one, else cpu).

        Raises `ConfigError` naming a device that this machine does not have.
        """
        self.device = torch.device(pick_device(str(device)))
        self.pi = self.pi.to(self.device)
        means, variances = (
            part.to(self.device) for part in (self.gaussians.means, self.gaussians.variances)
        )
        self.gaussians = Gaussians(means, variances, self.schedule)
        for network in self.networks:
            network.to(self.device)
        if self.posterior is not None and self.posterior.gaussians is not None:
            self.posterior.gaussians = self.gaussians
        if self.derivative is not None:
            self.derivative.pi = self.pi
            if self.derivative.gaussians is not None:
                self.derivative.gaussians = self.gaussians
        self._analytic = None
        self._forget_plans()
        return self

    def half(self) -> Self:
        """The same model with its experts in bfloat16: half the memory, and faster where the
        hardware has it. Images, routing and the sampler stay in float32.
        """
        self.experts = [
            expert if isinstance(expert, Half) else Half(expert) for expert in self.experts
        ]
        return self

    @property
    def networks(self) -> list[nn.Module]:
        """All networks, experts first."""
        routers: list[nn.Module | None] = [self.posterior, self.derivative]
        return [*self.experts, *(net for net in routers if net is not None)]

    def _forget_plans(self) -> None:
        """Drop what is kept of an earlier device."""

    def _training_images(self, what: str) -> dict[str, Tensor]:
        """The partition's images and clusters. Raises `ConfigError` for a bundle without a run."""
        if self._images is None:
            raise ConfigError(
                f"{what} needs the training images: load the run's folder, a bundle carries none"
            )
        return self._images()

    def _exact(self, x: Tensor, t: Tensor) -> Tensor:
        """alpha over the training set, which is read at the first call: on no event loop."""
        if self._analytic is None:
            whole = self._training_images("source=analytic")
            images, cluster = whole["images"], whole["cluster"]
            if self._mirrored:
                images, cluster = mirrored(images, cluster)
            cluster = cluster.to(self.device)
            self._analytic = partial(
                exact_posterior,
                images=images.to(self.device),
                labels=cluster,
                schedule=self.schedule,
                k=len(self.pi),
                weights=weights_of_images(self.pi, cluster),
            )
        return self._analytic(x, t)


def _parameters(networks: list[nn.Module]) -> int:
    return sum(p.numel() for p in nn.ModuleList(networks).parameters())  # shared ones once
