"""A trained bundle in this process, ready to sample."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from ddm.errors import within
from serve.model.edits import RESAMPLINGS, check_whole, count_of, edit_of, own_noise
from serve.model.params import SETTINGS, SampleSettings, described
from serve.model.planning import Planner
from serve.model.running import Trace, joined, sample_batch


class Model(Planner):
    """K experts and their router, ready to sample. Made by `load`; its parts are those of `Parts`."""

    @overload
    def sample(
        self,
        n: int | None = None,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        x: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        resamplings: int = RESAMPLINGS,
        trace: Literal[False] = False,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        n: int | None = None,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        x: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        resamplings: int = RESAMPLINGS,
        trace: Literal[True],
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> tuple[Tensor, Trace]: ...

    def sample(
        self,
        n: int | None = None,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        x: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        resamplings: int = RESAMPLINGS,
        trace: bool = False,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Tensor | tuple[Tensor, Trace]:
        """Sample images `first_index ... first_index + n - 1` of a seed: `[n, C, H, W]`, float32,
        on the CPU.

        Image i is a function of (seed, i) and the settings, whatever else is sampled. Values are in
        [-1, 1] unless `clip=False`.

        With `image` it is sampled from that image, noised to t = `strength` by the forward process
        (SDEdit, arXiv 2108.01073): the smaller, the more of it is left. `steps` are taken from
        there on. The first expert is drawn from alpha at the noised image.

        With `mask` as well, pixels where it is 0 stay those of the image, and the others are
        sampled to fit (inpainting): at every call the denoised image has the kept pixels in their
        place (DDNM, arXiv 2212.00490), and each step is taken `resamplings` times, with its noise
        added back in between (RePaint, arXiv 2201.09865), for as many times the calls.

        n: at least 1; by default as many as there are noises or images
        seed: in [0, 2^63)
        first_index: at least 0
        batch: images that go through the networks together, at least 1
        x: noise of your own in place of the seed's, standard normal, `[n, C, H, W]`
        image: in [-1, 1], `[C, H, W]` for all samples or `[n, C, H, W]` for each
        mask: in [0, 1], `[H, W]`, `[1, H, W]` or `[n, 1, H, W]`; 1 where pixels are sampled
        strength: in (0, 1]; by default 0.5, and 1 with a mask, which then hides all that it covers
        resamplings: in [1, 100], with a mask
        trace: also return a `Trace`
        progress: called at each step with the number of images that take it

        Raises `ConfigError` naming the setting, the rule and the value; `ArtifactError` if the
        images are not finite.
        """
        config = self.settings(**settings)
        with within("sample"):
            n = count_of(n, x, image)
            check_whole("seed", seed, 0)
            check_whole("first_index", first_index, 0)
            check_whole("batch", batch, 1)
            edit = edit_of(image, mask, strength, resamplings)
            plan = self.plan(config, edit)
            given = None if edit is None else edit.given(n, self.shape, self.device)
            noise = None if x is None else own_noise(x, n, self.shape).to(self.device)
        finished = []
        traces = []
        for low in range(0, n, batch):
            rows = slice(low, min(low + batch, n))
            index = torch.arange(rows.start, rows.stop, device=self.device) + first_index
            images, routed = sample_batch(
                self,
                plan,
                seed,
                index,
                given=None if given is None else given.rows(rows),
                noise=None if noise is None else noise[rows],
                trace=trace,
                progress=progress,
            )
            finished.append(images)
            traces.append(routed)
        whole_batch = torch.cat(finished)
        return (whole_batch, joined(traces)) if trace else whole_batch


def _with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function with each field of `SampleConfig` in place of `**settings`."""
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = SampleSettings.__annotations__
    settings = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default,
            annotation=hints[setting.name],
        )
        for setting in SETTINGS
    ]
    return signature.replace(parameters=[*fixed, *settings])


# For `help` and completion: every setting by name, with its default, its type and its rule.
Model.sample.__signature__ = _with_settings(Model.sample)  # type: ignore[attr-defined]
Model.sample.__doc__ = f"{inspect.getdoc(Model.sample)}\n\nSettings:\n\n{described()}"
