"""What tables of an evaluation show, and those of the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from train.evaluation.results import (
    NEAR_COPY,
    Cell,
    Copies,
    Evaluation,
    Memorization,
    Spread,
    clear_best,
)
from train.evaluation.rows import ONE_MODEL


class Measure(NamedTuple):
    """What is measured of a cell: `value` of the cell, with the features of a name.

    sign: 1 if the smallest is best, -1 if the largest, None if none is
    by_features: whether each feature network has its own figures
    """

    title: str
    note: str
    value: Callable[[Cell, str], float | None]
    form: str
    sign: float | None
    by_features: bool = True


FRECHET = Measure(
    "Fréchet distance",
    "lower is better",
    lambda cell, features: cell.scores[features].frechet,
    ".2f",
    1,
)
ERROR = Measure(
    "Trajectory error E(N)",
    "lower is better",
    lambda cell, _: cell.trajectory_error,
    ".4f",
    1,
    by_features=False,
)
CONFIDENCE = Measure(
    "Mean confidence of the classifier",
    "",
    lambda cell, features: cell.scores[features].confidence,
    ".3f",
    None,
)
MEASURES = [
    FRECHET,
    Measure(
        "KID × 1000",
        "lower is better",
        lambda cell, features: 1000 * cell.scores[features].kid,
        ".2f",
        1,
    ),
    Measure(
        "Coverage",
        "of the real images by the samples; higher is better",
        lambda cell, features: cell.scores[features].coverage,
        ".3f",
        -1,
    ),
    Measure(
        "Inception score",
        "higher is better",
        lambda cell, features: cell.scores[features].inception_score,
        ".2f",
        -1,
    ),
    CONFIDENCE,
    ERROR,
    Measure("NFE per image", "", lambda cell, _: cell.nfe, ".0f", None, by_features=False),
]


class CopyMeasure(NamedTuple):
    """What is measured of samples beside training images, and in `note` what it means."""

    title: str
    note: str
    value: Callable[[Copies], float | None]
    form: str


COPY_MEASURES = [
    CopyMeasure("near-copies, %", NEAR_COPY, lambda of: 100 * of.near_copies, ".1f"),
    CopyMeasure(
        "alone, %",
        "the nearest training image is nearer than a third of the distance to the next "
        "(arXiv 2310.02664)",
        lambda of: 100 * of.alone,
        ".1f",
    ),
    CopyMeasure(
        "ratio",
        "the distance to the nearest training image over the mean distance to the 50 nearest, "
        "median",
        lambda of: of.ratio,
        ".2f",
    ),
    CopyMeasure(
        "seen, %",
        "the nearest of all real images is a training image",
        lambda of: None if of.nearest_is_training is None else 100 * of.nearest_is_training,
        ".1f",
    ),
    CopyMeasure(
        "seen/unseen",
        "the distance to the nearest training image over that to the nearest held-out one, median",
        lambda of: of.over_held_out,
        ".2f",
    ),
]


def copy_measures(found: Memorization) -> list[CopyMeasure]:
    """Those that were measured: without held-out images there are fewer."""
    return [measure for measure in COPY_MEASURES if measure.value(found.floor) is not None]


def copies_intro(found: Memorization) -> str:
    """What the figures about copies are compared with, in words."""
    if not found.held_out:
        return (
            "No image is held out (partition.holdout), so nothing says how near an image that was "
            "never seen would be. The last row compares training images with the other training "
            "images instead."
        )
    assert found.expected is not None
    return (
        f"{found.held_out:,} images were held out, which no training has seen. The last row "
        "compares those of them with the training images in the same way: it says how often that "
        f"happens to images that cannot be copies. Of all real images {100 * found.expected:.1f} % "
        "are training images, so that is how often they are the nearest of images that favour "
        "neither."
    )


def copies_rows(evaluation: Evaluation, found: Memorization) -> dict[str, list[Spread | None]]:
    """The measures of every method, by what it is called, and of the real images."""
    sets = {}
    for name, of_seeds in found.methods.items():
        method, _, sampler = name.partition(", ")
        title = label(evaluation, method, sampler or None)
        sets[f"{title}, {sampler}" if sampler else title] = of_seeds
    sets[f"real: {found.floor_name}"] = [found.floor]
    return {
        name: [_over(of_seeds, measure) for measure in copy_measures(found)]
        for name, of_seeds in sets.items()
    }


def _over(of_seeds: Sequence[Copies], measure: CopyMeasure) -> Spread | None:
    known = [value for copies in of_seeds if (value := measure.value(copies)) is not None]
    return Spread.of(known) if known else None


def near_copies(evaluation: Evaluation) -> str:
    """The share of near-copies of each method, in words; empty in an older record."""
    found = evaluation.memorization
    if found is None:
        return ""
    *methods, floor = (
        f"{name} {shown(values[0], '.2f')} %"
        for name, values in copies_rows(evaluation, found).items()
    )
    return f"Near-copies of training images at {found.steps} steps: {', '.join(methods)}; {floor}"


def shown(value: Spread | None, form: str) -> str:
    """A measure as text, with its standard deviation over the seeds if there are several."""
    if value is None:
        return "–"
    spread = f" ± {value.deviation:{form}}" if value.deviation else ""
    return f"{value.mean:{form}}{spread}"


def label(evaluation: Evaluation, method: str, sampler: str | None = None) -> str:
    """What a row is called for people: one model with the sampler that drew its images."""
    if method not in ONE_MODEL:
        return method
    named = evaluation.samplers[sampler or next(iter(evaluation.samplers))]
    what = "one model" if method == ONE_MODEL[0] else "one model, an expert's time"
    return f"{what} ({named.get('sampler', sampler)})"


def column(
    evaluation: Evaluation, measure: Measure, steps: int, features: str
) -> dict[str, Spread | None]:
    """A measure of every method at a number of steps."""

    def value(cell: Cell) -> float | None:
        return measure.value(cell, features)

    return {name: evaluation.over_seeds(name, steps, value) for name in evaluation.versions}


def is_best(of_methods: Mapping[str, Spread | None], name: str, measure: Measure) -> bool:
    """Whether a method is the best of a column by more than the spread over the seeds."""
    return measure.sign is not None and clear_best(of_methods, measure.sign) == name


def middle(steps: Sequence[int]) -> int:
    """The number of steps that images are shown at: the closest to 25."""
    return min(steps, key=lambda n: abs(n - 25))


def floor_line(evaluation: Evaluation, features: str) -> str:
    """What the features are, and the distance of as many real images."""
    line = f"{features}: {evaluation.features[features].what}"
    floor = evaluation.floor(features)
    if floor is None:
        return line
    return f"{line}; {evaluation.n} real images have {shown(floor, '.2f')}"


def nfe(evaluation: Evaluation, method: str) -> str:
    """Expert evaluations per image and step, as text."""
    return f"{evaluation.nfe_per_step(method):.3g}"


def print_tables(evaluation: Evaluation) -> None:
    """Print the Frechet distances, for each feature network, the trajectory errors, and copies."""
    console = Console(width=100)
    for features in evaluation.features:
        console.print(_table(evaluation, FRECHET, "NFE per step", nfe, features))
        console.print(floor_line(evaluation, features), style="dim", soft_wrap=True)
    console.print(_table(evaluation, ERROR, "falls as", _exponent, ""))
    for method in evaluation.versions:
        line = _classes_line(evaluation, method, middle(evaluation.steps))
        if line is not None:
            console.print(line, soft_wrap=True)
    console.print(near_copies(evaluation), soft_wrap=True)
    several = evaluation.seeds > 1
    seeds = f" and seed, {evaluation.seeds} seeds, ± the standard deviation" if several else ""
    console.print(f"{evaluation.n} images per cell{seeds}", style="dim")


def _table(
    evaluation: Evaluation,
    measure: Measure,
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
    for heading in [*(f"{n} steps" for n in steps), last_column]:
        table.add_column(heading, justify="right")
    columns = [column(evaluation, measure, n, features) for n in steps]
    for method in evaluation.versions:
        if any(found[method] is not None for found in columns):
            cells = [_cell(found, method, measure) for found in columns]
            table.add_row(method, *cells, last(evaluation, method))
    return table


def _cell(of_methods: Mapping[str, Spread | None], name: str, measure: Measure) -> str:
    text = shown(of_methods[name], measure.form)
    return f"[bold]{text}[/bold]" if is_best(of_methods, name, measure) else text


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
