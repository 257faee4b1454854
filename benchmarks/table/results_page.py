"""A table's page, `NAME.md`, and its curves: a function of the record alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.markdown import table
from benchmarks.table import paper
from benchmarks.table.contact_sheets import best_single, shown_steps
from ddm.artifacts import read_json, sha256, write_json
from train.evaluation import plots
from train.evaluation.results import Cell, Evaluation, Score, Spread, clear_best
from train.evaluation.rows import ONE_MODEL, ROWS
from train.evaluation.tables import copies_intro, copies_rows, copy_measures, floor_line, shown
from train.time_spent import duration

_MEASURES: list[tuple[str, str, Callable[[Score], float], str]] = [
    (
        "KID × 1000",
        "unbiased for any number of images; lower is better",
        lambda score: 1000 * score.kid,
        ".2f",
    ),
    (
        "Coverage",
        "the fraction of real images with a sample nearby; higher is better",
        lambda score: score.coverage,
        ".3f",
    ),
    ("Recall", "higher is better", lambda score: score.recall, ".3f"),
    ("Precision", "higher is better", lambda score: score.precision, ".3f"),
]

COMPARISONS = [
    ("switching", "MoG-a", "redraws at a Poisson process's times against one per step"),
    ("switching", "balanced", "the same against error feedback"),
    ("switching", "full", "one expert per step against all"),
    ("switching", "Naive", "redraws against one expert kept"),
    (
        "switching",
        "one-model",
        "routed experts, one per step, against one model of the same compute",
    ),
    (
        "switching",
        "one-model-time",
        "the same against one model trained for as long as one expert",
    ),
    ("switching-gaussian", "MoG-a", "no router against a router and one redraw per step"),
    ("balanced", "MoG-da", "error feedback against independent draws, the same alpha"),
    ("balanced-cv", "MoG-da", "the same with the control variate"),
    ("balanced-cv", "full", "one expert per step against all"),
    ("MoG-da", "MoG-a", "integrated alpha against the posterior net's"),
    ("MoG-da", "Naive", "mixing against one expert kept"),
    ("Naive", "one-model", "experts without a router against one model of the same compute"),
    ("balanced-cv", "one-model", "routed experts, one per step, against that model"),
]


def write_page(path: Path) -> None:
    """Write the page and the curves of the record `path` beside it, and the curves' hashes into the
    record.
    """
    record = read_json(path)
    evaluation = Evaluation.of(record)
    name = path.stem
    curves = {f"{name}-trajectory.png": plots.trajectory(evaluation)}
    for features in evaluation.features:
        curves[f"{name}-{features}.png"] = plots.frechet(evaluation, features)
    for file, figure in curves.items():
        plots.save(path.parent / file, figure)
        record["files"][file] = sha256(path.parent / file)
    text = page(record, name)
    write_json(path, record)
    path.with_name(f"{name}.md").write_text(text)
    print(text)


def page(record: dict[str, Any], name: str) -> str:
    """The page as Markdown."""
    evaluation = Evaluation.of(record)
    parts = [_head(record, evaluation, name)]
    parts += [_distances(evaluation, sampler) for sampler in evaluation.samplers]
    parts += [
        f"![Fréchet distance over steps, {features}]({name}-{features}.png)"
        for features in evaluation.features
    ]
    parts += [
        _comparisons(evaluation),
        _paper(name),
        _trajectory(record, evaluation, name),
        _images(record, evaluation, name),
        _copies(evaluation),
        _other(evaluation),
        _provenance(record, evaluation, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def frechet(features: str) -> Callable[[Cell], float]:
    """The Fréchet distance of a cell, in these features."""
    return lambda cell: cell.scores[features].frechet


def earlier(record: dict[str, Any]) -> str:
    """What a record that has been overtaken says of itself, as a paragraph; empty otherwise."""
    why = record.get("earlier")
    return f"**Measured by an earlier version of the program**: {why}\n\n" if why else ""


def main_table(evaluation: Evaluation, sampler: str) -> str:
    """Fréchet distances: a row per method, a column per step count, two feature spaces side by side.

    In bold: what is best by more than the spread. Below: the distance of as many real images, and
    what the methods are.
    """
    names = list(evaluation.features)
    tables = [_pair(evaluation, names[i : i + 2], sampler) for i in range(0, len(names), 2)]
    floors = [f"{floor_line(evaluation, features)}." for features in names]
    rows = [f"**{method}**: {ROWS[method].meaning}." for method in evaluation.versions]
    return "\n\n".join([*tables, "\n".join(_items(floors)), "\n".join(_items(rows))])


def _pair(evaluation: Evaluation, names: Sequence[str], sampler: str) -> str:
    """The table of some feature spaces."""
    steps = evaluation.steps
    columns = {
        (features, n): {
            method: evaluation.over_seeds(method, n, frechet(features), sampler)
            for method in evaluation.versions
        }
        for features in names
        for n in steps
    }
    best = {place: clear_best(column) for place, column in columns.items()}
    rows = []
    for method in evaluation.versions:
        row = [method, f"{evaluation.nfe_per_step(method, sampler):.3g}"]
        for place, column in columns.items():
            text = shown(column[method], ".2f")
            row.append(f"**{text}**" if best[place] == method else text)
        rows.append(row)
    head = [f"{features}: {steps[0]} steps" for features in names]
    titles = []
    for title in head:
        titles += [title, *map(str, steps[1:])]
    return table(["", "NFE per step", *titles], rows)


def overview(folder: Path) -> str:
    """The mixture beside the two single models: a row for each table of a folder and each of its
    feature spaces, after 10 steps of its first sampler.
    """
    methods = ("switching", "one-model-time", "one-model")
    rows = []
    for file in sorted(folder.glob("*.json")):
        record = read_json(file)
        if "cells" not in record:
            continue
        evaluation = Evaluation.of(record)
        for features in evaluation.features:
            found = [evaluation.over_seeds(method, 10, frechet(features)) for method in methods]
            spreads = [*found, evaluation.floor(features)]
            rows.append([file.stem, features, *(shown(spread, ".2f") for spread in spreads)])
    titles = ["`switching`", "one model, equal time", "one model, equal compute", "real images"]
    return table(["", "features", *titles], rows)


def _items(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def difference(
    evaluation: Evaluation, a: str, b: str, n: int, features: str, sampler: str
) -> Spread | None:
    """The Fréchet distance of method a minus that of b, per seed; None if it was not measured."""
    by_seed: dict[int, dict[str, float]] = {}
    for cell in evaluation.cells:
        if (cell.steps, cell.sampler) == (n, sampler) and cell.method in (a, b):
            by_seed.setdefault(cell.seed, {})[cell.method] = frechet(features)(cell)
    both = [values for values in by_seed.values() if len(values) > 1]
    return Spread.of([values[a] - values[b] for values in both]) if both else None


def _step_columns(evaluation: Evaluation) -> list[str]:
    return [f"{n} steps" for n in evaluation.steps]


def _head(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    data, size = record["data"], record["compute"]["parameters"]["expert"]
    shape = " × ".join(map(str, data["shape"]))
    return f"""# {name}

    {record["command"]}

