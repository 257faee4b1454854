"""`report.html`, a self-contained file, and the tables of the terminal."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ddm.artifacts import replaced
from ddm.partition import Partition
from router.policies import policy
from serve.model.images import contact_sheet, write_png
from train.evaluation import plots
from train.evaluation.results import Cell, Evaluation, Spread, clear_best
from train.evaluation.rows import ONE_MODEL, ROWS
from train.evaluation.samples import SampleSet


class _Measure(NamedTuple):
    title: str
    note: str
    value: Callable[[Cell, str], float | None]  # of a cell, with the features of this name
    form: str
    sign: float | None  # 1 if the smallest is best, -1 if the largest, None if none is
    by_features: bool = True  # whether each feature network has its own figures


_FRECHET = _Measure(
    "Fréchet distance",
    "lower is better",
    lambda cell, features: cell.scores[features].frechet,
    ".2f",
    1,
)
_ERROR = _Measure(
    "Trajectory error E(N)",
    "lower is better",
    lambda cell, _: cell.trajectory_error,
    ".4f",
    1,
    by_features=False,
)
_CONFIDENCE = _Measure(
    "Mean confidence of the classifier",
    "",
    lambda cell, features: cell.scores[features].confidence,
    ".3f",
    None,
)
_MEASURES = [
    _FRECHET,
    _Measure(
        "KID × 1000",
        "lower is better",
        lambda cell, features: 1000 * cell.scores[features].kid,
        ".2f",
        1,
    ),
    _Measure(
        "Coverage",
        "of the real images by the samples; higher is better",
        lambda cell, features: cell.scores[features].coverage,
        ".3f",
        -1,
    ),
    _Measure(
        "Inception score",
        "higher is better",
        lambda cell, features: cell.scores[features].inception_score,
        ".2f",
        -1,
    ),
    _CONFIDENCE,
    _ERROR,
    _Measure("NFE per image", "", lambda cell, _: cell.nfe, ".0f", None, by_features=False),
]
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .3rem 0 .8rem; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
.name { text-align: left; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
caption small, .facts { font-weight: 400; color: #555; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2rem; } .tables > div { max-width: 100%; }
.best { font-weight: 700; } img { max-width: 100%; } .scroll { overflow-x: auto; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def print_tables(evaluation: Evaluation) -> None:
    """Print the Frechet distances, for each feature network, and the trajectory errors."""
    console = Console(width=100)
    for features in evaluation.features:
        console.print(_terminal_table(evaluation, _FRECHET, "NFE per step", _nfe, features))
        console.print(floor_line(evaluation, features), style="dim", soft_wrap=True)
    console.print(_terminal_table(evaluation, _ERROR, "falls as", _exponent, ""))
    for method in evaluation.versions:
        line = _classes_line(evaluation, method, _middle(evaluation.steps))
        if line is not None:
            console.print(line, soft_wrap=True)
    several = evaluation.seeds > 1
    seeds = f" and seed, {evaluation.seeds} seeds, ± the standard deviation" if several else ""
    console.print(f"{evaluation.n} images per cell{seeds}", style="dim")


def floor_line(evaluation: Evaluation, features: str) -> str:
    """What the features are, and the distance of as many real images."""
    line = f"{features}: {evaluation.features[features].what}"
    floor = evaluation.floor(features)
    if floor is None:
        return line
    return f"{line}; {evaluation.n} real images have {shown(floor, '.2f')}"


def _terminal_table(
    evaluation: Evaluation,
    measure: _Measure,
    last_column: str,
    last: Callable[[Evaluation, str], str],
    features: str,
) -> Table:
    """One measure with a row per method that it was measured for, and one more column."""
    steps = evaluation.steps
    by = f" by {features}" if measure.by_features else ""
    title = f"{measure.title}{by}, {measure.note}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("method")
    for column in [*(f"{n} steps" for n in steps), last_column]:
        table.add_column(column, justify="right")
    columns = [_column(evaluation, measure, n, features) for n in steps]
    for method in evaluation.versions:
        if any(column[method] is not None for column in columns):
            cells = [_terminal_cell(column, method, measure) for column in columns]
            table.add_row(method, *cells, last(evaluation, method))
    return table


def _column(
    evaluation: Evaluation, measure: _Measure, steps: int, features: str
) -> dict[str, Spread | None]:
    """A measure of every method at a number of steps."""

    def value(cell: Cell) -> float | None:
        return measure.value(cell, features)

    return {name: evaluation.over_seeds(name, steps, value) for name in evaluation.versions}


def _terminal_cell(column: Mapping[str, Spread | None], name: str, measure: _Measure) -> str:
    text = shown(column[name], measure.form)
    return f"[bold]{text}[/bold]" if _is_best(column, name, measure) else text


def _is_best(column: Mapping[str, Spread | None], name: str, measure: _Measure) -> bool:
    return measure.sign is not None and clear_best(column, measure.sign) == name


def _nfe(evaluation: Evaluation, method: str) -> str:
    return f"{evaluation.nfe_per_step(method):.3g}"


def _exponent(evaluation: Evaluation, method: str) -> str:
    fit = evaluation.fits[method][next(iter(evaluation.samplers))]
    return f"N^{-fit.exponent:.2f}"


def _classes_line(evaluation: Evaluation, method: str, steps: int) -> str | None:
    """How a classifier sees a method's samples; None without a classifier."""
    wanted = (method, steps)
    cell = next((c for c in evaluation.cells if (c.method, c.steps) == wanted), None)
    for name, real in evaluation.features.items():
        if cell is not None and real.real_confidence and real.real_class_frequencies:
            score = cell.scores[name]
            assert score.confidence is not None
            assert score.class_frequencies is not None
            pairs = zip(score.class_frequencies, real.real_class_frequencies, strict=True)
            ratios = [found / expected for found, expected in pairs if expected > 0]
            return (
                f"{method:10} at {steps} steps: mean confidence of the classifier is "
                f"{score.confidence / real.real_confidence:.3f} times that on unseen real images; "
                f"classes occur {min(ratios):.2f} to {max(ratios):.2f} times as often"
            )
    return None


