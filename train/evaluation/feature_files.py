"""The files that `evaluate.features` and `evaluate.reference` name."""

from pathlib import Path


def script_files(path: Path) -> list[Path]:
    """The TorchScript files that a path names: itself, or those in a folder, possibly none."""
    return sorted(path.glob("*.pt")) if path.is_dir() else [path]


def reference_file(network: Path | None, reference: str | None) -> Path | None:
    """The statistics of a network's features, REFERENCE.NETWORK.npz beside it; None without."""
    if network is None or reference is None:
        return None
    file = network.with_name(f"{reference}.{network.stem}.npz")
    return file if file.is_file() else None


def feature_files(name: str, inception_weights: str | None, reference: str | None) -> list[Path]:
    """All files that one entry of `evaluate.features` stands for, statistics included."""
    if name in ("classifier", "pixels"):
        return []
    if name == "inception":
        return [Path(inception_weights or "")]
    networks = script_files(Path(name))
    found = (reference_file(network, reference) for network in networks)
    return networks + [file for file in found if file is not None]
