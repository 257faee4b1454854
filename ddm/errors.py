"""What can go wrong that a user can fix.

DdmError
 ├── ConfigError     a key, an argument or a combination of them that makes no sense
 ├── DataError       images or labels that are missing, unreadable or too few
 └── ArtifactError   a file of a run or bundle that is missing, damaged or of something else
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_BRIEF = reprlib.Repr()
_BRIEF.maxdict = _BRIEF.maxlist = _BRIEF.maxtuple = 20
_BRIEF.maxstring = _BRIEF.maxother = 300


class DdmError(Exception):
    """The root of the errors that a user can cause and fix: the command line exits with 2."""


class ConfigError(DdmError, ValueError):
    """A key, an argument or a combination of them that makes no sense; `key` is its full name if it
    is one key.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DataError(DdmError):
    """Images or labels that are missing, unreadable or too few."""


class ArtifactError(DdmError):
    """A file of a run or bundle that is missing, damaged, or belongs to something else."""


def shown(value: Any) -> str:
    """A value for the text of an error: its `repr`, shortened if it is long or deeply nested."""
    return _BRIEF.repr(value)


def require(condition: bool, key: str, rule: str, value: Any) -> None:
    """Raise `ConfigError("KEY must RULE, got VALUE")` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} must {rule}, got {shown(value)}", key)


def one_of(key: str, name: Any, names: tuple[str, ...]) -> ConfigError:
    """The error for a name that is not in `names`."""
    return ConfigError(f"{key} must be one of {' '.join(names)}, got {shown(name)}", key)


@contextmanager
def within(section: str) -> Iterator[None]:
    """Name the section of the keys of a `ConfigError` raised inside: `steps` becomes
    `sample.steps`.
    """
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
