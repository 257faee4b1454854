"""`python -m train`: partition, experts, router, bundle, samples, evaluation.

From Python: `from train import train_model`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.library import train_model

__all__ = ["train_model"]


def __getattr__(name: str) -> Any:
    """Import on first use: Lightning takes seconds, and most of this package does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("train.library"), name)


def __dir__() -> list[str]:
    return __all__
