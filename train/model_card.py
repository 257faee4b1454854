"""The model card of a bundle: its README.md, in the layout of the Hugging Face Hub."""

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ddm.artifacts import replaced
from ddm.bundle import CARD, Bundle, read_bundle
from ddm.errors import ArtifactError
from ddm.partition import Partition
from train.config import Config
from train.evaluation.results import NEAR_COPY, Evaluation
from train.evaluation.tables import FRECHET, column, label, near_copies, shown
from train.trained import Trained, trained_networks

log = logging.getLogger(__name__)

_BEGIN = "<!-- ddm writes what follows, and writes it again: text of yours goes above or below -->"
_END = "<!-- the end of what ddm writes -->"

# The licence is the publisher's to state, so that none is claimed by a program.
_FRONT = """---
# license: state yours here, by an identifier of https://hf.co/docs/hub/repositories-licenses
library_name: ddm
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- mixture-of-experts
- decentralized
---

"""

_DATA = {
    "digits": "The 8x8 digits of UCI's Optical Recognition of Handwritten Digits, as in scikit-learn.",
    "cifar10": "CIFAR-10 (Krizhevsky, 2009): photographs of ten classes, collected from the web.",
    "celeba_hq": "CelebA-HQ: faces of celebrities, collected from the web without their consent.",
    "folder": "Images of the publisher's own folder: say here where they come from.",
    "tensors": "Images of the publisher's own file: say here where they come from.",
}
_OTHERS = "Images of several owners: say here where they come from."
_TERMS = {
    "cifar10": "Anything commercial, before the rights in the photographs are cleared.",
    "celeba_hq": "Anything but non-commercial research, by the terms of the data set; nor for "
    "identifying, imitating or judging people.",
}
_NOT_FOR = (
    "Images that are passed off as photographs, or as the work of a person.",
    "Decisions about people, or any use where a wrong image does harm.",
    "Training data that must not be recognized: a model may repeat what it has learned from, "
    "small clusters first.",
)


def write_cards(config: Config) -> None:
    """Write the cards of the run's bundle and of its copy in half precision."""
    folder, half = config.folder / "bundle", config.folder / "bundle-half"
    write_card(config, folder)
    if half.is_dir() and _half_of(half) == read_bundle(folder).version:
        _write(half / CARD, _written(config, half, read_bundle(folder), "the half precision of "))


def write_card(config: Config, folder: Path) -> None:
    """Write README.md in a bundle, or what of it is this program's; the rest is kept.

    A card without this program's marks is the user's own, and stays as it is.
    """
    _write(folder / CARD, _written(config, folder, read_bundle(folder), ""))


def _half_of(folder: Path) -> str | None:
    return read_bundle(folder).artifacts[0].facts.get("half_of")


def _write(path: Path, written: str) -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else None
    text = _merged(before, written)
    if text != before:
        with replaced(path) as scratch:
            scratch.write_text(text, encoding="utf-8")


def _merged(before: str | None, written: str) -> str:
    if before is None:
        return f"{_FRONT}{written}\n"
    head, begin, rest = before.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    return f"{head}{written}{tail}" if begin and end else before


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda text: text.replace("|", r"\|").replace("\n", " ")
    return environment.get_template("model_card.md")


def _written(config: Config, folder: Path, bundle: Bundle, copy: str) -> str:
    """What of the card in a folder is this program's."""
    mixture, evaluation = bundle.mixture, _evaluation(config, bundle)
    own = _is_own(config, bundle)
    # Of a bundle from elsewhere this config knows neither the name nor the terms.
    title, terms = (None, []) if own else _earlier(folder / CARD)
    counts = [expert.facts["count"] for expert in bundle.experts]
    return _template().render(
        begin=_BEGIN,
        end=_END,
        title=title or config.folder.name,
        k=mixture.k,
        router=bundle.router is not None,
        copy=copy,
        version=bundle.version,
        shape=mixture.shape,
        data=_DATA[config.data.name] if own else _OTHERS,
        images=sum(counts),
        clusters=list(zip(bundle.files, mixture.names, counts, mixture.pi.tolist(), strict=True)),
        held_out=_held_out(config) if own else None,
        flip=own and config.data.flip,
        inits=_inits(bundle),
        above=bundle.above,
        guides=bundle.seed_model is not None,
        condition=bundle.experts[0].facts.get("condition"),
        trained=_trained(config, bundle),
        settings=_settings(bundle),
        schedule=bundle.schedule["name"],
        evaluation=evaluation,
        tables=_tables(evaluation) if evaluation else [],
        copies=_copies(evaluation) if evaluation else "",
        not_for=dict.fromkeys([*terms, *_terms(config), *_NOT_FOR]),
    )


