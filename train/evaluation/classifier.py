"""A small classifier, trained on half of the run's images, as a feature network."""

import hashlib
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.errors import ConfigError
from ddm.rng import RngStream, derive_seed
from ddm.training import Batches, to_float
from train.evaluation.feature_network import FeatureNetwork
from train.progress import bar

_STEPS, _BATCH, _LEARNING_RATE = 300, 128, 2e-3

# Trained classifiers by what they were trained on: ablations ask for the same one again and again.
_trained: dict[Hashable, nn.Module] = {}


def classes_of(images: Mapping[str, Tensor]) -> Tensor:
    """The class of every image, int64 `[N]`: its label, or its cluster if there are no labels."""
    return images.get("labels", images["cluster"])


def check_classes(classes: Tensor, key: str = "evaluate.features") -> None:
    """Raise `ConfigError` naming the key if there is only one class: nothing can be learned."""
    if int(classes.min()) == int(classes.max()):
        raise ConfigError(
            f"{key} must hold pixels, inception or a TorchScript file for images of one class, "
            "got 'classifier'"
        )


def classifier_network(images: Mapping[str, Tensor], seed: int, device: str) -> FeatureNetwork:
    """The classifier of the images' classes. Raises `ConfigError` for images of one class."""
    classes = classes_of(images)
    check_classes(classes)
    count = int(classes.max()) + 1
    what = f"a small classifier trained on half of the images ({count} classes)"
    key = (_hash(images["images"]), _hash(classes), seed, device)
    if key not in _trained:
        _trained[key] = _train(images["images"], classes, seed, device)
    return FeatureNetwork("classifier", what, _trained[key], rgb=False, device=device)


def held_out(count: int, seed: int) -> Tensor:
    """Which of `count` images the classifier is not trained on, bool `[count]`: a random half."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(count, dtype=torch.bool).scatter_(0, order[: count // 2], True)


def _hash(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()


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
            nn.LayerNorm(64, elementwise_affine=False),  # KID's kernel expects features of size 1
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_float(images)
        if x.shape[-1] > 16:  # enough to tell easy classes apart
            x = F.adaptive_avg_pool2d(x, 16)
        features = self.body(x)
        return features, self.head(self.dropout(features))


def _train(images: Tensor, classes: Tensor, seed: int, device: str) -> nn.Module:
    """Train on the half that is not held out: enough for classes as easy as the digits."""
    seen = ~held_out(len(images), seed)
    batches = Batches(images[seen].to(device), _BATCH, seed)
    targets = classes[seen].to(device)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, RngStream.DROPOUT, 0))
        network = _Classifier(images.shape[1], int(classes.max()) + 1).to(device)
        optimizer = torch.optim.Adam(network.parameters(), _LEARNING_RATE, fused=True)
        with bar("classifier", _STEPS) as advance:
            for step in range(_STEPS):
                x, place = batches.x0(step)
                loss = F.cross_entropy(network(x)[1], targets[place])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance()
    return network
