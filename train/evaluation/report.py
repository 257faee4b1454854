"""`report.html`, a self-contained file."""

import base64
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure
from torch import Tensor

from ddm.artifacts import replaced
from ddm.partition import Partition
from router.policies import policy
from serve.model.images import contact_sheet, encoded, write_png
from train.evaluation import plots
from train.evaluation.results import Evaluation
from train.evaluation.rows import ONE_MODEL, ROWS
from train.evaluation.samples import SampleSet
from train.evaluation.tables import (
    CONFIDENCE,
    FRECHET,
    MEASURES,
    Measure,
    column,
    copies_intro,
    copies_rows,
    copy_measures,
    is_best,
    label,
    middle,
    nfe,
    shown,
)
from train.time_spent import duration
from train.trained import trained_networks

_IN_A_ROW = 8  # images: as many as can be told apart on a phone
_CLUSTERS = 32  # shown at most


def write_report(
    path: Path, evaluation: Evaluation, samples: Mapping[tuple[str, int], SampleSet]
) -> None:
    """Write `report.html`, its images also to `evaluate/plots/`; `samples` by method and steps."""
    steps = middle(evaluation.steps)
    rows = {name: samples[name, steps] for name in evaluation.methods_at(steps)}
    page = _Page(path.parent, evaluation, rows)
    with replaced(path) as scratch:
        scratch.write_text(_template().render(page.parts()) + "\n", encoding="utf-8")


def shown_method(evaluation: Evaluation) -> str:
    """The method whose samples are shown: the run's own way of sampling, if it has a row."""
    sample = evaluation.config["sample"]
    names = evaluation.methods_at(middle(evaluation.steps))
    for name in names:
        row = ROWS[name]
        # A policy that keeps its experts has no control variate, whatever the config says.
        control = policy(row.policy).keeps or row.control_variate == sample["control_variate"]
        if row.policy == sample["policy"] and control and row.source in (None, sample["source"]):
            return name
    return names[0]


