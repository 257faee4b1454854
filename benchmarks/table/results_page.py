"""A table's page, `NAME.md`, and its curves: a function of the record alone."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.lab.markdown import table
from benchmarks.table import paper
from benchmarks.table.contact_sheets import best, shown_steps
from ddm.artifacts import read_json, sha256, write_json
from train.evaluation import plots
from train.evaluation.methods import MEANING
from train.evaluation.report import shown
from train.evaluation.results import Cell, Evaluation, Score

_MEASURES: list[tuple[str, str, Callable[[Score], float], str]] = [
    (
        "KID × 1000",
        "unbiased at any number of images; lower is better",
        lambda score: 1000 * score.kid,
        ".2f",
    ),
    (
        "Coverage",
        "of real images by drawn ones; higher is better",
        lambda score: score.coverage,
        ".3f",
    ),
    ("Recall", "higher is better", lambda score: score.recall, ".3f"),
    ("Precision", "higher is better", lambda score: score.precision, ".3f"),
]


def write_page(path: Path) -> None:
    """Write the page and the curves of the record `path` beside it, and the curves' hashes into the record."""
    record = read_json(path)
    evaluation, name, folder = Evaluation.of(record), path.stem, path.parent
    curves = {f"{name}-trajectory.png": plots.trajectory(evaluation)}
    for features in evaluation.features:
        curves[f"{name}-{features}.png"] = plots.frechet(evaluation, features)
    for file, figure in curves.items():
        plots.save(folder / file, figure)
        record["files"][file] = sha256(folder / file)
    text = page(record, name)
    write_json(path, record)
    (folder / f"{name}.md").write_text(text)
    print(text)


