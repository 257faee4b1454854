"""Experts in this process."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ddm.condition import Conditions, guided
from experts.denoiser import Denoiser, SeededDenoiser
from serve.engine.expert import in_thread
from serve.engine.turn import Turn
from serve.model.model import Model
from serve.settings import ServePrecision

# At the first, dynamo compiles for it alone; at the others for any, below and from 16 on, where
# convolutions change their algorithm.
_SIZES = (2, 3, 64)


class Runner:
    """One expert's network on its device: `(x [B, C, H, W], t [B]) -> [B, C, H, W]`, on x's device,
    or `(x, t, given)` for images with a condition or guidance.

    precision: with bf16, its convolutions and products are in bfloat16; x and the answer are not.
    compiled: compile it, for batches of any size, and once for all experts of a process, whose
    networks differ in weights alone; then it must be one of a bundle. `warm_up` does it, so that no
    request waits for it.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        device: torch.device,
        precision: ServePrecision = "float32",
        compiled: bool = False,
    ) -> None:
        self.device, self.compiled, self.half = device, compiled, precision == "bf16"
        self.denoiser = denoiser
        if compiled:
            assert isinstance(denoiser, Denoiser | SeededDenoiser)
            for part in denoiser.modules():
                if isinstance(part, Denoiser):
                    part.network.compile()  # without the schedule, an object of each expert's own

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor, given: Conditions | None = None) -> Tensor:
        # A copy, because dynamo would compile anew for a tensor made outside of inference mode.
        images, times = x.to(self.device), t.to(self.device, torch.float32, copy=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            ask = partial(self._denoise, self.denoiser)
            if given is None:
                return ask(images, times).to(x)
            weaker = getattr(self.denoiser, "seed_model", None)
            guide = weaker and partial(self._denoise, weaker)
            here = given._replace(vector=given.vector.to(self.device, copy=True))
            return guided(ask, images, times, here, guide).to(x)

    def _denoise(self, network: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """By a network: of x, t and perhaps the condition's vectors, on its device."""
        size = len(given[0])
        if self.compiled and size == 1:  # for which it would be compiled apart
            given = tuple(torch.cat([tensor, tensor]) for tensor in given)
        return network(*given)[:size]

    def warm_up(self, shape: Sequence[int]) -> None:
        """Compile it, if it is to be compiled, for images `[C, H, W]`."""
        for size in _SIZES if self.compiled else ():
            for t in (1e-3, 1.0):  # the expert, and perhaps a seed model that moves images
                self(torch.zeros(size, *shape), torch.full((size,), t))


class LocalExpert:
    """An expert in this process; all experts of one device share `turn`."""

    calls = 1

    def __init__(self, name: str, run: Runner, turn: Turn) -> None:
        self.name, self.run, self.turn = name, run, turn

    async def __call__(self, x: Tensor, t: Tensor, given: Conditions | None = None) -> Tensor:
        return await in_thread(self.run, x, t, given)

    async def check(self) -> None:
        """Always available."""


def local_experts(
    model: Model,
    turn: Turn,
    precision: ServePrecision = "float32",
    compiled: bool = False,
    prefix: str = "",
) -> list[LocalExpert]:
    """All experts of a model, in this process; prefix: of their names."""
    runners = [Runner(expert, model.device, precision, compiled) for expert in model.experts]
    for runner in runners:
        runner.warm_up(model.shape)
    return [LocalExpert(f"{prefix}expert-{k:02d}", run, turn) for k, run in enumerate(runners)]
