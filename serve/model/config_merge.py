"""From trees of keys and `key=value` arguments to a config dataclass; what does not fit is refused
by name.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import split_key
from omegaconf._yaml import get_yaml_loader  # that of OmegaConf.load, which takes no nodes
from omegaconf.errors import OmegaConfBaseException

from ddm.errors import ConfigError, require, shown, within

C = TypeVar("C")

_PLAIN = ((int,), (float,), (str,))
_TAG = "tag:yaml.org,2002:"


def filled(schema: type[C], *layers: Mapping[str, Any] | DictConfig | str) -> C:
    """A config of that class: layers (trees of keys, or `key=value` arguments) merged over its
    defaults, in order.

    The value of a word is YAML, read by `read_yaml`. It takes the place of the list, or of the object
    whose keys are the user's, that the word names (`table.samplers={}`); keys of a section are set
    beside its others.
    Raises `ConfigError` naming the key that is unknown, missing, or has a value of another type.
    """
    merged = deepcopy(_defaults(schema))  # type: ignore[arg-type]  # classes are hashable
    key = ""
    try:
        for layer in layers:
            if isinstance(layer, str):
                key, _, text = layer.partition("=")
                kind = _type_at(schema, key)
                value = read_yaml(text, kind)
                if isinstance(value, dict | list) and not any(map(is_dataclass, _members(kind))):
                    OmegaConf.update(merged, key, type(value)(), merge=False)
                word = OmegaConf.create()
                OmegaConf.update(word, key, value)
                merged.merge_with(word)
            elif isinstance(layer, DictConfig):
                key = ""
                merged.merge_with(layer)
            elif not isinstance(layer, Mapping):
                raise ConfigError(f"the config must be keys with values, got {shown(layer)}")
            else:
                for name, value in layer.items():
                    key = str(name)
                    merged.merge_with({key: value})
        key = ""
        config: C = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except RecursionError as error:
        raise ConfigError(f"{key or 'the config'} is nested too deeply", key or None) from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        key = getattr(error, "full_key", None) or key
        first_line = str(error).partition("\n")[0]  # OmegaConf's other lines repeat the key
        said = first_line[:500]
        raise ConfigError(f"{key}: {said}" if key else said, key or None) from error
    _check_elements(config)
    return config


@cache
def _defaults(schema: type) -> DictConfig:
    """A config's defaults, which takes OmegaConf longer than all the rest."""
    return OmegaConf.structured(schema)


def read_yaml(text: str, schema: Any) -> Any:
    """Plain data from YAML for a value of the type `schema`.

    Where the type is text, a plain scalar is the text as written (`1e3`, `no`, `2024-01-01`). A
    number with leading zeros is decimal, and `1:30` is text, never a number to the base 60. Raises
    `yaml.YAMLError` and `RecursionError`.
    """
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _settle(node, schema)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _settle(node: yaml.Node, schema: Any) -> None:
    """Give the plain scalars under a node the tags of their types."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _settle(key, str)
            _settle(value, _inner_type(schema, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _settle(value, _inner_type(schema, None))
    elif isinstance(node, yaml.ScalarNode) and not node.style:  # plain, not quoted
        _settle_scalar(node, schema)


def _settle_scalar(node: yaml.ScalarNode, schema: Any) -> None:
    to_be_text = str in _members(schema) and node.tag not in (f"{_TAG}null", f"{_TAG}merge")
    to_base_60 = node.tag in (f"{_TAG}int", f"{_TAG}float") and ":" in node.value
    if to_be_text or to_base_60:
        node.tag = f"{_TAG}str"
    elif node.tag == f"{_TAG}int" and re.fullmatch(r"[-+]?0[0-9_]+", node.value):
        sign = node.value[0] if node.value[0] in "-+" else ""
        node.value = sign + (node.value.lstrip("-+0_") or "0")


def _members(schema: Any) -> tuple[Any, ...]:
    """The types that a value may have: `str | None` gives `(str, NoneType)`, a `Literal` of words
    `(str,)`.
    """
    if get_origin(schema) is Literal:
        return tuple({type(value) for value in get_args(schema)})
    if get_origin(schema) in (list, dict):
        return (schema,)
    return get_args(schema) or (schema,)


def _inner_type(schema: Any, key: str | None) -> Any:
    """The type of a dataclass's field, a dictionary's value or a list's item; `Any` where that is
    unknown.
    """
    for member in _members(schema):
        if is_dataclass(member) and isinstance(member, type) and key is not None:
            return get_type_hints(member).get(key, Any)
        if get_origin(member) in (list, dict):
            return get_args(member)[-1]
    return Any


def _type_at(schema: Any, key: str) -> Any:
    """The type of the value at `a.b.c`; `Any` where that is unknown."""
    for part in split_key(key):
        schema = _inner_type(schema, part)
    return schema


def _check_elements(config: Any) -> None:
    """Refuse a list in place of a number in a list, which OmegaConf lets through; `config` is a
    dataclass.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            with within(field.name):
                _check_elements(value)
        elements = list(value.values()) if isinstance(value, dict) else value
        if isinstance(elements, list) and get_args(hints[field.name])[-1:] in _PLAIN:
            nested = any(isinstance(element, list | dict) for element in elements)
            require(not nested, field.name, "not hold lists or objects", value)
