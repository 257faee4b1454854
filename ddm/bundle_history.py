"""The history of a bundle, `history.json`: what happened to it when, with the hashes before and after."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddm.artifacts import read_json, sha256, write_json
from ddm.errors import ArtifactError

log = logging.getLogger(__name__)

HISTORY = "history.json"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The events of a bundle, oldest first; none if it has no history.

    Each has `at` (UTC), `what`, `added` and `removed` (hashes of artifacts' JSON by file), and the
    bundle's `version` after it. Raises `ArtifactError` naming a damaged file.
    """
    path = folder / HISTORY
    if not path.exists():
        return []
    events = read_json(path).get("events")
    if not (isinstance(events, list) and all(map(_is_event, events))):
        raise ArtifactError(
            f"{path} is damaged: events must be a list of objects, whose added and removed are objects"
        )
    return events


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict):
        return False
    return all(isinstance(event.get(key), dict) for key in ("added", "removed"))


def write_history(old: Path, new: Path, what: str) -> None:
    """Write the history of the bundle `old`, if there is one, to the folder of its successor `new`,
    with an event if anything has changed.
    """
    manifest = new / "manifest.json"
    try:
        events = read_history(old)
        before = read_json(old / "manifest.json")["artifacts"] if events else {}
    except (ArtifactError, KeyError) as error:
        log.warning("%s: the history of the bundle begins anew", error)
        events, before = [], {}
    after, version = read_json(manifest)["artifacts"], sha256(manifest)
    if not events or events[-1].get("version") != version:
        event = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "what": what,
            "added": _apart(after, before),
            "removed": _apart(before, after),
            "version": version,
        }
        events = [*events, event]
    write_json(new / HISTORY, {"events": events})


def _apart(here: dict[str, str], there: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in here.items() if there.get(name) != value}
