"""What can go wrong that a user can mend.

DdmError
 ├── ConfigError     a key, an argument or a combination of them that makes no sense
 ├── DataError       images or labels that are missing, unreadable or too few
 └── ArtifactError   a file of a run or bundle that is missing, damaged, or belongs to something else
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DdmError(Exception):
    """The root of all errors that the user of this project can cause and mend; `python -m train` exits with status 2."""


class ConfigError(DdmError, ValueError):
    """A key, an argument or a combination of them that makes no sense; `key` is its full name, where it is one key."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DataError(DdmError):
    """Images or labels that are missing, unreadable or too few."""


class ArtifactError(DdmError):
    """A file of a run or bundle that is missing, damaged, or belongs to something else."""


def require(condition: bool, key: str, rule: str, value: Any) -> None:
    """Raise `ConfigError("KEY must RULE, got VALUE")` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} must {rule}, got {value!r}", key)


def one_of(key: str, name: Any, names: tuple[str, ...]) -> ConfigError:
    """The error for a name that is not among those there are."""
    return ConfigError(f"{key} must be one of {' '.join(names)}, got {name!r}", key)


@contextmanager
def within(section: str) -> Iterator[None]:
    """Name the section of the keys of a `ConfigError` raised inside: `steps` becomes `sample.steps`."""
    try:
        yield
    except ConfigError as error:
        if error.key is None:
            raise
        key = f"{section}.{error.key}"
        message = str(error)
        if message.startswith(error.key):
            message = key + message.removeprefix(error.key)
        raise ConfigError(message, key) from error.__cause__
