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
from serve.pictures import contact_sheet, write_png
from train import plots
from train.draws import Drawn
from train.record import Cell, Evaluation


class _Measure(NamedTuple):
    title: str
    note: str
    value: Callable[[Cell], float | None]
    form: str
    best: Callable[..., float] | None  # which of a column is the best, if any


_FRECHET = _Measure("Fréchet distance", "lower is better", lambda cell: cell.frechet, ".2f", min)
_ERROR = _Measure("Trajectory error E(N)", "lower is better", lambda cell: cell.trajectory_error, ".4f", min)
_MEASURES = [
    _FRECHET,
    _Measure("KID × 1000", "lower is better", lambda cell: 1000 * cell.kid, ".2f", min),
    _Measure("Inception score", "higher is better", lambda cell: cell.inception_score, ".2f", max),
    _Measure("Mean confidence of the classifier", "", lambda cell: cell.confidence, ".3f", None),
    _ERROR,
    _Measure("Expert calls a picture", "", lambda cell: cell.calls, ".0f", None),
]
_MEANING = {
    "DDIM": "one model on all pictures",
    "Naive": "one expert, drawn from the shares and kept",
    "MoG-a": "each step one expert, drawn from the posterior net's alpha",
    "MoG-da": "each step one expert, drawn from the integrated alpha",
    "balanced": "each step one expert, with error feedback",
    "controlled": "balanced, with Gaussians standing in for the experts not asked",
    "top-1": "each step the likeliest expert",
    "full": "each step all experts, weighted by alpha",
}
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
    steps = _steps(evaluation)
    for measure, last_column in ((_FRECHET, f"calls at {steps[-1]}"), (_ERROR, "falls as")):
        table = Table(title=f"{measure.title}, {measure.note}", box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("method")
        for name in [*(f"{n} steps" for n in steps), last_column]:
            table.add_column(name, justify="right")
        for name in evaluation.versions:
            cells = _row(evaluation, name)
            if measure is _FRECHET:
                last = f"{cells[-1].calls:.0f}"
            elif name in evaluation.fits:
                last = f"N^{-evaluation.fits[name].exponent:.2f}"
            else:
                continue
            table.add_row(name, *(_number(measure.value(cell), measure.form) for cell in cells), last)
        console.print(table)
    for name in evaluation.versions:
        cell = min(_row(evaluation, name), key=lambda cell: abs(cell.steps - 25))
        if evaluation.real_confidence and evaluation.real_shares and cell.confidence and cell.shares:
            ratios = [share / real for share, real in zip(cell.shares, evaluation.real_shares, strict=True) if real > 0]
            sure = cell.confidence / evaluation.real_confidence
            console.print(
                f"{name:9} at {cell.steps} steps: the classifier is {sure:.3f} times as sure as of unseen real pictures; "
                f"classes come {min(ratios):.2f} to {max(ratios):.2f} times as often",
                soft_wrap=True,
            )
    console.print(f"{evaluation.n} pictures a cell; features: {evaluation.features}", style="dim")


def write_report(path: Path, evaluation: Evaluation, drawn: Mapping[tuple[str, int], Drawn]) -> None:
    """Write `report.html`; its pictures also lie in `evaluate/plots/`."""
    folder, plotted = path.parent, path.parent / "evaluate" / "plots"
    cut = Partition.read(folder / "partition")
    middle = min(_steps(evaluation), key=lambda n: abs(n - 25))
    shown = {name: drawn[name, middle] for name in evaluation.versions}
    best = shown.get("controlled", shown[next(iter(shown))])
    plots.save(plotted / "frechet.png", plots.frechet(evaluation))
    plots.save(plotted / "trajectory.png", plots.trajectory(evaluation))
    single = {name: draw for name, draw in shown.items() if name not in ("DDIM", "full")} or shown
    plots.save(plotted / "load.png", plots.load(single, cut.names, cut.pi.tolist()))
    followed = {
        name: draw for name, draw in shown.items() if name in ("MoG-a", "MoG-da", "balanced", "controlled")
    } or shown
    plots.save(plotted / "certainty.png", plots.certainty(followed))
    plots.save(plotted / "alpha.png", plots.alpha_over_time(best, cut.names))
    plots.save(plotted / "losses.png", plots.losses(folder))
    sheets = {
        "pictures": best.images[:48].split(12),
        "methods": [draw.images[:12] for draw in shown.values()],
        "clusters": [cut.cluster(folder / "partition", k)["images"][:12] for k in range(cut.k)],
    }
    for name, rows in sheets.items():
        write_png(plotted / f"{name}.png", contact_sheet(rows, least_side=64))
    scratch = path.with_suffix(".part")
    scratch.write_text(_page(evaluation, cut, plotted, middle))
    scratch.replace(path)


def _page(evaluation: Evaluation, cut: Partition, plotted: Path, middle: int) -> str:
    config = evaluation.config
    name = html.escape(Path(config["run"]).name)
    *_, last = evaluation.versions
    seen = evaluation.pictures_seen
    trained = f"Pictures seen in training: {seen[last]:,}"
    trained += (
        f" by the experts together, {seen['DDIM']:,} by the one model of the row DDIM."
        if last != "DDIM" and "DDIM" in seen
        else "."
    )
    fits = "".join(
        f"<tr><td class=name>{row}</td><td>{fit.exponent:.2f}</td><td>{fit.constant:.3g}</td><td>{fit.r2:.3f}</td></tr>"
        for row, fit in evaluation.fits.items()
    )
    clusters = "; ".join(f"{cluster} ({size})" for cluster, size in zip(cut.names, cut.sizes, strict=True))
    shape = " × ".join(map(str, cut.shape))
    parts = [
        f"<h1>{name}</h1>",
        f"<p class=facts>{cut.k} experts on {sum(cut.sizes):,} pictures of {shape}; "
        f"bundle {evaluation.versions[last][:12]}. {trained}</p>",
        _image(plotted, "pictures", f"48 pictures drawn with balanced and control=gaussian in {middle} steps"),
        "<h2>How good are the pictures?</h2>",
        f"<p>{evaluation.n} pictures a cell, all methods from the same noise, sampler {config['sample']['sampler']}. "
        f"Features: {html.escape(evaluation.features)}; figures made with other features cannot be compared with these.</p>",
        *(_table(evaluation, measure) for measure in _MEASURES),
        _image(plotted, "frechet", "Fréchet distance over steps"),
        "<h2>How far from the mixture's own path?</h2>",
        "<p>Mean square distance, a number of the data, between where a path ends and where the full mixture's path of "
        f"{config['evaluate']['reference_steps']} steps from the same noise ends, over "
        f"{config['evaluate']['trajectories']} paths. "
        "Lines are power laws E(N) = C N<sup>−p</sup>, fitted in log E over log N.</p>",
        _image(plotted, "trajectory", "Trajectory error over steps with fitted power laws"),
        f"<table><tr><th class=name>method<th>p<th>C<th>R²</tr>{fits}</table>",
        "<h2>Who moves the pictures?</h2>",
        f"<p>At {middle} steps.</p>",
        _image(plotted, "load", "Share of the calls by expert"),
        _image(plotted, "certainty", "Mean largest alpha over time"),
        "<p>Four of these pictures: alpha over time, and the expert that moved each at every step.</p>",
        _image(plotted, "alpha", "Alpha over time for four pictures"),
        "<h2>The same noise, every method</h2>",
        f"<p>Rows from the top, {middle} steps: {', '.join(evaluation.versions)}. A column is one noise.</p>",
        _image(plotted, "methods", "One row a method"),
        f"<h2>The clusters</h2><p>Rows from the top: {html.escape(clusters)}.</p>",
        _image(plotted, "clusters", "Pictures of each cluster"),
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
    rows = []
    for name in evaluation.versions:
        cells = _row(evaluation, name)
        if any(measure.value(cell) is None for cell in cells):
            continue
        numbers = "".join(
            f"<td{_bold(evaluation, measure, cell)}>{_number(measure.value(cell), measure.form)}</td>" for cell in cells
        )
        rows.append(f"<tr><td class=name>{name}</td><td class=meaning>{_MEANING.get(name, '')}</td>{numbers}</tr>")
    if not rows:
        return ""
    note = measure.note
    if measure.title.startswith("Mean confidence") and evaluation.real_confidence is not None:
        note = f"on real pictures it never saw: {evaluation.real_confidence:.3f}"
    head = "".join(f"<th>{n} steps" for n in _steps(evaluation))
    caption = f"<caption>{measure.title} <small>{note}</small></caption>"
    return f"<div class=scroll><table>{caption}<tr><th class=name>method<th>{head}</tr>{''.join(rows)}</table></div>"


def _bold(evaluation: Evaluation, measure: _Measure, cell: Cell) -> str:
    if measure.best is None:
        return ""
    column = [
        value for other in evaluation.cells if other.steps == cell.steps and (value := measure.value(other)) is not None
    ]
    return " class=best" if measure.value(cell) == measure.best(column) else ""


def _image(plotted: Path, name: str, alt: str) -> str:
    data = base64.b64encode((plotted / f"{name}.png").read_bytes()).decode()
    return f"<p><img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'></p>"


def _steps(evaluation: Evaluation) -> list[int]:
    return sorted({cell.steps for cell in evaluation.cells})


def _row(evaluation: Evaluation, name: str) -> list[Cell]:
    return sorted((cell for cell in evaluation.cells if cell.method == name), key=lambda cell: cell.steps)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
