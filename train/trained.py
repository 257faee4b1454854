"""What was trained in a run's folder, network by network: steps, images seen, time and hardware."""

from pathlib import Path
from typing import Any, NamedTuple

from ddm.artifacts import file_of, read_facts
from train.time_spent import TimeSpent, duration, time_spent


class Trained(NamedTuple):
    """One network; `spent` is None if its time is not known, `sha256` is that of its weights."""

    name: str
    sha256: str
    steps: int
    images_seen: int
    spent: TimeSpent | None

    @property
    def row(self) -> dict[str, Any]:
        """What a table shows of it."""
        return {
            "name": self.name,
            "steps": self.steps,
            "images_seen": self.images_seen,
            "time": duration(self.spent.seconds) if self.spent else "not known",
            "devices": self.spent.devices if self.spent else "",
        }


def trained_networks(run: Path) -> list[Trained]:
    """The networks of a run's folder: the seed model, the experts, the router, as far as there are any."""
    found = []
    for name, stem in _stems(run):
        facts = read_facts(stem)
        title = f"{name}: {facts['name']}" if "name" in facts else name
        spent = time_spent(stem.parent)
        found.append(Trained(title, facts["sha256"], facts["steps"], facts["images_seen"], spent))
    return found


def _stems(run: Path) -> list[tuple[str, Path]]:
    """The artifacts of a run, without a suffix, with what they are."""
    stems = [("seed model", run / "seed_model" / "seed_model")]
    for folder in sorted(run.glob("experts/*")):
        stems.append((f"expert {folder.name}", folder / "expert"))
    stems.append(("router", run / "router" / "router"))
    return [(name, stem) for name, stem in stems if file_of(stem, ".json").exists()]