def _is_own(config: Config, bundle: Bundle) -> bool:
    """Whether the run's own partition holds all clusters of the bundle."""
    folder = config.folder / "partition"
    if not (folder / "partition.json").exists():
        return False
    return set(bundle.mixture.clusters) <= set(Partition.read(folder).hashes)


def _inits(bundle: Bundle) -> list[dict[str, Any] | None]:
    """What the experts started from, each one once; None for weights of their own."""
    found: list[dict[str, Any] | None] = []
    for expert in bundle.experts:
        init = expert.facts.get("init")
        if init not in found:
            found.append(init)
    return found


def _settings(bundle: Bundle) -> dict[str, Any]:
    """What the training of all experts has in common, of a few settings."""
    trained = (expert.facts for expert in bundle.experts if "imported" not in expert.facts)
    first, *others = [facts["config"] for facts in trained] or [{}]
    names = {
        "batch": "batch",
        "learning_rate": "learning rate",
        "ema_decay": "EMA",
        "precision": "precision",
    }
    return {
        shown_as: first[name]
        for name, shown_as in names.items()
        if name in first and all(other.get(name) == first[name] for other in others)
    }


def _held_out(config: Config) -> int:
    """How many images of the run's partition no training has seen."""
    folder = config.folder / "partition"
    there = (folder / "partition.json").exists()
    return sum(Partition.read(folder).holdout_sizes) if there else 0


def _trained(config: Config, bundle: Bundle) -> list[dict[str, Any]]:
    """The networks of the bundle, and the seed model; times are those that the run's folder knows."""
    networks = trained_networks(config.folder)
    here = {one.sha256: one for one in networks}
    bundled = {artifact.facts["sha256"] for artifact in bundle.artifacts}
    rows = [one for one in networks if one.name == "seed model" and one.sha256 not in bundled]
    for artifact in bundle.artifacts:
        facts = artifact.facts
        known = here.get(facts["sha256"])
        name = f"{artifact.stem.name}: {facts['name']}" if "name" in facts else artifact.stem.name
        if "imported" in facts:
            name += f", imported from a {facts['imported']['class']} that was trained elsewhere"
        spent = known.spent if known else None
        rows.append(
            Trained(
                name, facts["sha256"], facts.get("steps", 0), facts.get("images_seen", 0), spent
            )
        )
    return [one.row for one in rows]


def _evaluation(config: Config, bundle: Bundle) -> Evaluation | None:
    """What was measured of the bundle, `benchmarks.table` first; None if nothing was."""
    for section in ("table", "evaluate"):
        path = config.folder / section / "record.json"
        if not path.exists():
            continue
        try:
            found = Evaluation.read(path)
        except ArtifactError as error:
            log.warning("README.md  without a table: %s", error)
            continue
        if bundle.version in found.versions.values():
            return found
    return None


def _tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The Fréchet distances by each feature network."""
    tables = []
    for name, features in evaluation.features.items():
        columns = [column(evaluation, FRECHET, n, name) for n in evaluation.steps]
        floor = evaluation.floor(name)
        tables.append(
            {
                "features": name,
                "what": features.what,
                "floor": floor and shown(floor, FRECHET.form),
                "head": [f"{n} steps" for n in evaluation.steps],
                "rows": [
                    [
                        label(evaluation, method),
                        *(shown(of[method], FRECHET.form) for of in columns),
                    ]
                    for method in evaluation.versions
                ],
            }
        )
    return tables


def _copies(evaluation: Evaluation) -> str:
    """How many samples are near-copies of training images, in words."""
    found = near_copies(evaluation)
    if not found:
        return "Whether samples are copies of training images was not measured."
    return f"{found}. A near-copy: {NEAR_COPY}."


def _terms(config: Config) -> list[str]:
    return [_TERMS[config.data.name]] if config.data.name in _TERMS else []


def _earlier(card: Path) -> tuple[str | None, list[str]]:
    """The title of a card that this program has written, and what it says the model is not for."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    written = text.partition(_BEGIN)[2].partition(_END)[0]
    title = re.search("^# (.+)$", written, re.MULTILINE)
    last = written.partition("\n## Not for\n")[2].splitlines()
    return title and title[1], [line[2:] for line in last if line.startswith("- ")]
