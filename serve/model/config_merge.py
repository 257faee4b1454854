"""From trees of keys and `key=value` words to a config dataclass, with what does not fit refused by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddm.errors import ConfigError

C = TypeVar("C")


def filled(schema: type[C], *layers: Mapping[str, Any] | DictConfig | str) -> C:
    """A config of that class from layers over its defaults, the last on top: trees of keys, or `key=value` words.

    Raises `ConfigError` naming the key that is unknown, missing, or has a value of another type.
    """
    merged, key = OmegaConf.structured(schema), ""
    try:
        for layer in layers:
            if isinstance(layer, str):
                key = layer.partition("=")[0]
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([layer]))
            elif isinstance(layer, DictConfig):
                key = ""
                merged = OmegaConf.merge(merged, layer)
            else:
                for name, value in layer.items():
                    key = str(name)
                    merged = OmegaConf.merge(merged, {key: value})
        key = ""
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or key
        said = str(error).splitlines()[0]  # OmegaConf's other lines repeat the key
        raise ConfigError(f"{key}: {said}" if key else said, key or None) from error
