"""What images are judged by: features, and where there is a classifier, its logits. Every figure is named after them."""

import hashlib
import pickle
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import NoTrainInceptionV3

from ddm.errors import ConfigError
from ddm.rng import RngStream, derive_seed
from ddm.training import Batches, to_float
from train.progress import bar


class NetworkFeatures(NamedTuple):
    """Images as a feature network sees them: `features` `[N, d]`, `logits` `[N, classes]` or None."""

    features: Tensor
    logits: Tensor | None


class FeatureNetwork:
    """uint8 images `[N, C, H, W]` -> `Judged`. `name`, a word, and `what` say which features a figure was made with."""

    def __init__(
        self,
        name: str,
        what: str,
        network: nn.Module,
        rgb: bool,
        device: str,
        file: Path | None = None,
    ) -> None:
        self.name, self.what, self.rgb, self.device, self.file = name, what, rgb, device, file
        self.network = network.eval().to(device)

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, advance: Callable[[int], object], batch: int = 250
    ) -> NetworkFeatures:
        features, logits = [], []
        for part in images.split(batch):
            answer = self.network(
                (part.expand(-1, 3, -1, -1) if self.rgb else part).to(self.device)
            )
            parts = answer if isinstance(answer, tuple) else (answer,)
            features.append(
                parts[0].float().cpu()
            )  # for singular values in float64, a GPU's are the slower ones
            logits += [parts[1].float().cpu()] if len(parts) > 1 else []
            advance(len(part))
        return NetworkFeatures(torch.cat(features), torch.cat(logits) if logits else None)


def feature_networks(
    named: Sequence[str],
    inception_weights: str | None,
    images: dict[str, Tensor],
    seed: int,
    device: str,
) -> list[FeatureNetwork]:
    """The networks that `evaluate.features` names; `images` are the partition's, on which a classifier may be trained.

    Raises `ConfigError` where one cannot be had.
    """
    networks = []
    for name in named:
        if name == "classifier":
            networks.append(_trained_classifier(images, seed, device))
        elif name == "inception":
            network = _Inception(inception_weights)
            networks.append(
                FeatureNetwork(
                    name,
                    "Inception v3 (2015)",
                    network,
                    True,
                    device,
                    Path(inception_weights or ""),
                )
            )
        else:
            networks += [
                script_network("evaluate.features", str(file), device)
                for file in script_files(Path(name))
            ]
    return networks


def script_files(path: Path) -> list[Path]:
    """The TorchScript files that a path names: itself, or those in a folder, which may be none."""
    return sorted(path.glob("*.pt")) if path.is_dir() else [path]


_classifiers: dict[
    Hashable, nn.Module
] = {}  # by what they were trained on: ablations ask for the same one again and again


def _trained_classifier(images: dict[str, Tensor], seed: int, device: str) -> FeatureNetwork:
    labels = images.get("labels", images["cluster"])
    if int(labels.max()) == 0:
        raise ConfigError(
            "evaluate.features must hold inception or a TorchScript file for images of one class, got 'classifier'"
        )
    what = f"a small classifier trained on half of the images ({int(labels.max()) + 1} classes)"
    contents = (
        hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()
        for tensor in (images["images"], labels)
    )
    key = (*contents, seed, device)
    if key not in _classifiers:
        _classifiers[key] = _classifier(images["images"], labels, seed, device)
    return FeatureNetwork("classifier", what, _classifiers[key], rgb=False, device=device)


def script_network(key: str, path: str, device: str) -> FeatureNetwork:
    """The TorchScript network in a file: uint8 `[B, 3, H, W]` -> features `[B, d]`, or (features, logits).

    Raises `ConfigError` naming the config's `key` where it does not load.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`torch.jit.load` is", FutureWarning
            )  # the form feature networks come in
            network = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{key} must be a TorchScript file that loads here, got {path!r} ({reason})"
        ) from error
    stem = Path(path).stem
    return FeatureNetwork(
        stem, f"the TorchScript network {stem}", network, rgb=True, device=device, file=Path(path)
    )


class _Inception(nn.Module):
    """The network of the literature's FID, from the user's copy of its weights; torchmetrics builds it with torch-fidelity."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], weights
            )
        except ModuleNotFoundError as error:
            raise ConfigError(
                "evaluate.features=inception needs torch-fidelity: pip install torch-fidelity"
            ) from error
        except (RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"evaluate.inception_weights must be those of Inception v3 (2015), got {weights!r} ({reason})"
            ) from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network._torch_fidelity_forward(
            images
        )  # its own forward keeps the first alone
        return features, logits


class _Classifier(nn.Module):
    """A small convolutional network: uint8 images -> (64 features, logits)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(channels, 32),
            *block(32, 64),
            nn.MaxPool2d(2),
            *block(64, 64),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.ReLU(),
            nn.LayerNorm(
                64, elementwise_affine=False
            ),  # features of size 1, for which KID's cubic kernel is made
        )
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_float(images)
        features = self.body(
            F.adaptive_avg_pool2d(x, 16) if x.shape[-1] > 16 else x
        )  # easy classes show at a glance
        return features, self.head(self.dropout(features))


def held_out(count: int, seed: int) -> Tensor:
    """Which of `count` images the classifier never sees, bool `[count]`: a random half."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(count, dtype=torch.bool).scatter_(0, order[: count // 2], True)


def _classifier(
    images: Tensor, labels: Tensor, seed: int, device: str, steps: int = 300
) -> nn.Module:
    """Train on the half that is not held out. Fit for telling easy classes apart, as the digits are."""
    seen = ~held_out(len(images), seed)
    batches = Batches(images[seen].to(device), 128, seed)
    targets = labels[seen].to(device)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, RngStream.DROPOUT, 0))
        network = _Classifier(images.shape[1], int(labels.max()) + 1).to(device)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3, fused=True)
        with bar("classifier", steps) as advance:
            for step in range(steps):
                x, place = batches.x0(step)
                loss = F.cross_entropy(network(x)[1], targets[place])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance()
    return network