{earlier(record)}{len(record["clusters"])} experts of {_millions(size)} on {data["images"]:,} images of {shape}.
Each cell is over {evaluation.seeds} seeds of {evaluation.n} images, ± the standard deviation over
the seeds; all methods start from the same noise.

{_training(record, evaluation)}

**These distances are not the FID of the literature**, which uses Inception features and 50,000
images. Each distance uses the named features and can be compared only with others on this page."""


def _training(record: dict[str, Any], evaluation: Evaluation) -> str:
    """What training the experts, the single models and the router took, the seed model counted."""
    cost, spent, seen = record["compute"], record.get("seconds", {}), evaluation.images_seen
    together = next((n for method, n in seen.items() if method not in ONE_MODEL), None)
    images = {"experts": together or next(iter(seen.values()))}
    images |= {row: seen[row] for row in ONE_MODEL if row in seen}
    seeded = ["seed_model"] if cost.get("seed_model") else []

    def row(title: str, images: str, *parts: str) -> list[str]:
        known = set(parts) <= set(spent)
        time = duration(sum(spent[part] for part in parts)) if known else "not known"
        return [title, images, _tera(sum(cost[part] for part in parts)), *([time] if spent else [])]

    rows = [row(part, f"{count:,}", *seeded, part) for part, count in images.items()]
    rows.append(row("router", "", "router"))
    router, products = _millions(cost["parameters"]["router"]), _tera(cost["exact_targets"])
    notes = [
        f"The router has {router} and needs another {products} TFLOP of float64 products for its exact targets.",
        "One model needs no router, nor do Naive and `switching-gaussian`.",
    ]
    if seeded:
        _, _, tera, *time = row("", "", *seeded)
        seed = ", ".join([f"{tera} TFLOP", *time])
        notes.insert(0, f"The seed model is counted for each that starts from it: {seed}.")
    if spent:
        notes.append(
            "Times are those of each network's own process, added up: experts that are trained side by "
            "side have fewer threads each, and take less together."
        )
    head = ["trained", "images seen", "TFLOP", *(["time"] if spent else [])]
    return "\n\n".join([table(head, rows), "\n".join(notes)])


def _tera(count: float) -> str:
    return f"{count / 1e12:,.1f}" if count >= 1e12 else f"{count / 1e12:.2g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M parameters"


def _distances(evaluation: Evaluation, sampler: str) -> str:
    settings = evaluation.samplers[sampler]
    references = {features: of.reference for features, of in evaluation.features.items()}
    to = "; ".join(f"{features}: {reference}" for features, reference in references.items())
    return f"""## Fréchet distance, sampler {sampler}

