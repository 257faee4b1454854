"""The pipeline that `ddm export diffusers` writes, with all that it uses of ours, as `pipeline.py`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.conversion import Conversion
from ddm.errors import one_of
from ddm.gaussian import Gaussians
from ddm.rng import RngStream, normal
from ddm.samplers import Course, drive, plan_steps
from ddm.schedules import schedule as process
from experts.denoiser import Denoiser, SeededDenoiser
from experts.unet import UNetConfig
from router.networks import DerivativeNet, PosteriorNet, RouterNetConfig
from router.policies import policy as policy_of
from router.routing import RoutedDenoiser
from router.sources import Integrated, Stateless, prior
from router.step import Router

PARTS = ("expert_00",)  # of this folder besides the mixture; written by the export


class ExpertNetwork(ModelMixin, ConfigMixin):
    """A UNet with options that a `UNet2DModel` does not have: `(x [B, C, H, W], t [] or [B])` -> `[B, C, H, W]`."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, shape: Sequence[int], unet: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = UNetConfig(**unet).build(shape)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)


class Mixture(ModelMixin, ConfigMixin):
    """What the experts share: the forward process, their clusters' weights and Gaussians, and the router.

    shape: of an image, `[C, H, W]`. names, weights: of the K clusters. schedule: that is sampled on.
    experts: of each its `parameterization`, `sigma_data` and `schedule`; of a `UNet2DModel` also `patch` and
    `timesteps`. router: its `net`, `bands` and `gaussians`, None for a mixture without one. seed_model: as of an
    expert, of the network that moves the images at t > `above`; None for none.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        shape: Sequence[int],
        names: Sequence[str],
        weights: Sequence[float],
        schedule: Mapping[str, Any],
        experts: Sequence[Mapping[str, Any]],
        router: Mapping[str, Any] | None = None,
        seed_model: Mapping[str, Any] | None = None,
        above: float = 1.0,
    ) -> None:
        super().__init__()
        k = len(names)
        self.means, self.variances = (
            nn.Buffer(torch.zeros(k, *shape)),
            nn.Buffer(torch.ones(k, *shape)),
        )
        self.posterior: PosteriorNet | None = None
        self.derivative: DerivativeNet | None = None
        if router is not None:
            config, path = RouterNetConfig(**router["net"]), process(**schedule)
            gaussians = self.gaussians if router["gaussians"] else None
            scorers = [config.build(shape, k, path) for _ in range(len(router["bands"]) + 2)]
            self.posterior = PosteriorNet(scorers[0], self.pi, gaussians)
            self.derivative = DerivativeNet(scorers[1:], router["bands"], self.pi, gaussians)

    @property
    def pi(self) -> Tensor:
        """The mixture weights, `[K]`, which sum to 1."""
        return torch.tensor(self.config.weights, device="cpu") / sum(self.config.weights)

    @property
    def gaussians(self) -> Gaussians:
        """The clusters' Gaussians."""
        return Gaussians(self.means, self.variances, process(**self.config.schedule))

    def source(self, name: str | None, relaxation_rate: float) -> Any:
        """Where alpha comes from, by its name; None for the router, or without one the Gaussians."""
        name = name or ("gaussian" if self.posterior is None else "posterior")
        pi = self.pi.to(self.device)
        if self.posterior is not None and self.derivative is not None:  # loading has replaced both
            with_gaussians = self.posterior.blend is not None
            self.posterior.gaussians = self.gaussians if with_gaussians else None
            self.derivative.gaussians = self.posterior.gaussians
            self.derivative.pi = pi
        if len(pi) == 1 or name == "prior":
            return Stateless(prior(pi))
        if name == "gaussian":
            return Stateless(partial(self.gaussians.posterior, pi=pi))
        if self.posterior is None or self.derivative is None:
            raise one_of("source", name, ("prior", "gaussian"))
        if name == "posterior":
            return Stateless(self.posterior)
        if name == "derivative":
            return Integrated(self.derivative, pi)
        if name == "combined":
            return Integrated(self.derivative, pi, self.posterior, relaxation_rate)
        raise one_of("source", name, ("prior", "gaussian", "posterior", "derivative", "combined"))


def ask_unet(unet: Any, patch: int, timesteps: int, x: Tensor, t: Tensor) -> Tensor:
    """The answer of a `UNet2DModel` at t in [0, 1]; it sees `patch` x `patch` pixels as the channels of one."""
    told = (timesteps * t - 1).clamp_min(0) if timesteps else 1000 * t
    answer = unet(F.pixel_unshuffle(x, patch), told.expand(len(x)), return_dict=False)[0]
    return F.pixel_shuffle(answer, patch)


