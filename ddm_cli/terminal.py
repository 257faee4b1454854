"""What the commands share: log lines, and errors in one line."""

import logging
import sys
from collections.abc import Callable, Sequence

from ddm.errors import ConfigError, DdmError


def run(words: Sequence[str], work: Callable[[list[str]], object]) -> int:
    """Do the work; returns the exit status.

    0: done. 2: an error that the user can fix, in one line on stderr. 130: interrupted. Other
    errors are raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        work(list(words))
    except (DdmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def parted(words: Sequence[str], *what: str) -> tuple[list[str], list[str]]:
    """The plain words, one for each of `what`, and the `key=value` words.

    Raises `ConfigError` that says what to give.
    """
    plain = [word for word in words if not _is_setting(word)]
    settings = [word for word in words if _is_setting(word)]
    if len(plain) != len(what):
        raise ConfigError(
            f"give {', '.join(what)} and key=value words, got {' '.join(plain) or 'none'}"
        )
    return plain, settings


def _is_setting(word: str) -> bool:
    """Whether a key stands before the first `=`: in `a/b=c` and in a URL there is none."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace("_", "").replace(".", "").replace("-", "").isalnum()