`sampler={settings["sampler"]} grid={settings["grid"]}`.
Lower is better; ± is the standard deviation over the seeds. In bold: what is best by more than the
spread, so that no other interval of a column meets its own. Distances are to {to}.

{main_table(evaluation, sampler)}"""


def _comparisons(evaluation: Evaluation) -> str:
    intro = """## Comparisons

Differences of Fréchet distances per seed; below 0 the first is better."""
    tables = [
        _comparison(evaluation, features, sampler)
        for features in evaluation.features
        for sampler in evaluation.samplers
    ]
    return "\n\n".join([intro, *tables])


def _comparison(evaluation: Evaluation, features: str, sampler: str) -> str:
    def between(a: str, b: str, n: int) -> str:
        return signed(difference(evaluation, a, b, n, features, sampler))

    rows = []
    for a, b, what in COMPARISONS:
        if {a, b} <= set(evaluation.versions):
            rows.append([f"{a} − {b}: {what}", *(between(a, b, n) for n in evaluation.steps)])
    alone = ONE_MODEL[0]
    if alone in evaluation.versions:
        cells = []
        for n in evaluation.steps:
            best = best_single(evaluation, n, features, sampler)
            if best is not None:
                cells.append(f"{between(best, alone, n)} ({best})")
        if cells:
            rows.append([f"the best routed method with one expert per step − {alone}", *cells])
    return table([f"{features}, {sampler}", *_step_columns(evaluation)], rows)


def signed(difference: Spread | None) -> str:
    """A difference with its sign and deviation; a dash if it was not measured."""
    if difference is None:
        return "–"
    value, deviation = difference
    return f"{value:+.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _paper(name: str) -> str:
    fid = next((methods for data, methods in paper.FID.items() if name.startswith(data)), None)
    if fid is None:
        return ""
    rows = [[method, *(f"{value:.2f}" for value in values)] for method, values in fid.items()]
    return f"""## What the paper reports

FID by Inception, networks of 35.7M parameters, 200,000 steps of batch 128 on 8 A800. Compare the
order of the methods, not the numbers.

{table(["", *(f"{n} steps" for n in paper.STEPS)], rows)}"""


def _trajectory(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    reference_steps = record["config"]["table.reference_steps"]
    paths = record["config"]["table.trajectories"]
    intro = f"""## Distance from the mixture's trajectory