def _middle(steps: Sequence[int]) -> int:
    """The number of steps that images are shown at: the closest to 25."""
    return min(steps, key=lambda n: abs(n - 25))


def shown(value: Spread | None, form: str) -> str:
    """A measure as text, with its standard deviation over the seeds if there are several."""
    if value is None:
        return "–"
    spread = f" ± {value.deviation:{form}}" if value.deviation else ""
    return f"{value.mean:{form}}{spread}"


def write_report(
    path: Path, evaluation: Evaluation, samples: Mapping[tuple[str, int], SampleSet]
) -> None:
    """Write `report.html`, its images also to `evaluate/plots/`; `samples` by method and steps."""
    folder = path.parent
    plotted = folder / "evaluate" / "plots"
    cut = Partition.read(folder / "partition")
    middle = _middle(evaluation.steps)
    rows = {name: samples[name, middle] for name in evaluation.methods_at(middle)}
    _write_plots(plotted, folder, evaluation, cut, rows)
    sheets = {
        "images": rows[_shown_method(evaluation)].images[:48].split(12),
        "methods": [one.images[:12] for one in rows.values()],
        "clusters": [cut.cluster(folder / "partition", k)["images"][:12] for k in range(cut.k)],
    }
    for name, sheet in sheets.items():
        write_png(plotted / f"{name}.png", contact_sheet(sheet, least_side=64))
    with replaced(path) as scratch:
        scratch.write_text(_page(evaluation, cut, plotted, middle), encoding="utf-8")


def _shown_method(evaluation: Evaluation) -> str:
    """The method whose samples are shown: the run's own way of sampling, if it has a row."""
    sample = evaluation.config["sample"]
    names = evaluation.methods_at(_middle(evaluation.steps))
    for name in names:
        row = ROWS[name]
        # A policy that keeps its experts has no control variate, whatever the config says.
        control = policy(row.policy).keeps or row.control_variate == sample["control_variate"]
        if row.policy == sample["policy"] and control and row.source in (None, sample["source"]):
            return name
    return names[0]


