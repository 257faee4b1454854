"""A trained bundle answering: `from serve import load; load("runs/digits").sample(16)`."""

from serve.model import Model, SampleConfig, Trace, load

__all__ = ["Model", "SampleConfig", "Trace", "load"]
