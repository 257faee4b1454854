"""A trained bundle answering: `from serve import load; load("runs/digits").sample(16)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.model.loading import load
    from serve.model.model import Model
    from serve.model.params import SampleConfig
    from serve.model.running import Trace

__all__ = ["Model", "SampleConfig", "Trace", "load"]

_MODULES = {
    "Model": "serve.model.model",
    "SampleConfig": "serve.model.params",
    "Trace": "serve.model.running",
    "load": "serve.model.loading",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `python -m serve` has signals to handle."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