class RoutedPipeline(DiffusionPipeline):
    """Images of a mixture of K experts: at each step a router says which expert moves which image."""

    def __init__(self, mixture: Mixture, **networks: Any) -> None:
        super().__init__()
        self.register_modules(mixture=mixture, **networks)

    def denoisers(self) -> list[Denoiser | SeededDenoiser]:
        """The experts on the mixture's forward process: `(x, t) -> E[x0 | x_t = x]`."""
        known = self.mixture.config
        experts = [
            self._denoiser(f"expert_{k:02d}", facts) for k, facts in enumerate(known.experts)
        ]
        if known.seed_model is None:
            return [*experts]
        seed_model = self._denoiser("seed_model", known.seed_model)
        return [SeededDenoiser(expert, seed_model, known.above) for expert in experts]

    def _denoiser(self, name: str, facts: Mapping[str, Any]) -> Denoiser:
        own, shared = process(**facts["schedule"]), process(**self.mixture.config.schedule)
        network = getattr(self, name)
        if "patch" in facts:
            network = partial(ask_unet, network, facts["patch"], facts["timesteps"])
        conversion = None if own == shared else Conversion(shared, own)
        return Denoiser(network, own, facts["parameterization"], facts["sigma_data"], conversion)

    @torch.inference_mode()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 25,
        *,
        seed: int = 0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        sampler: str = "ipndm",
        order: int = 3,
        grid: str | Sequence[float] = "cosine",
        source: str | None = None,
        relaxation_rate: float = 40.0,
        policy: str = "switching",
        top_k: int = 1,
        nucleus_p: float = 0.9,
        budget: float = 1.5,
        switch_rate: float = 1.0,
        control_variate: bool = True,
        clip: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images `first_index ... first_index + batch_size - 1` of a seed: image i is a function of (seed, i).

        generator: draws the seed, if it is given. latents: x at t = 1 in place of the seed's noise, `[B, C, H, W]`,
        which B is then the batch size.
        sampler, order, grid: how the ODE or SDE is integrated. source, relaxation_rate: where the experts'
        probabilities come from; None for the router, or without one the Gaussians. policy and its top_k, nucleus_p,
        budget and switch_rate: which experts move the image. control_variate: Gaussians in place of the experts that
        are not called, where a policy mixes. clip: the denoised images to [-1, 1]. output_type: `pil`, `np` for
        `[B, H, W, C]` in [0, 1], or `pt` for `[B, C, H, W]` in [-1, 1].
        """
        mixture, device = self.mixture, self._execution_device
        if mixture.dtype != torch.float32:
            raise ValueError(f"torch_dtype must be torch.float32, got {mixture.dtype}")
        if generator is not None:
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        path = process(**mixture.config.schedule)
        method, times = plan_steps(sampler, num_inference_steps, grid, path, order=order)
        shape = mixture.config.shape
        if latents is not None:
            if list(latents.shape[1:]) != list(shape):
                raise ValueError(f"latents must be [B, *{shape}], got {list(latents.shape)}")
            batch_size = len(latents)
        index = torch.arange(first_index, first_index + batch_size, device=device)
        if latents is None:
            latents = normal(seed, RngStream.START, index, 0, shape) * path(times[0]).s
        rule = policy_of(policy, top_k, nucleus_p, budget, switch_rate)
        pi, above = mixture.pi.to(device), mixture.config.above
        router = Router(mixture.source(source, relaxation_rate), rule, pi, above=above)
        routed = RoutedDenoiser(
            self.denoisers(),
            router,
            seed=seed,
            index=index,
            calls_per_step=method.calls_per_step,
            clip=clip,
            control_variate=mixture.gaussians.mix if control_variate and not rule.keeps else None,
        )
        course = Course(path, times, lambda n: normal(seed, RngStream.STEP, index, n, shape))
        with self.progress_bar(total=num_inference_steps * method.calls_per_step) as bar:
            x, _ = drive(
                method.trajectory(latents.to(device), *course), _counting(routed, bar.update)
            )
        images: Any = x.clamp(-1, 1) if clip else x
        if output_type != "pt":
            images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _counting(
    denoise: Callable[[Tensor, Tensor], Tensor], count: Callable[[], object]
) -> Callable[[Tensor, Tensor], Tensor]:
    def counted(x: Tensor, t: Tensor) -> Tensor:
        count()
        return denoise(x, t)

    return counted


# diffusers reads the names of a pipeline's parts from this signature.
RoutedPipeline.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("self", "mixture", *PARTS)
    ]
)
