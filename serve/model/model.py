"""A trained bundle in this process, ready to sample."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from ddm.errors import within
from ddm.rng import IMAGES_OF_A_SEED
from serve.model.edits import RESAMPLINGS, check_counts, count_of, edit_of, own_noise
from serve.model.image_folder import save_images
from serve.model.inversion import between, inversion_settings, invert
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
            check_counts(n=n, seed=seed, first_index=first_index, batch=batch)
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

    def iter_samples(
        self,
        n: int | None = None,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        **settings: Unpack[SampleSettings],
    ) -> Iterator[Tensor]:
        """The images of `sample` one after another, `[C, H, W]` each, any number of them in the
        memory of one batch; without `n` without end.

        Raises what `sample` raises.
        """
        plan = self.plan(self.settings(**settings))
        with within("sample"):
            n_known = 1 if n is None else n
            check_counts(n=n_known, seed=seed, first_index=first_index, batch=batch)

        def images() -> Iterator[Tensor]:
            last = IMAGES_OF_A_SEED if n is None else first_index + n
            for low in range(first_index, last, batch):
                index = torch.arange(low, min(low + batch, last), device=self.device)
                yield from sample_batch(self, plan, seed, index)[0]

        return images()

    def save_images(
        self,
        folder: str | Path,
        n: int = 10_000,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Path:
        """Write the images of `sample` as `FOLDER/000000.png` and so on, named by their index, in
        the memory of one batch. Returns the folder.

        After an interruption the same call goes on where it stopped; a larger n adds to what is
        there. `samples.json` beside the images says what they are of. Nothing else in the folder is
        touched, and no file that is not from here is overwritten.

        progress: called with the number of images that were written

        Raises what `sample` raises; `ConfigError` naming the folder if it holds images of another
        model, precision, seed or settings, or of other origin; `ArtifactError` if it cannot be written.
        """
        plan = self.plan(self.settings(**settings))
        with within("sample"):
            check_counts(n=n, seed=seed, first_index=first_index, batch=batch)
        index = range(first_index, first_index + n)
        save_images(self, plan, Path(folder), seed, index, batch, progress)
        return Path(folder)

    def invert(
        self,
        images: Tensor,
        *,
        batch: int = 256,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Tensor:
        """The noise of images, `[n, C, H, W]`, float32, on the CPU: `sample(x=noise)` with the same
        settings, and those below, gives the images back, up to the error of the steps.

        The probability-flow ODE upwards, from `a(t_min)` times the image to t = 1 (arXiv
        2011.13456, section 4.3; DDIM's inversion, arXiv 2010.02502, section 5.4). It is that of the
        whole mixture, `policy="full"`: its velocity is a function of (x, t) alone, so that both
        ways meet the same one, and every image has one noise. An expert that was drawn by lot
        could not be met again. K calls per step are the price; `policy="nucleus"` or `"top_k"` calls
        fewer, and `clusters=[name]` is the ODE of one expert, one call a step, if the image is known
        to be of its cluster.

        Other defaults than `sample`'s: `policy="full"`, `control_variate="none"`, `t_min=1e-3`.

        images: in [-1, 1], `[C, H, W]` or `[n, C, H, W]`
        batch, progress: as in `sample`

        Raises `ConfigError` naming a setting for which there is no way back.
        """
        config = self.settings(**inversion_settings(settings))
        return invert(self, images, config, batch, progress)

    def interpolate(
        self,
        a: int | Tensor,
        b: int | Tensor,
        n: int = 8,
        *,
        batch: int = 256,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Tensor:
        """n images on the way from `a` to `b`, both included, `[n, C, H, W]`, float32, on the CPU.

        a, b: a seed each, for its image 0, or an image `[C, H, W]`, whose noise `invert` finds. The
        noises between them are on the great circle. Defaults as in `invert`: under the whole
        mixture's ODE near noises have near images, under experts drawn by lot they have not.

        n: at least 2
        batch, progress: as in `sample`

        Raises `ConfigError` as `sample` and `invert` do.
        """
        chosen = inversion_settings(settings)
        config = self.settings(**chosen)
        noise = between(self, a, b, n, lambda image: invert(self, image, config, batch, progress))
        return self.sample(x=noise, batch=batch, progress=progress, **chosen)

    def compare(
        self,
        folder: str | Path,
        *,
        features: Sequence[str] = ("classifier", "pixels"),
        inception_weights: str | None = None,
    ) -> dict[str, Any]:
        """How far the images in a folder are from the training images, by the measures of
        `evaluate`: a `train.evaluation.comparison.Comparison` for each of the features.

        features: classifier (a small one, trained on half of the training images), pixels (their
        whitened principal directions), inception (with `inception_weights`, a file of yours)

        Raises `ConfigError` for a bundle without its run, which has no training images, and for
        unknown features; `DataError` naming what cannot be read.
        """
        images = self._training_images("compare")
        # By name: training stands above serving, and serving needs nothing of it.
        comparison = import_module("train.evaluation.comparison")
        found: dict[str, Any] = comparison.compare(
            folder, images, str(self.device), features, inception_weights
        )
        return found


def _with_settings(function: Callable[..., Any], own: dict[str, Any]) -> inspect.Signature:
    """The signature of a function with each field of `SampleConfig` in place of `**settings`; own:
    defaults of the function's own.
    """
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = SampleSettings.__annotations__
    settings = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=own.get(setting.name, setting.default),
            annotation=hints[setting.name],
        )
        for setting in SETTINGS
    ]
    return signature.replace(parameters=[*fixed, *settings])


# For `help` and completion: every setting by name, with its default, its type and its rule.
_DOCUMENTED: list[tuple[Any, dict[str, Any]]] = [
    (Model.sample, {}),
    (Model.iter_samples, {}),
    (Model.save_images, {}),
    (Model.invert, inversion_settings({})),
    (Model.interpolate, inversion_settings({})),
]
for _function, _own in _DOCUMENTED:
    _function.__signature__ = _with_settings(_function, _own)
    _function.__doc__ = f"{inspect.getdoc(_function)}\n\nSettings:\n\n{described(_own)}"