def _write_plots(
    plotted: Path,
    folder: Path,
    evaluation: Evaluation,
    cut: Partition,
    rows: Mapping[str, SampleSet],
) -> None:
    routed = {name: one for name, one in rows.items() if name not in (*ONE_MODEL, "full")}
    followed = {name: one for name, one in rows.items() if ROWS[name].routed_one}
    figures = {
        **{f"frechet-{name}": plots.frechet(evaluation, name) for name in evaluation.features},
        "trajectory": plots.trajectory(evaluation),
        "load": plots.load(routed or rows, cut.names, cut.pi.tolist()),
        "certainty": plots.certainty(followed or rows),
        "alpha": plots.alpha_over_time(rows[_shown_method(evaluation)], cut.names),
        "losses": plots.losses(folder),
    }
    for name, figure in figures.items():
        plots.save(plotted / f"{name}.png", figure)


def _page(evaluation: Evaluation, cut: Partition, plotted: Path, middle: int) -> str:
    name = html.escape(Path(evaluation.config["run"]).name)
    parts = [
        *_head_parts(evaluation, cut, plotted, middle, name),
        *_quality_parts(evaluation, plotted),
        *_trajectory_parts(evaluation, plotted),
        *_expert_parts(evaluation, plotted, middle),
        *_image_parts(evaluation, cut, plotted, middle),
        "<h2>Training</h2>",
        _image(plotted, "losses", "Training losses"),
        "<details><summary>config.yaml</summary>"
        f"<pre>{html.escape(yaml.safe_dump(evaluation.config, sort_keys=False))}</pre></details>",
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{name}: ddm report</title><style>{_CSS}</style><body>"
        f"{''.join(parts)}</body></html>\n"
    )


def _head_parts(
    evaluation: Evaluation, cut: Partition, plotted: Path, middle: int, name: str
) -> list[str]:
    *_, last = evaluation.versions
    seen = evaluation.images_seen
    trained = f"Images seen in training: {seen[last]:,}"
    if last not in ONE_MODEL:
        trained += " by all experts together"
        trained += "".join(f", {seen[row]:,} by {row}" for row in ONE_MODEL if row in seen)
    experts = "1 expert" if cut.k == 1 else f"{cut.k} experts"
    shape = " × ".join(map(str, cut.shape))
    method = _shown_method(evaluation)
    return [
        f"<h1>{name}</h1>",
        f"<p class=facts>{experts}, {sum(cut.sizes):,} images of {shape}; "
        f"bundle {evaluation.versions[last][:12]}. {trained}.</p>",
        _image(plotted, "images", f"Samples of {method} in {middle} steps"),
        f"<p class=facts>Samples of {method} in {middle} steps.</p>",
    ]


def _quality_parts(evaluation: Evaluation, plotted: Path) -> list[str]:
    sampler = next(iter(evaluation.samplers))
    several = evaluation.seeds > 1
    seeds = f" for each of {evaluation.seeds} seeds, ± the standard deviation" if several else ""
    spaces = "".join(
        f"<li>{html.escape(name)}: {html.escape(of.what)}; distances are to "
        f"{html.escape(of.reference)}</li>"
        for name, of in evaluation.features.items()
    )
    rows = "".join(f"<li>{name}: {ROWS[name].meaning}</li>" for name in evaluation.versions)
    nfe = ", ".join(f"{name} {_nfe(evaluation, name)}" for name in evaluation.versions)
    return [
        "<h2>Image quality</h2>",
        f"<p>{evaluation.n} images per cell{seeds}; all methods start from the same noise; "
        f"sampler {sampler}. In bold: what is best by more than the spread over the seeds. "
        f"Figures made with different features are not comparable. NFE per step: {nfe}.</p>",
        f"<ul class=facts>{spaces}</ul><ul class=facts>{rows}</ul>",
        *(_tables(evaluation, measure) for measure in _MEASURES),
        *(
            _image(plotted, f"frechet-{name}", f"Fréchet distance by {name} over steps")
            for name in evaluation.features
        ),
    ]