def page(record: dict[str, Any], name: str) -> str:
    """The page as Markdown."""
    evaluation = Evaluation.of(record)
    parts = [_head(record, evaluation, name)]
    for features in evaluation.features:
        for sampler in evaluation.samplers:
            parts.append(_distances(evaluation, features, sampler))
        parts.append(f"![Fréchet distance over steps, {features}]({name}-{features}.png)")
    parts += [_claims(evaluation), _paper(evaluation, name), _trajectory(record, evaluation, name)]
    parts += [
        _images(record, evaluation, name),
        _other(evaluation),
        _made(record, evaluation, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def frechet(features: str) -> Callable[[Cell], float]:
    """The Frechet distance by these features, of a cell."""
    return lambda cell: cell.scores[features].frechet


def main_table(evaluation: Evaluation, features: str, sampler: str) -> str:
    """Frechet distances, methods down and steps across, with the NFE per image beside each."""
    rows = []
    for method in evaluation.versions:
        cells = [
            f"{shown(evaluation.over_seeds(method, n, frechet(features), sampler), '.2f')} "
            f"({shown(_only_mean(evaluation, method, n, sampler), '.0f')})"
            for n in evaluation.steps
        ]
        rows.append([f"**{method}**: {MEANING[method]}", *cells])
    return table(["", *(f"{n} steps" for n in evaluation.steps)], rows)


def _only_mean(evaluation: Evaluation, method: str, n: int, sampler: str) -> Any:
    found = evaluation.over_seeds(method, n, lambda cell: cell.calls, sampler)
    return found and found._replace(deviation=None)


def _head(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    cost, data, seen = record["compute"], record["data"], evaluation.images_seen
    tera = {
        part: f"{cost[part] / 1e12:,.1f}"
        for part in ("experts", "monolith", "router", "exact_targets")
    }
    expert, router = (
        f"{cost['parameters'][part] / 1e6:.2f}M parameters" for part in ("expert", "router")
    )
    shape = " × ".join(map(str, data["shape"]))
    together = next(count for method, count in seen.items() if method != "DDIM" or len(seen) == 1)
    return f"""# {name}

    {record["command"]}

{len(record["clusters"])} experts of {expert} on {data["images"]:,} images of {shape}. A cell: {evaluation.seeds} seeds of
{evaluation.n} images each, ± the standard deviation over the seeds; all methods from the same noise.

Training: the experts together saw {together:,} images ({tera["experts"]} TFLOP), the one model of the row DDIM, the same
network, {seen.get("DDIM", 0):,} ({tera["monolith"]} TFLOP). The router, for which DDIM has no use, took
{tera["router"]} TFLOP more in its networks ({router}), {100 * cost["router"] / cost["experts"]:.0f} % of the experts', and
{tera["exact_targets"]} TFLOP of float64 products in the exact targets that it learns from.

**These distances are not the FID of the literature**, which is by Inception and over 50,000 images: each is by the features
that are named, and can be compared only with others on this page."""


def _distances(evaluation: Evaluation, features: str, sampler: str) -> str:
    of, settings = evaluation.features[features], evaluation.samplers[sampler]
    return f"""## Fréchet distance by {features}, sampler {sampler}

By {of.what}, to {of.reference}. `sampler={settings["sampler"]} grid={settings["grid"]}`.
Lower is better; in brackets the NFE per image.

{main_table(evaluation, features, sampler)}"""


def difference(
    evaluation: Evaluation, a: str, b: str, n: int, features: str, sampler: str
) -> tuple[float, float | None]:
    """The Frechet distance of method a less that of b, seed by seed: mean, and standard deviation where there are several."""
    by_seed: dict[int, dict[str, float]] = {}
    for cell in evaluation.cells:
        if (cell.steps, cell.sampler) == (n, sampler) and cell.method in (a, b):
            by_seed.setdefault(cell.seed, {})[cell.method] = frechet(features)(cell)
    found = [values[a] - values[b] for values in by_seed.values()]
    return mean(found), stdev(found) if len(found) > 1 else None


def _claims(evaluation: Evaluation) -> str:
    pairs = [
        ("balanced", "MoG-da", "error feedback against drawing at random, the same alpha"),
        ("balanced-cv", "MoG-da", "and with Gaussians standing in"),
        ("balanced-cv", "full", "one expert a step against all"),
        ("MoG-da", "MoG-a", "integrated alpha against the posterior net's"),
        ("MoG-da", "Naive", "mixing against one expert kept"),
        ("Naive", "DDIM", "experts without a router against one model of the same compute"),
        ("balanced-cv", "DDIM", "and routed, one expert a step"),
    ]
    text = []
    for features in evaluation.features:
        for sampler in evaluation.samplers:
            rows = []
            for a, b, what in pairs:
                if {a, b} <= set(evaluation.versions):
                    found = [
                        difference(evaluation, a, b, n, features, sampler) for n in evaluation.steps
                    ]
                    rows.append([f"{a} − {b}: {what}", *map(_signed, found)])
            if "DDIM" in evaluation.versions:
                names = [(n, best(evaluation, n, features, sampler)) for n in evaluation.steps]
                cells = [
                    f"{_signed(difference(evaluation, name, 'DDIM', n, features, sampler))} ({name})"
                    for n, name in names
                    if name is not None
                ]
                if cells:
                    rows.append(["the best routed with one expert a step − DDIM", *cells])
            head = [f"{features}, {sampler}", *(f"{n} steps" for n in evaluation.steps)]
            text.append(table(head, rows))
    return (
        "## Who beats whom\n\nDifferences of Fréchet distances, taken seed by seed; below 0 the first is better.\n\n"
        + "\n\n".join(text)
    )


def _signed(difference: tuple[float, float | None]) -> str:
    value, deviation = difference
    return f"{value:+.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _paper(evaluation: Evaluation, name: str) -> str:
    fid = next((table_ for data, table_ in paper.FID.items() if name.startswith(data)), None)
    if fid is None:
        return ""
    rows = [[method, *(f"{value:.2f}" for value in values)] for method, values in fid.items()]
    return (
        "## What the paper reports\n\nFID by Inception, networks of 35.7M parameters, 200,000 steps of batch 128 on 8 A800. "
        "To be compared in its order, not in its numbers.\n\n"
        + table(["", *(f"{n} steps" for n in paper.STEPS)], rows)
    )


def _trajectory(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    steps, paths = (record["config"][f"table.{key}"] for key in ("reference_steps", "trajectories"))
    text = [
        f"""## How far from the mixture's own path

E(N): the mean square distance, a number of the data, between where a path of N steps ends and where the full mixture's path of
{steps} steps from the same noise ends, over {paths} paths; fitted as E(N) = C N^-p. The paper claims better than first
order, p > 1."""
    ]
    for sampler in evaluation.samplers:
        rows = []
        for method, fits in evaluation.fits.items():
            fit = fits[sampler]
            errors = (
                shown(
                    evaluation.over_seeds(method, n, lambda cell: cell.trajectory_error, sampler),
                    ".2g",
                )
                for n in evaluation.steps
            )
            rows.append(
                [method, *errors, f"{fit.exponent:.2f}", f"{fit.constant:.2g}", f"{fit.r2:.3f}"]
            )
        text.append(table([sampler, *(f"E({n})" for n in evaluation.steps), "p", "C", "R²"], rows))
    text.append(f"![Trajectory error over steps]({name}-trajectory.png)")
    return "\n\n".join(text)


def _images(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    few, middle, sampler = (
        evaluation.steps[0],
        shown_steps(evaluation),
        next(iter(evaluation.samplers)),
    )
    rows = "\n\n".join(
        f"{n} steps of {sampler}; a column is one noise.\n\n![Every method at {n} steps]({name}-methods-{n}.png)"
        for n in sorted({few, middle})
    )
    return f"""## The images

None of them chosen: the first of seed 0.

{rows}

{record["shown"]}, {middle} steps of {sampler}:

![Drawn images]({name}-images.png)

Real ones:

![Real images]({name}-real.png)"""


def _other(evaluation: Evaluation) -> str:
    sampler, text = next(iter(evaluation.samplers)), []
    for features in evaluation.features:
        for title, note, value, form in _MEASURES:
            rows = [
                [method, *_measured(evaluation, method, features, sampler, value, form)]
                for method in evaluation.versions
            ]
            head = [f"{title}, {features}", *(f"{n} steps" for n in evaluation.steps)]
            text.append(f"{title}: {note}.\n\n{table(head, rows)}")
    return f"## Other measures, sampler {sampler}\n\n" + "\n\n".join(text)


def _measured(
    evaluation: Evaluation,
    method: str,
    features: str,
    sampler: str,
    value: Callable[[Score], float],
    form: str,
) -> list[str]:
    """One method's row of a measure: a cell for each number of steps."""

    def of_cell(cell: Cell) -> float:
        return value(cell.scores[features])

    return [
        shown(evaluation.over_seeds(method, n, of_cell, sampler), form) for n in evaluation.steps
    ]


def _made(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    machine, config = record["machine"], record["config"]
    bundles = ", ".join(
        f"`{version[:12]}`" for version in sorted(set(evaluation.versions.values()))
    )
    files = "; ".join(
        f"{name}: {f'`{of.file[:12]}`' if of.file else 'trained on the spot'}"
        for name, of in evaluation.features.items()
    )
    packages = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device")
    training = f"{config['expert.steps']:,} steps of batch {config['expert.batch']}, EMA {config['expert.ema_decay']}"
    return f"""## How it was made

On {machine["device"]}; {packages}. An expert: {training}, {config["expert.precision"]}; drawn in {evaluation.precision}.
Bundles {bundles}; partition `{record["data"]["partition"][:12]}`; config `{record["config_hash"][:12]}`; features {files}.
[The record]({name}.json) holds every figure, seed by seed, and the hashes of everything."""
