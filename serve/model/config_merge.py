"""From trees of keys and `key=value` arguments to a config dataclass; what does not fit is refused by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddm.errors import ConfigError, shown

C = TypeVar("C")


def filled(schema: type[C], *layers: Mapping[str, Any] | DictConfig | str) -> C:
    """A config of that class: layers (trees of keys, or `key=value` arguments) merged over its defaults, in order.

    Raises `ConfigError` naming the key that is unknown, missing, or has a value of another type.
    """
    merged = OmegaConf.structured(schema)
    key = ""
    try:
        for layer in layers:
            if isinstance(layer, str):
                key = layer.partition("=")[0]
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([layer]))
            elif isinstance(layer, DictConfig):
                key = ""
                merged = OmegaConf.merge(merged, layer)
            elif not isinstance(layer, Mapping):
                raise ConfigError(f"the config must be keys with values, got {shown(layer)}")
            else:
                for name, value in layer.items():
                    key = str(name)
                    merged = OmegaConf.merge(merged, {key: value})
        key = ""
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except RecursionError as error:
        raise ConfigError(f"{key} is nested too deeply", key) from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or key
        first_line = str(error).partition("\n")[0]  # OmegaConf's other lines repeat the key
        said = first_line[:500]
        raise ConfigError(f"{key}: {said}" if key else said, key or None) from error
