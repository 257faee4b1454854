"""A network that gives the features of images, and its loading from a TorchScript file."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddm.errors import ConfigError


class NetworkFeatures(NamedTuple):
    """What a feature network gives: `features` `[N, d]`, `logits` `[N, classes]` or None."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork:
    """uint8 images `[N, C, H, W]` -> `NetworkFeatures`, on the CPU in float32.

    `name` (one word) and `what` say which features a figure was made with. With `rgb` the network
    is given three channels. `file` is where its weights come from, if they were not trained here.
    """

    def __init__(
        self,
        name: str,
        what: str,
        network: nn.Module,
        rgb: bool,
        device: str,
        file: Path | None = None,
    ) -> None:
        self.name = name
        self.what = what
        self.rgb = rgb
        self.device = device
        self.file = file
        self.network = network.eval().to(device)

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, advance: Callable[[int], object], batch: int = 250
    ) -> NetworkFeatures:
        """The features of the images; `advance` is told the number of images of each batch."""
        features: list[Tensor] = []
        logits: list[Tensor] = []
        for part in images.split(batch):
            shown = part.expand(-1, 3, -1, -1) if self.rgb else part
            output = self.network(shown.to(self.device))
            outputs = output if isinstance(output, tuple) else (output,)
            features.append(outputs[0].float().cpu())  # float64 eigenvalues are slower on a GPU
            logits += [found.float().cpu() for found in outputs[1:2]]
            advance(len(part))
        return NetworkFeatures(torch.cat(features), torch.cat(logits) if logits else None)


def script_network(key: str, path: str, device: str) -> FeatureNetwork:
    """The TorchScript network in a file.

    It maps uint8 `[B, 3, H, W]` to features `[B, d]`, or to (features, logits).
    Raises `ConfigError` naming the config's `key` if it does not load.
    """
    try:
        with warnings.catch_warnings():  # TorchScript is the form that feature networks come in
            warnings.filterwarnings("ignore", "`torch.jit.load` is", FutureWarning)
            network = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{key} must be a TorchScript file that loads here, got {path!r} ({reason})"
        ) from error
    stem = Path(path).stem
    what = f"the TorchScript network {stem}"
    return FeatureNetwork(stem, what, network, rgb=True, device=device, file=Path(path))
