"""A trained bundle answering: `from serve import load; load("runs/digits").sample(16)`."""

from serve.model.loading import load
from serve.model.model import Model, Trace
from serve.model.params import SampleConfig

__all__ = ["Model", "SampleConfig", "Trace", "load"]
