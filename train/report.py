"""`report.html`, one file that needs no other, and the tables of the terminal."""

import base64
import html
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ddm.partition import Partition
from serve.pictures import contact_sheet, write_png
from train import plots
from train.draws import Drawn
from train.record import Cell, Evaluation

_MEASURES: list[tuple[str, str, Callable[[Cell], float | None], str]] = [
    ("Fréchet distance", "lower is better", lambda cell: cell.frechet, ".2f"),
    ("KID × 1000", "lower is better", lambda cell: 1000 * cell.kid, ".2f"),
    ("Inception score", "higher is better", lambda cell: cell.inception_score, ".2f"),
    ("Mean confidence of the classifier", "real pictures: {real}", lambda cell: cell.confidence, ".3f"),
    ("Trajectory error E(N)", "mean square distance to the mixture's own path, 1000 steps; lower is better", lambda cell: cell.trajectory_error, ".4f"),
    ("Expert calls a picture", "", lambda cell: cell.calls, ".0f"),
]
_MEANING = {
    "DDIM": "one model on all pictures",
    "Naive": "an expert drawn from the shares, kept",
    "MoG-a": "an expert drawn from the posterior net's alpha at every step",
    "MoG-da": "an expert drawn from the integrated alpha at every step",
    "balanced": "one expert a step, with error feedback",
    "top-1": "the likeliest expert at every step",
    "full": "all experts at every step, weighted by alpha",
}
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; } p { margin: .3rem 0 .8rem; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th:nth-child(2), td:nth-child(2) { text-align: left; color: #555; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; } caption small { font-weight: 400; color: #555; }
td.best { font-weight: 700; } img { max-width: 100%; } img.pixels { image-rendering: pixelated; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; } .facts { color: #555; } .scroll { overflow-x: auto; }
"""


def print_tables(evaluation: Evaluation) -> None:
    """The Frechet distances and the trajectory errors, on standard output."""
    console = Console()
    for title, note, value, form in (_MEASURES[0], _MEASURES[4]):
        steps = _steps(evaluation)
        table = Table(title=f"{title} ({evaluation.n} pictures; {evaluation.features})" if title == _MEASURES[0][0] else title, caption=note, title_justify="left")
        table.add_column("method")
        for n in steps:
            table.add_column(f"{n} steps", justify="right")
        if title == _MEASURES[0][0]:
            table.add_column(f"calls at {steps[-1]}", justify="right")
        else:
            table.add_column("falls as", justify="right")
        for name in evaluation.versions:
            cells = _row(evaluation, name)
            if title == _MEASURES[0][0]:
                last = f"{cells[-1].calls:.0f}"
            elif name in evaluation.fits:
                last = f"N^-{evaluation.fits[name].exponent:.2f}"
            else:
                continue
            table.add_row(name, *(_number(value(cell), form) for cell in cells), last)
        console.print(table)


def write_report(path: Path, evaluation: Evaluation, drawn: Mapping[tuple[str, int], Drawn]) -> None:
    """Write `report.html`; its figures also lie as PNG in `evaluate/plots/`."""
    folder = path.parent
    cut = Partition.read(folder / "partition")
    steps = _steps(evaluation)
    middle = min(steps, key=lambda n: abs(n - 25))
    shown = {name: drawn[name, middle] for name in evaluation.versions}
    routed = {name: draw for name, draw in shown.items() if name in ("MoG-a", "MoG-da", "balanced")}
    figures: dict[str, Figure | None] = {
        "frechet": plots.frechet(evaluation),
        "trajectory": plots.trajectory(evaluation),
        "load": plots.load({name: draw for name, draw in shown.items() if name not in ("DDIM", "full")}, cut.names, cut.pi.tolist()),
        "certainty": plots.certainty(routed),
        "alpha": plots.alpha_over_time(shown["balanced"], cut.names),
        "losses": plots.losses(folder),
    }
    sheets = {
        "balanced": contact_sheet(shown["balanced"].images[:64].split(16), least_side=48),
        "methods": contact_sheet([draw.images[:16] for draw in shown.values()], least_side=48),
        "clusters": contact_sheet([cut.cluster(folder / "partition", k)["images"][:16] for k in range(cut.k)], least_side=48),
    }
    images = {name: _saved(folder / "evaluate" / "plots" / f"{name}.png", figure) for name, figure in figures.items() if figure}
    for name, sheet in sheets.items():
        images[name] = folder / "evaluate" / "plots" / f"{name}-pictures.png"
        write_png(images[name], sheet)
    scratch = path.with_suffix(".part")
    scratch.write_text(_page(evaluation, cut, images, middle))
    scratch.replace(path)


def _page(evaluation: Evaluation, cut: Partition, images: Mapping[str, Path], middle: int) -> str:
    name = html.escape(Path(evaluation.config["run"]).name)
    facts = f"{cut.k} experts on {sum(cut.sizes)} pictures of {' × '.join(map(str, cut.shape))}, bundle {evaluation.versions['balanced'][:12]}."
    seen = "; ".join(f"{row} {count:,}" for row, count in evaluation.pictures_seen.items() if row in ("DDIM", "full"))
    fits = "".join(
        f"<tr><td>{html.escape(row)}</td><td></td><td>{fit.exponent:.2f}</td><td>{fit.constant:.3g}</td><td>{fit.r2:.3f}</td></tr>"
        for row, fit in evaluation.fits.items()
    )
    parts = [
        f"<h1>{name}</h1><p class=facts>{html.escape(facts)} Pictures seen in training: {seen}.</p>",
        _image(images, "balanced", f"64 pictures drawn with `balanced` in {middle} steps", pixels=True),
        "<h2>How good are the pictures?</h2>",
        f"<p>{evaluation.n} pictures a cell, all methods from the same noise, sampler {evaluation.config['sample']['sampler']}. "
        f"Features: {html.escape(evaluation.features)}. These are not the features of the literature's FID unless the name says so.</p>",
        *(_table(evaluation, *measure) for measure in _MEASURES),
        _image(images, "frechet", "Fréchet distance over steps"),
        "<h2>How far from the mixture's own path?</h2>",
        "<p>Mean square distance, a number of the data, between where a path ends and where the full mixture's "
        f"{evaluation.config['evaluate']['reference_steps']}-step path from the same noise ends, over {evaluation.config['evaluate']['trajectories']} paths; "
        "lines are power laws fitted in log E over log N.</p>",
        _image(images, "trajectory", "Trajectory error over steps with fitted power laws"),
        f"<table><tr><th>method<th><th>exponent p<th>constant C<th>R²</tr>{fits}</table>",
        "<h2>Who moves the pictures?</h2>",
        _image(images, "load", "Share of the calls by expert"),
        _image(images, "certainty", "Mean largest alpha over time"),
        f"<p>Four pictures drawn with <code>balanced</code> in {middle} steps: alpha over time, and the expert that moved each at every step.</p>",
        _image(images, "alpha", "Alpha over time for four pictures"),
        "<h2>The same noise, every method</h2>",
        f"<p>Rows from the top, {middle} steps: {', '.join(evaluation.versions)}. A column is one noise.</p>",
        _image(images, "methods", "One row a method", pixels=True),
        "<h2>The clusters</h2>",
        f"<p>Rows from the top: {html.escape('; '.join(f'{n} ({size})' for n, size in zip(cut.names, cut.sizes, strict=True)))}.</p>",
        _image(images, "clusters", "Pictures of each cluster", pixels=True),
        "<h2>Training</h2>",
        _image(images, "losses", "Training losses") if "losses" in images else "",
        "<h2>Configuration</h2>",
        f"<details><summary>config.yaml</summary><pre>{html.escape(yaml.safe_dump(evaluation.config, sort_keys=False))}</pre></details>",
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{name} — ddm report</title><style>{_CSS}</style><body>{''.join(parts)}</body></html>\n"
    )


def _table(evaluation: Evaluation, title: str, note: str, value: Callable[[Cell], float | None], form: str) -> str:
    steps = _steps(evaluation)
    if all(value(cell) is None for cell in evaluation.cells):
        return ""
    lower = note.endswith("lower is better")
    best = {}
    for n in steps:
        values = [v for cell in evaluation.cells if cell.steps == n and (v := value(cell)) is not None]
        best[n] = min(values) if lower else max(values)
    rows = []
    for name in evaluation.versions:
        cells = _row(evaluation, name)
        if all(value(cell) is None for cell in cells):
            continue
        numbers = "".join(f"<td{' class=best' if note.endswith('better') and value(c) == best[c.steps] else ''}>{_number(value(c), form)}</td>" for c in cells)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{_MEANING.get(name, '')}</td>{numbers}</tr>")
    said = note.format(real=_number(evaluation.real_confidence, ".3f"))
    head = "".join(f"<th>{n} steps" for n in steps)
    return f"<div class=scroll><table><caption>{title} <small>{said}</small></caption><tr><th>method<th>{head}</tr>{''.join(rows)}</table></div>"


def _image(images: Mapping[str, Path], name: str, alt: str, pixels: bool = False) -> str:
    data = base64.b64encode(images[name].read_bytes()).decode()
    return f"<p><img{' class=pixels' if pixels else ''} alt='{html.escape(alt)}' src='data:image/png;base64,{data}'></p>"


def _saved(path: Path, figure: Figure) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _steps(evaluation: Evaluation) -> list[int]:
    return sorted({cell.steps for cell in evaluation.cells})


def _row(evaluation: Evaluation, name: str) -> list[Cell]:
    return sorted((cell for cell in evaluation.cells if cell.method == name), key=lambda cell: cell.steps)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