def _trajectory_parts(evaluation: Evaluation, plotted: Path) -> list[str]:
    if not evaluation.fits:
        return []
    sampler = next(iter(evaluation.samplers))
    cfg = evaluation.config["evaluate"]
    fits = "".join(
        f"<tr><td class=name>{row}</td><td>{fit.exponent:.2f}</td>"
        f"<td>{fit.constant:.3g}</td><td>{fit.r2:.3f}</td></tr>"
        for row, by_sampler in evaluation.fits.items()
        for fit in [by_sampler[sampler]]
    )
    return [
        "<h2>Distance from the full mixture's trajectories</h2>",
        "<p>E(N) is the mean squared difference per pixel value between the final images of a "
        "method in N steps and those of the full mixture in "
        f"{cfg['reference_steps']} steps from the same noise, over "
        f"{cfg['trajectories']} trajectories. "
        "Lines are power laws E(N) = C N<sup>−p</sup>, fitted to log E over log N.</p>",
        _image(plotted, "trajectory", "Trajectory error over steps with fitted power laws"),
        "<div class=scroll><table><tr><th class=name>method<th>p<th>C<th>R²</tr>"
        f"{fits}</table></div>",
    ]


def _expert_parts(evaluation: Evaluation, plotted: Path, middle: int) -> list[str]:
    return [
        "<h2>Which experts are evaluated</h2>",
        f"<p>At {middle} steps: the fraction of all NFE that each expert has, beside its mixture "
        "weight pi.</p>",
        _image(plotted, "load", "Fraction of all NFE by expert"),
        "<p>The largest alpha, averaged over the images.</p>",
        _image(plotted, "certainty", "Mean of the largest alpha over time"),
        f"<p>Four images of {_shown_method(evaluation)}: alpha over time, and the expert that "
        "updated the image at each step.</p>",
        _image(plotted, "alpha", "Alpha over time for four images"),
    ]


def _image_parts(evaluation: Evaluation, cut: Partition, plotted: Path, middle: int) -> list[str]:
    pairs = zip(cut.names, cut.sizes, strict=True)
    clusters = "; ".join(f"{cluster} ({size:,} images)" for cluster, size in pairs)
    return [
        "<h2>The same noise, every method</h2>",
        f"<p>Rows from the top, at {middle} steps: {', '.join(evaluation.methods_at(middle))}. "
        "The images of a column start from the same noise.</p>",
        _image(plotted, "methods", "One row per method"),
        "<h2>The clusters</h2>",
        f"<p>Rows from the top: {html.escape(clusters)}.</p>",
        _image(plotted, "clusters", "Images of each cluster"),
    ]


def _tables(evaluation: Evaluation, measure: _Measure) -> str:
    """One measure, for each feature network that it was measured with, side by side."""
    names = list(evaluation.features)
    tables = [
        _table(evaluation, measure, name) for name in names[: None if measure.by_features else 1]
    ]
    return f"<div class=tables>{''.join(tables)}</div>"


def _table(evaluation: Evaluation, measure: _Measure, features: str) -> str:
    """One measure with a row per method and a column per number of steps.

    What is best beyond the spread over the seeds is in bold. Empty if it was not measured.
    """
    steps = evaluation.steps
    columns = [_column(evaluation, measure, n, features) for n in steps]
    rows = []
    for name in evaluation.versions:
        if all(column[name] is None for column in columns):
            continue
        cells = []
        for column in columns:
            best = " class=best" if _is_best(column, name, measure) else ""
            cells.append(f"<td{best}>{shown(column[name], measure.form)}</td>")
        meaning = html.escape(ROWS[name].meaning, quote=True)
        rows.append(f"<tr><td class=name title='{meaning}'>{name}</td>{''.join(cells)}</tr>")
    if not rows:
        return ""
    by = f" by {html.escape(features)}" if measure.by_features else ""
    note = _note(evaluation, measure, features)
    caption = f"<caption>{measure.title}{by} <small>{note}</small></caption>"
    columns_head = "".join(f"<th>{n} steps" for n in steps)
    head = f"<tr><th class=name>method{columns_head}</tr>"
    return f"<div class=scroll><table>{caption}{head}{''.join(rows)}</table></div>"


def _note(evaluation: Evaluation, measure: _Measure, features: str) -> str:
    real = evaluation.features[features].real_confidence
    floor = evaluation.floor(features)
    if measure is _CONFIDENCE and real is not None:
        return f"on real images that it was not trained on: {real:.3f}"
    if measure is _FRECHET and floor is not None:
        return f"{measure.note}; {evaluation.n} real images have {shown(floor, '.2f')}"
    return measure.note


def _image(plotted: Path, name: str, alt: str) -> str:
    data = base64.b64encode((plotted / f"{name}.png").read_bytes()).decode()
    return f"<p><img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'></p>"