E(N): the mean square distance, per coordinate, between the end of a trajectory of N steps and the
end of the full mixture's trajectory of {reference_steps} steps from the same noise, over {paths}
trajectories; fitted as E(N) = C N^-p, where the paper claims p > 1. E is a squared distance: that of a
first-order sampler falls with p = 2. Rows that follow an expert's own path, as `switching` and Naive
do, do not end where the mixture's path does, and their p says little."""
    tables = [_trajectory_table(evaluation, sampler) for sampler in evaluation.samplers]
    image = f"![Trajectory error over steps]({name}-trajectory.png)"
    return "\n\n".join([intro, *tables, image])


def _trajectory_table(evaluation: Evaluation, sampler: str) -> str:
    rows = []
    for method, fits in evaluation.fits.items():
        fit = fits[sampler]
        errors = [
            evaluation.over_seeds(method, n, lambda cell: cell.trajectory_error, sampler)
            for n in evaluation.steps
        ]
        row = [method, *(shown(error, ".2g") for error in errors)]
        rows.append([*row, f"{fit.exponent:.2f}", f"{fit.constant:.2g}", f"{fit.r2:.3f}"])
    columns = [f"E({n})" for n in evaluation.steps]
    return table([sampler, *columns, "p", "C", "R²"], rows)


def _images(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    middle = shown_steps(evaluation)
    sampler = next(iter(evaluation.samplers))
    sheets = [
        f"{n} steps of {sampler}; each column starts from the same noise.\n\n"
        f"![Every method at {n} steps]({name}-methods-{n}.png)"
        for n in sorted({evaluation.steps[0], middle})
    ]
    rows = "\n\n".join(sheets)
    return f"""## The images

Not selected: the first ones of seed 0.

{rows}

{record["shown"]}, {middle} steps of {sampler}:

![Samples]({name}-images.png){_real_images(name, record)}"""


def _real_images(name: str, record: dict[str, Any]) -> str:
    """None where they may not be passed on."""
    file = f"{name}-real.png"
    return f"\n\nReal images:\n\n![Real images]({file})" if file in record["files"] else ""


def _copies(evaluation: Evaluation) -> str:
    """Whether samples are copies of training images; empty in an older record."""
    found = evaluation.memorization
    if found is None:
        return ""
    measures = copy_measures(found)
    rows = [
        [name, *(shown(value, of.form) for value, of in zip(values, measures, strict=True))]
        for name, values in copies_rows(evaluation, found).items()
    ]
    notes = "\n".join(_items([f"{measure.title}: {measure.note}." for measure in measures]))
    return f"""## Are they copies?

At {found.steps} steps. {copies_intro(found)}

{table(["images of", *(measure.title for measure in measures)], rows)}

{notes}"""


def _other(evaluation: Evaluation) -> str:
    sampler = next(iter(evaluation.samplers))
    parts = [f"## Other measures, sampler {sampler}"]
    for features in evaluation.features:
        for title, note, value, form in _MEASURES:
            rows = [
                [method, *_measured(evaluation, method, features, sampler, value, form)]
                for method in evaluation.versions
            ]
            head = [f"{title}, {features}", *_step_columns(evaluation)]
            parts.append(f"{title}: {note}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


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

    found = [evaluation.over_seeds(method, n, of_cell, sampler) for n in evaluation.steps]
    return [shown(over_seeds, form) for over_seeds in found]


def _provenance(record: dict[str, Any], evaluation: Evaluation, name: str) -> str:
    machine = record["machine"]
    config = record["config"]
    versions = sorted(set(evaluation.versions.values()))
    bundles = ", ".join(f"`{version[:12]}`" for version in versions)
    features = "; ".join(
        f"{feature}: {f'`{of.file[:12]}`' if of.file else 'no file'}"
        for feature, of in evaluation.features.items()
    )
    packages = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
    training = f"{config['expert.steps']:,} steps of batch {config['expert.batch']}"
    trained_in = record.get("training_precision", config["expert.precision"])
    precision = f"EMA {config['expert.ema_decay']}, {trained_in}"
    partition = record["data"]["partition"][:12]
    return f"""## Provenance

On {machine["device"]}; {packages}. Each expert: {training}, {precision}; sampled in
{evaluation.precision}.
Bundles {bundles}; partition `{partition}`; config `{record["config_hash"][:12]}`; features {features}.
[The record]({name}.json) holds every figure for every seed, and all hashes."""