@cache
def _template() -> jinja2.Template:
    """The page, whose text is escaped; `FORM | number(VALUE)` formats a number."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda form, value: form.format(value)
    return environment.get_template("report.html")


class _Page:
    """What the template shows of an evaluation; `rows` are the samples by method."""

    def __init__(self, folder: Path, evaluation: Evaluation, rows: Mapping[str, SampleSet]) -> None:
        self.folder = folder
        self.plotted = folder / "evaluate" / "plots"
        self.partition = folder / "partition"
        self.evaluation = evaluation
        self.cut = Partition.read(self.partition)
        self.rows = rows
        self.steps = middle(evaluation.steps)
        self.method = shown_method(evaluation)
        self.labels = {name: label(evaluation, name) for name in evaluation.versions}

    def parts(self) -> dict[str, Any]:
        """Everything that the template names."""
        evaluation = self.evaluation
        sampler = next(iter(evaluation.samplers))
        return {
            "name": Path(evaluation.config["run"]).name,
            "facts": self._facts(),
            "evaluation": evaluation,
            "cfg": evaluation.config["evaluate"],
            "config": yaml.safe_dump(evaluation.config, sort_keys=False),
            "steps": self.steps,
            "sampler": sampler,
            "labels": self.labels,
            "meanings": {name: ROWS[name].meaning for name in evaluation.versions},
            "nfe": {name: nfe(evaluation, name) for name in evaluation.versions},
            "quality": [tables for measure in MEASURES if (tables := self._tables(measure))],
            "fits": {name: of[sampler] for name, of in evaluation.fits.items()},
            "copies": self._copies(),
            "plots": self._plots(),
            "sheets": self._sheets(),
            "more_clusters": max(0, self.cut.k - _CLUSTERS),
            "trained": self._trained(),
        }

    def _facts(self) -> str:
        """The page's first lines: data, networks, compute, hardware."""
        evaluation, cut = self.evaluation, self.cut
        # A mixture's row, if there is one.
        last = max(evaluation.versions, key=lambda row: row not in ONE_MODEL)
        seen = evaluation.images_seen
        trained = f"Images seen in training: {seen[last]:,}"
        if last not in ONE_MODEL:
            trained += " by all experts together"
            trained += "".join(
                f", {seen[row]:,} by {self.labels[row]}" for row in ONE_MODEL if row in seen
            )
        experts = "1 expert" if cut.k == 1 else f"{cut.k} experts"
        shape = " × ".join(map(str, cut.shape))
        where = f" Measured on {evaluation.hardware}." if evaluation.hardware else ""
        times = [one.spent.seconds for one in trained_networks(self.folder) if one.spent]
        took = f" Training took {duration(sum(times))} in all." if times else ""
        return (
            f"{experts}, {sum(cut.sizes):,} images of {shape}; bundle "
            f"{evaluation.versions[last][:12]}. {trained}.{took}{where}"
        )

    def _tables(self, measure: Measure) -> list[dict[str, Any]]:
        """One measure, for each feature network; without those that it was not measured for."""
        names = list(self.evaluation.features)
        tables = [
            self._table(measure, name) for name in names[: None if measure.by_features else 1]
        ]
        return [table for table in tables if table["rows"]]

    def _table(self, measure: Measure, features: str) -> dict[str, Any]:
        """One measure with a row per method and a column per number of steps."""
        evaluation = self.evaluation
        columns = [column(evaluation, measure, n, features) for n in evaluation.steps]
        rows = [
            {
                "name": self.labels[name],
                "meaning": ROWS[name].meaning,
                "cells": [(of[name], is_best(of, name, measure)) for of in columns],
            }
            for name in evaluation.versions
            if any(of[name] is not None for of in columns)
        ]
        by = f" by {features}" if measure.by_features else ""
        return {
            "title": f"{measure.title}{by}",
            "note": self._note(measure, features),
            "form": f"{{:{measure.form}}}",
            "steps": evaluation.steps,
            "rows": rows,
        }

    def _note(self, measure: Measure, features: str) -> str:
        evaluation = self.evaluation
        real = evaluation.features[features].real_confidence
        floor = evaluation.floor(features)
        if measure is CONFIDENCE and real is not None:
            return f"on real images that it was not trained on: {real:.3f}"
        if measure is FRECHET and floor is not None:
            return f"{measure.note}; {evaluation.n} real images have {shown(floor, '.2f')}"
        return measure.note

    def _copies(self) -> dict[str, Any] | None:
        """The section on memorization; None in a record without it."""
        found = self.evaluation.memorization
        if found is None:
            return None
        of_seeds = found.methods[self.method]
        clusters = [
            {
                "name": name,
                "size": size,
                "samples": sum(copies.nearest[k] for copies in of_seeds),
                "copied": sum(copies.copied[k] for copies in of_seeds),
            }
            for k, (name, size) in enumerate(zip(self.cut.names, self.cut.sizes, strict=True))
        ]
        return {
            "steps": found.steps,
            "intro": copies_intro(found),
            "measures": copy_measures(found),
            "rows": copies_rows(self.evaluation, found),
            "method": self.labels[self.method],
            "clusters": clusters,
        }

    def _trained(self) -> list[dict[str, Any]]:
        """What was trained: the mixture's networks, and the models that they are compared with."""
        networks = [("", one) for one in trained_networks(self.folder)]
        for row, inner in zip(ONE_MODEL, ("monolith", "monolith-time"), strict=True):
            if row in self.labels and (self.folder / inner).is_dir():
                networks += [(row, one) for one in trained_networks(self.folder / inner)]
        return [{**one.row, **({"name": self.labels[row]} if row else {})} for row, one in networks]

    def _sheets(self) -> dict[str, Any]:
        """The sheets of images, with their captions."""
        cut, named = self.cut, self.labels[self.method]
        held_out = bool(cut.holdout_sizes)
        whole = cut.holdout(self.partition) if held_out else cut.all(self.partition)
        real = whole["images"][:: max(1, len(whole["images"]) // 48)][:48]
        kind = "held-out images" if held_out else "training images"
        samples = self.rows[self.method].images[:48]
        return {
            "samples": self._sheet(
                "samples",
                samples.split(_IN_A_ROW),
                f"Generated: the first {len(samples)} samples of {named} in {self.steps} steps",
            ),
            "real": self._sheet(
                "real", real.split(_IN_A_ROW), f"Real: {len(real)} {kind} of all clusters"
            ),
            "copies": self._closest(),
            "methods": [
                self._sheet(
                    f"method-{name}",
                    [one.images[:_IN_A_ROW]],
                    self.labels[name],
                    f"The first samples of {self.labels[name]} in {self.steps} steps",
                )
                for name, one in self.rows.items()
            ],
            "clusters": [
                self._sheet(
                    f"cluster-{k:02d}",
                    [cut.cluster(self.partition, k)["images"][:_IN_A_ROW]],
                    f"{name}: {size:,} images",
                    f"Real images of the cluster {name}",
                )
                for k, (name, size) in enumerate(zip(cut.names, cut.sizes, strict=True))
                if k < _CLUSTERS
            ],
        }

    def _closest(self) -> dict[str, str] | None:
        """The most suspicious samples above the real images that they are nearest to."""
        found = self.evaluation.memorization
        if found is None:
            return None
        closest = found.methods[self.method][0].closest
        places, training, unseen = (list(column) for column in zip(*closest, strict=True))
        sheet = [
            self.rows[self.method].images[places],
            self.cut.in_order(self.partition)["images"][training],
        ]
        below = "their nearest training images"
        if min(unseen) >= 0:
            sheet.append(self.cut.holdout(self.partition)["images"][unseen])
            below += ", and their nearest held-out images"
        caption = (
            f"Above: the {len(places)} samples of {self.labels[self.method]} that are most like a "
            f"copy, the most suspicious first. Below each: {below}"
        )
        return self._sheet("copies", sheet, caption)

    def _sheet(
        self, name: str, rows: "list[Tensor] | tuple[Tensor, ...]", caption: str, alt: str = ""
    ) -> dict[str, str]:
        """A contact sheet, also as a file."""
        image = contact_sheet(rows, least_side=64)
        write_png(self.plotted / f"{name}.png", image)
        data = base64.b64encode(encoded(image)).decode()
        return {"data": data, "caption": caption, "alt": alt or caption}

    def _plots(self) -> dict[str, Any]:
        evaluation, rows, cut = self.evaluation, self.rows, self.cut
        routed = {name: one for name, one in rows.items() if name not in (*ONE_MODEL, "full")}
        followed = {name: one for name, one in rows.items() if ROWS[name].routed_one}
        named = self.labels[self.method]
        experts = ", ".join(cut.names) if cut.k <= 10 else f"{cut.k} clusters"
        return {
            "frechet": [
                self._plot(
                    f"frechet-{name}",
                    plots.frechet(evaluation, name),
                    f"Fréchet distance by {name} over the number of steps. {self._range(name)}",
                )
                for name in evaluation.features
            ],
            "trajectory": self._plot(
                "trajectory",
                plots.trajectory(evaluation),
                "Trajectory error over the number of steps, with the fitted power laws",
            ),
            "load": self._plot(
                "load",
                plots.load(routed or rows, cut.names, cut.pi.tolist(), self.labels),
                f"The fraction of all NFE that each expert has at {self.steps} steps, beside its "
                f"mixture weight pi: {experts}",
            ),
            "certainty": self._plot(
                "certainty",
                plots.certainty(followed or rows, self.labels),
                "The largest alpha over time, averaged over the images: 1 is a router that is sure",
            ),
            "alpha": self._plot(
                "alpha",
                plots.alpha_over_time(rows[self.method], cut.names),
                f"Four images of {named}: alpha over time, and below it, as a strip, the expert "
                "that updated the image at each step",
            ),
            "losses": self._plot(
                "losses", plots.losses(self.folder, cut.names), "Training losses over the steps"
            ),
        }

    def _plot(self, name: str, figure: Figure, alt: str) -> dict[str, str]:
        """A figure as SVG in the page's colours, also as a file."""
        text = plots.svg(figure)
        with replaced(self.plotted / f"{name}.svg") as scratch:
            scratch.write_text(text, encoding="utf-8")
        return {"svg": text, "alt": alt}

    def _range(self, features: str) -> str:
        """The smallest and the largest distance of the shown number of steps, in words."""
        found = column(self.evaluation, FRECHET, self.steps, features)
        known = {name: value for name, value in found.items() if value is not None}
        least = min(known, key=lambda name: known[name].mean)
        most = max(known, key=lambda name: known[name].mean)
        return (
            f"At {self.steps} steps from {shown(known[least], '.2f')} ({self.labels[least]}) "
            f"to {shown(known[most], '.2f')} ({self.labels[most]})"
        )
