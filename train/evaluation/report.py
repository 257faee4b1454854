"""`report.html`, one file that needs no other, and the tables of the terminal."""

import base64
import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ddm.partition import Partition
from serve.model.images import contact_sheet, write_png
from train.evaluation import plots
from train.evaluation.methods import MEANING
from train.evaluation.results import Cell, Evaluation, Score, Spread
from train.evaluation.samples import SampleSet


class _Measure(NamedTuple):
    title: str
    note: str
    value: Callable[[Cell], float | None]
    form: str
    best: Callable[..., float] | None  # which of a column is the best, if any


_FRECHET = _Measure(
    "Fréchet distance", "lower is better", lambda cell: first_score(cell).frechet, ".2f", min
)
_ERROR = _Measure(
    "Trajectory error E(N)", "lower is better", lambda cell: cell.trajectory_error, ".4f", min
)
_MEASURES = [
    _FRECHET,
    _Measure(
        "KID × 1000", "lower is better", lambda cell: 1000 * first_score(cell).kid, ".2f", min
    ),
    _Measure(
        "Coverage",
        "of real images by drawn ones; higher is better",
        lambda cell: first_score(cell).coverage,
        ".3f",
        max,
    ),
    _Measure(
        "Inception score",
        "higher is better",
        lambda cell: first_score(cell).inception_score,
        ".2f",
        max,
    ),
    _Measure(
        "Mean confidence of the classifier",
        "",
        lambda cell: first_score(cell).confidence,
        ".3f",
        None,
    ),
    _ERROR,
    _Measure("Expert NFE per image", "", lambda cell: cell.calls, ".0f", None),
]
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 66rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; } p { margin: .3rem 0 .8rem; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
.name { text-align: left; } .meaning { text-align: left; color: #555; font-size: .88rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; } caption small, .facts { font-weight: 400; color: #555; }
.best { font-weight: 700; } img { max-width: 100%; } .scroll { overflow-x: auto; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def print_tables(evaluation: Evaluation) -> None:
    """The Frechet distances and the trajectory errors, on standard output."""
    console = Console(width=100)
    steps, sampler = evaluation.steps, next(iter(evaluation.samplers))
    features = next(iter(evaluation.features.values()))
    for measure, last_column in ((_FRECHET, f"calls at {steps[-1]}"), (_ERROR, "falls as")):
        table = Table(
            title=f"{measure.title}, {measure.note}", box=box.SIMPLE_HEAD, title_justify="left"
        )
        table.add_column("method")
        for column in [*(f"{n} steps" for n in steps), last_column]:
            table.add_column(column, justify="right")
        for method in evaluation.versions:
            if measure is _FRECHET:
                last = shown(
                    evaluation.over_seeds(method, steps[-1], lambda cell: cell.calls), ".0f"
                )
            elif method in evaluation.fits:
                last = f"N^{-evaluation.fits[method][sampler].exponent:.2f}"
            else:
                continue
            cells = (
                shown(evaluation.over_seeds(method, n, measure.value), measure.form) for n in steps
            )
            table.add_row(method, *cells, last)
        console.print(table)
    middle = min(steps, key=lambda n: abs(n - 25))
    for method in evaluation.versions:
        score = next(
            first_score(c) for c in evaluation.cells if (c.method, c.steps) == (method, middle)
        )
        if (
            features.real_confidence
            and features.real_class_frequencies
            and score.confidence
            and score.class_frequencies
        ):
            ratios = [
                share / real
                for share, real in zip(
                    score.class_frequencies, features.real_class_frequencies, strict=True
                )
                if real > 0
            ]
            console.print(
                f"{method:10} at {middle} steps: the classifier is {score.confidence / features.real_confidence:.3f} times "
                f"as sure as of unseen real images; classes come {min(ratios):.2f} to {max(ratios):.2f} times as often",
                soft_wrap=True,
            )
    seeds = f" and seed, {evaluation.seeds} seeds" if evaluation.seeds > 1 else ""
    console.print(f"{evaluation.n} images a cell{seeds}; features: {features.what}", style="dim")


def first_score(cell: Cell) -> Score:
    """The score by the first of the features."""
    return next(iter(cell.scores.values()))


def shown(value: Spread | None, form: str) -> str:
    """A measure as text, with its standard deviation over the seeds where there are several."""
    if value is None:
        return "–"
    spread = f" ± {value.deviation:{form}}" if value.deviation else ""
    return f"{value.mean:{form}}{spread}"


def write_report(
    path: Path, evaluation: Evaluation, drawn: Mapping[tuple[str, int], SampleSet]
) -> None:
    """Write `report.html`; its images also lie in `evaluate/plots/`."""
    folder, plotted = path.parent, path.parent / "evaluate" / "plots"
    cut = Partition.read(folder / "partition")
    middle = min(evaluation.steps, key=lambda n: abs(n - 25))
    rows = {name: drawn[name, middle] for name in evaluation.versions}
    best = rows.get("balanced-cv", rows[next(iter(rows))])
    plots.save(plotted / "frechet.png", plots.frechet(evaluation))
    plots.save(plotted / "trajectory.png", plots.trajectory(evaluation))
    single = {name: draw for name, draw in rows.items() if name not in ("DDIM", "full")} or rows
    plots.save(plotted / "load.png", plots.load(single, cut.names, cut.pi.tolist()))
    followed = {
        name: draw
        for name, draw in rows.items()
        if name in ("MoG-a", "MoG-da", "balanced", "balanced-cv")
    } or rows
    plots.save(plotted / "certainty.png", plots.certainty(followed))
    plots.save(plotted / "alpha.png", plots.alpha_over_time(best, cut.names))
    plots.save(plotted / "losses.png", plots.losses(folder))
    sheets = {
        "images": best.images[:48].split(12),
        "methods": [draw.images[:12] for draw in rows.values()],
        "clusters": [cut.cluster(folder / "partition", k)["images"][:12] for k in range(cut.k)],
    }
    for name, sheet in sheets.items():
        write_png(plotted / f"{name}.png", contact_sheet(sheet, least_side=64))
    scratch = path.with_suffix(".part")
    scratch.write_text(_page(evaluation, cut, plotted, middle))
    scratch.replace(path)


def _page(evaluation: Evaluation, cut: Partition, plotted: Path, middle: int) -> str:
    config = evaluation.config
    name = html.escape(Path(config["run"]).name)
    *_, last = evaluation.versions
    sampler = next(iter(evaluation.samplers))
    features = next(iter(evaluation.features.values()))
    seen = evaluation.images_seen
    trained = f"Images seen in training: {seen[last]:,}"
    trained += (
        f" by the experts together, {seen['DDIM']:,} by the one model of the row DDIM."
        if last != "DDIM" and "DDIM" in seen
        else "."
    )
    fits = "".join(
        f"<tr><td class=name>{row}</td><td>{fit.exponent:.2f}</td><td>{fit.constant:.3g}</td><td>{fit.r2:.3f}</td></tr>"
        for row, by_sampler in evaluation.fits.items()
        for fit in [by_sampler[sampler]]
    )
    clusters = "; ".join(
        f"{cluster} ({size})" for cluster, size in zip(cut.names, cut.sizes, strict=True)
    )
    shape = " × ".join(map(str, cut.shape))
    parts = [
        f"<h1>{name}</h1>",
        f"<p class=facts>{cut.k} experts on {sum(cut.sizes):,} images of {shape}; "
        f"bundle {evaluation.versions[last][:12]}. {trained}</p>",
        _image(
            plotted,
            "images",
            f"48 images drawn with balanced and control_variate=gaussian in {middle} steps",
        ),
        "<h2>How good are the images?</h2>",
        f"<p>{evaluation.n} images a cell, all methods from the same noise, sampler {sampler}. "
        f"Features: {html.escape(features.what)}; figures made with other features cannot be compared with these.</p>",
        *(_table(evaluation, measure) for measure in _MEASURES),
        _image(plotted, "frechet", "Fréchet distance over steps"),
        "<h2>How far from the mixture's own path?</h2>",
        "<p>Mean square distance, a number of the data, between where a path ends and where the full mixture's path of "
        f"{config['evaluate']['reference_steps']} steps from the same noise ends, over "
        f"{config['evaluate']['trajectories']} paths. "
        "Lines are power laws E(N) = C N<sup>−p</sup>, fitted in log E over log N.</p>",
        _image(plotted, "trajectory", "Trajectory error over steps with fitted power laws"),
        f"<table><tr><th class=name>method<th>p<th>C<th>R²</tr>{fits}</table>",
        "<h2>Who moves the images?</h2>",
        f"<p>At {middle} steps.</p>",
        _image(plotted, "load", "Share of the calls by expert"),
        _image(plotted, "certainty", "Mean largest alpha over time"),
        "<p>Four of these images: alpha over time, and the expert that moved each at every step.</p>",
        _image(plotted, "alpha", "Alpha over time for four images"),
        "<h2>The same noise, every method</h2>",
        f"<p>Rows from the top, {middle} steps: {', '.join(evaluation.versions)}. A column is one noise.</p>",
        _image(plotted, "methods", "One row a method"),
        f"<h2>The clusters</h2><p>Rows from the top: {html.escape(clusters)}.</p>",
        _image(plotted, "clusters", "Images of each cluster"),
        "<h2>Training</h2>",
        _image(plotted, "losses", "Training losses"),
        "<details><summary>config.yaml</summary>"
        f"<pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre></details>",
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{name}: ddm report</title><style>{_CSS}</style><body>{''.join(parts)}</body></html>\n"
    )


def _table(evaluation: Evaluation, measure: _Measure) -> str:
    """One measure, methods down and steps across, the best of a column in bold; nothing where it was not measured."""
    rows, steps = [], evaluation.steps
    columns = {
        n: {name: evaluation.over_seeds(name, n, measure.value) for name in evaluation.versions}
        for n in steps
    }
    for name in evaluation.versions:
        if any(columns[n][name] is None for n in steps):
            continue
        numbers = "".join(
            f"<td{_bold(columns[n], name, measure)}>{shown(columns[n][name], measure.form)}</td>"
            for n in steps
        )
        rows.append(
            f"<tr><td class=name>{name}</td><td class=meaning>{MEANING.get(name, '')}</td>{numbers}</tr>"
        )
    if not rows:
        return ""
    note = measure.note
    sure = next(iter(evaluation.features.values())).real_confidence
    if measure.title.startswith("Mean confidence") and sure is not None:
        note = f"on real images it never saw: {sure:.3f}"
    head = "".join(f"<th>{n} steps" for n in steps)
    caption = f"<caption>{measure.title} <small>{note}</small></caption>"
    return f"<div class=scroll><table>{caption}<tr><th class=name>method<th>{head}</tr>{''.join(rows)}</table></div>"


def _bold(column: Mapping[str, Spread | None], name: str, measure: _Measure) -> str:
    values = {method: value.mean for method, value in column.items() if value is not None}
    return (
        " class=best"
        if measure.best is not None and values[name] == measure.best(values.values())
        else ""
    )


def _image(plotted: Path, name: str, alt: str) -> str:
    data = base64.b64encode((plotted / f"{name}.png").read_bytes()).decode()
    return f"<p><img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'></p>"
