"""What an evaluation records, against independent figures, and what it computes only once."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import read_json, read_tensors, sha256, write_json
from ddm.errors import ArtifactError, ConfigError
from ddm.measures import power_law_fit, trajectory_error
from ddm.partition import Partition
from serve import load
from serve.model.images import to_uint8
from tests.train.conftest import frechet, gaussian, means_of
from train.config import Config
from train.evaluation.features import feature_networks
from train.evaluation.measure import Measurement, evaluate
from train.evaluation.report import write_report
from train.evaluation.results import Cell, Evaluation, Score
from train.evaluation.tables import middle, shown
from train.stages.monolith import trained_monoliths
from train.stages.run import run

ScriptFile = Callable[..., Path]
NAMES = ("one-model", "Naive", "MoG-a", "MoG-da", "balanced", "balanced-cv", "top-1", "full")
NAIVE = {"source": "prior", "policy": "fixed", "control_variate": "none"}
BALANCED = {"source": "posterior", "policy": "balanced", "control_variate": "none"}


def measured(config: Config) -> Evaluation:
    return Measurement(config, {}, config.evaluate, "evaluate").make()


def one(
    record: Evaluation,
    method: str = "balanced",
    steps: int = 4,
    sampler: str = "ipndm",
    seed: int = 0,
) -> Cell:
    wanted = (method, steps, sampler, seed)
    (found,) = (
        cell
        for cell in record.cells
        if (cell.method, cell.steps, cell.sampler, cell.seed) == wanted
    )
    return found


def sampled(folder: Path, name: str) -> torch.Tensor:
    return read_tensors(folder / "evaluate" / "samples" / f"{name}.safetensors")["images"]


def expected(run: Path, seed: int = 0, steps: int = 4, **settings: Any) -> torch.Tensor:
    return to_uint8(load(run).sample(20, seed=seed, steps=steps, **settings))


def real(folder: Path) -> torch.Tensor:
    return Partition.read(folder / "partition").all(folder / "partition")["images"]


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run, with its samples."""
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.fixture(scope="session")
def record(small_run: Path) -> Evaluation:
    return Evaluation.read(small_run / "evaluate" / "record.json")


def test_the_recorded_distance_is_that_of_the_samples(small_run: Path, record: Evaluation) -> None:
    whole = Partition.read(small_run / "partition").all(small_run / "partition")
    order = whole["index"].argsort()
    (network,) = feature_networks(
        ["classifier"], None, {name: part[order] for name, part in whole.items()}, 0, "cpu"
    )
    features = [
        gaussian(network(images, lambda _: None).features.double().numpy())
        for images in (whole["images"], sampled(small_run, "balanced-ipndm-4-seed0"))
    ]
    assert one(record).scores["classifier"].frechet == pytest.approx(frechet(*features), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("MoG-a", {"source": "posterior", "policy": "stochastic", "control_variate": "none"}),
        ("balanced", BALANCED),
        (
            "balanced-cv",
            {"source": "posterior", "policy": "balanced", "control_variate": "gaussian"},
        ),
    ],
)
def test_the_recorded_trajectory_error_is_that_to_the_full_mixture(
    small_run: Path, record: Evaluation, method: str, settings: dict[str, Any]
) -> None:
    model, errors = load(small_run), []
    reference = model.sample(4, steps=8, source="posterior", policy="full")
    for steps in (2, 4):
        ends = model.sample(20, steps=steps, **settings)[:4]
        errors.append(trajectory_error(ends, reference))
        assert one(record, method, steps).trajectory_error == pytest.approx(errors[-1], rel=1e-3)
    assert record.fits[method]["ipndm"] == pytest.approx(power_law_fit([2, 4], errors), rel=1e-2)


def test_all_methods_are_in_the_table_with_their_nfe(record: Evaluation) -> None:
    nfe = {(cell.method, cell.steps): cell.nfe for cell in record.cells}
    single = {(name, n): n for name in NAMES[:-1] for n in (2, 4)}
    assert nfe == {**single, ("full", 2): 6, ("full", 4): 12}
    assert {(cell.sampler, cell.seed) for cell in record.cells} == {("ipndm", 0)}
    assert (
        record.images_seen["one-model"] == record.images_seen["full"] == 3 * 12 * 12
    )  # the same compute
    assert (
        one(record, "one-model").trajectory_error is None
    )  # another model has no trajectory in common


def test_the_report_needs_no_other_file(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.findall(r"@import|url\((?!#)", page)
    for name in (*NAMES[1:], "one model (ipndm)", "a small classifier trained on half"):
        assert name in page


def test_every_image_of_the_report_says_what_is_there(small_run: Path, record: Evaluation) -> None:
    page = (small_run / "report.html").read_text()
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(alts) == page.count("<img ") == 3 + len(record.versions) + 3
    assert len(set(alts)) == len(alts) and min(map(len, alts)) > 20
    labels = re.findall(r'role="img" aria-label="([^"]*)"', page)
    assert len(labels) == page.count("<svg ") == 7
    (by_pixels,) = (text for text in labels if "Fréchet distance by pixels" in text)
    cells = [cell for cell in record.cells if cell.steps == middle(record.steps)]
    found = [cell.scores["pixels"].frechet for cell in cells]
    assert f"from {min(found):.2f} (" in by_pixels and f"to {max(found):.2f} (" in by_pixels


def test_the_report_is_dark_where_the_reader_s_pages_are(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    plots = page[page.index("<svg ") :]
    assert "currentColor" in plots
    assert "#000000" not in plots and "fill: #ffffff" not in plots  # black on black, a white box


def test_cluster_names_are_escaped_in_the_report(
    copy: Path, small: Callable[..., Config], means: Path
) -> None:
    name = "<b>&amp;"
    partition = copy / "partition" / "partition.json"
    cut = Partition.read(copy / "partition")
    renamed = replace(cut, names=[name, *cut.names[1:]])
    write_json(partition, {**renamed.facts, "hash": renamed.hash})
    evaluation = Evaluation.read(copy / "evaluate" / "record.json")
    measurement = Measurement(
        small(copy), {"one-model": small(copy / "monolith")}, small(copy).evaluate, "evaluate"
    )
    samples = {
        (spec.method.name, spec.steps): measurement.samples(spec)
        for spec in measurement.shown_specs()
    }
    write_report(copy / "report.html", evaluation, samples)
    page = (copy / "report.html").read_text()
    assert "&lt;b&gt;&amp;amp;" in page and "<b>" not in page


def test_the_table_gives_mean_and_deviation_over_the_seeds(
    copy: Path, small: Callable[..., Config], means: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate.methods=[Naive, full]", "evaluate.seeds=3", f"evaluate.features=[{means}]")
    found = evaluate(small(copy, *words), None)
    assert len(found.cells) == 2 * 2 * 3 and found.seeds == 3
    images = [sampled(copy, f"Naive-ipndm-4-seed{seed}") for seed in range(3)]
    for seed, of_seed in enumerate(images):
        assert (of_seed.int() - expected(copy, seed, **NAIVE).int()).abs().max() <= 1
    assert not images[0].equal(images[1]) and not images[1].equal(images[2])
    of_real = gaussian(means_of(real(copy)))
    distances = [frechet(of_real, gaussian(means_of(images))) for images in images]
    spread = found.over_seeds("Naive", 4, lambda cell: cell.scores["means"].frechet)
    assert spread == pytest.approx(
        (statistics.mean(distances), statistics.stdev(distances)), rel=1e-3
    )
    errors = found.over_seeds("Naive", 4, lambda cell: cell.trajectory_error)
    assert errors is not None and errors.deviation is None  # only seed 0 has trajectories
    assert errors.mean == one(found, "Naive").trajectory_error
    assert [one(found, "Naive", seed=seed).trajectory_error for seed in (1, 2)] == [None, None]
    text = shown(spread, ".2f")
    assert text == f"{statistics.mean(distances):.2f} ± {statistics.stdev(distances):.2f}"
    assert text.replace(" ±", " <small>±") in (copy / "report.html").read_text()
    assert text in capsys.readouterr().out


def test_one_seed_has_no_deviation_and_nothing_measured_has_no_mean(record: Evaluation) -> None:
    alone = record.over_seeds("Naive", 4, lambda cell: cell.scores["classifier"].frechet)
    assert alone == (one(record, "Naive").scores["classifier"].frechet, None)
    assert shown(alone, ".1f") == f"{alone[0]:.1f}"  # type: ignore[index]
    assert record.over_seeds("one-model", 4, lambda cell: cell.trajectory_error) is None
    assert shown(None, ".1f") == "–"
    assert record.over_seeds("Naive", 4, lambda cell: 1.0, sampler="heun") is None


def test_a_mean_over_seeds_is_of_one_cell() -> None:
    cells = [
        Cell(
            method,
            sampler,
            steps,
            seed,
            100 * (method == "b") + 10 * steps + (sampler == "y") + seed**2,
            None,
            {},
        )
        for method in "ab"
        for sampler in "xy"
        for steps in (2, 3)
        for seed in range(3)
    ]
    table = Evaluation({}, {}, {}, {}, {"x": {}, "y": {}}, 20, 3, "32-true", cells, {})
    deviation = statistics.stdev([0, 1, 4])
    for method, steps, sampler, base in (
        ("a", 2, None, 20),
        ("b", 3, "x", 130),
        ("b", 2, "y", 121),
    ):
        spread = table.over_seeds(method, steps, lambda cell: cell.nfe, sampler)
        assert spread == pytest.approx((base + 5 / 3, deviation))


def test_a_sampler_s_settings_override_those_of_sample(
    copy: Path, small: Callable[..., Config], means: Path
) -> None:
    samplers = "evaluate.samplers={a: {}, b: {sampler: dpmpp_2m, grid: uniform_log_snr}}"
    words = (
        "sample.t_min=0.01",
        "sample.steps=9",
        f"evaluate.features=[{means}]",
        "evaluate.methods=[Naive, balanced]",
    )
    found = evaluate(small(copy, *words, samplers), None)
    cfg = {"t_min": 0.01, **BALANCED}
    settings: dict[str, dict[str, Any]] = {
        "a": cfg,
        "b": {"sampler": "dpmpp_2m", "grid": "uniform_log_snr", **cfg},
    }
    for name, given in settings.items():
        images = sampled(copy, f"balanced-{name}-4-seed0")
        assert (images.int() - expected(copy, **given).int()).abs().max() <= 1
        cell = one(found, sampler=name)
        distance = frechet(gaussian(means_of(real(copy))), gaussian(means_of(images)))
        assert cell.scores["means"].frechet == pytest.approx(distance, rel=1e-3)
        spread = found.over_seeds("balanced", 4, lambda cell: cell.scores["means"].frechet, name)
        assert spread == (cell.scores["means"].frechet, None)
    assert not sampled(copy, "balanced-a-4-seed0").equal(sampled(copy, "balanced-b-4-seed0"))
    assert list(found.samplers) == ["a", "b"]
    assert [found.samplers[name]["grid"] for name in "ab"] == ["cosine", "uniform_log_snr"]
    assert found.samplers["b"]["sampler"] == "dpmpp_2m" and found.samplers["b"]["t_min"] == 0.01
    for name in "ab":
        errors = [one(found, steps=n, sampler=name).trajectory_error for n in (2, 4)]
        assert found.fits["balanced"][name] == pytest.approx(power_law_fit([2, 4], errors))  # type: ignore[arg-type]
    # The reference is sampled by the first of them.
    reference = read_json(copy / "evaluate" / "samples" / "reference-a-8-seed0.json")
    assert (reference["sampler"], reference["policy"], reference["source"]) == (
        "ipndm",
        "full",
        "posterior",
    )


def test_a_record_is_read_as_it_was_written(small_run: Path, record: Evaluation) -> None:
    facts = json.loads((small_run / "evaluate" / "record.json").read_text())
    assert Evaluation.of({**facts, "and": "more"}) == record
    assert isinstance(one(record).scores["classifier"], Score)
    assert record.config["run"] == str(small_run)
    assert record.versions["full"] == sha256(small_run / "bundle" / "manifest.json")


def forged(folder: Path, name: str) -> None:
    """Put a figure that no computation gives into a kept score."""
    kept = read_json(folder / "evaluate" / "scores" / f"{name}.json")
    write_json(
        folder / "evaluate" / "scores" / f"{name}.json",
        {**kept, "score": {**kept["score"], "kid": -77.0}},
    )


def test_a_kept_score_is_computed_again_only_for_other_samples_or_features(
    copy: Path, small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    network = script_file(tmp_path / "own.pt", 4)
    words = [f"evaluate.features=[{network}]", "evaluate.methods=[Naive, balanced]"]
    names = [
        f"{method}-ipndm-{steps}-seed0" for method in ("Naive", "balanced") for steps in (2, 4)
    ]

    def kids(*more: str) -> list[float]:
        (copy / "evaluate" / "record.json").unlink(missing_ok=True)
        found = measured(small(copy, *words, *more))
        return [
            one(found, name.split("-")[0], int(name.split("-")[2])).scores["own"].kid
            for name in names
        ]

    true = kids()
    assert -77.0 not in true
    for name in names:
        forged(copy, f"{name}-own")
    assert kids() == [-77.0] * 4
    changed = kids("sample.t_min=0.02")  # other images
    assert -77.0 not in changed and changed != true
    assert kids() == true
    forged(copy, f"{names[0]}-own")
    assert kids("evaluate.seeds=2")[0] == -77.0  # the samples of seed 0 are the same
    script_file(tmp_path / "own.pt", 2)  # other features, of the same name
    others = kids()
    assert -77.0 not in others and others != true


def test_only_a_record_of_the_same_is_read(
    copy: Path, small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    network, path = script_file(tmp_path / "own.pt"), copy / "evaluate" / "record.json"
    words = [f"evaluate.features=[{network}]", "evaluate.methods=[Naive]"]
    first = measured(small(copy, *words))
    write_json(path, {**read_json(path), "n": 12345})
    assert measured(small(copy, *words)).n == 12345
    for more in (
        ["evaluate.steps=[2, 3]"],
        ["evaluate.precision=bf16-mixed"],
        ["sample.clip=false"],
    ):
        config = small(copy, *words, *more)
        assert not Measurement(config, {}, config.evaluate, "evaluate").is_made()
    assert measured(small(copy, *words, "evaluate.steps=[2, 3]")).n == 20
    assert measured(small(copy, *words)) == first
    script_file(network, 2)
    assert measured(small(copy, *words)) != first


def test_two_sections_are_measured_separately(
    copy: Path, small: Callable[..., Config], means: Path
) -> None:
    before = (copy / "evaluate" / "record.json").read_bytes()
    config = small(copy, f"evaluate.features=[{means}]")
    cfg = replace(
        config.table,
        n=20,
        seeds=1,
        steps=[2, 3],
        methods=["top-1"],
        features=[str(means)],
        trajectories=2,
    )
    found = Measurement(config, {}, replace(cfg, reference_steps=4), "table").make()
    assert {cell.method for cell in found.cells} == {"top-1"}
    assert (copy / "table" / "record.json").exists()
    assert (copy / "evaluate" / "record.json").read_bytes() == before
    with pytest.raises(ConfigError, match="table.features must hold at least one network"):
        Measurement(config, {}, replace(cfg, features=[]), "table")


def test_the_precision_of_the_networks_is_in_the_record(
    copy: Path, small: Callable[..., Config], means: Path
) -> None:
    words = (f"evaluate.features=[{means}]", "evaluate.methods=[Naive]")
    single = sampled(copy, "Naive-ipndm-4-seed0")
    found = measured(small(copy, *words, "evaluate.precision=bf16-mixed"))
    assert found.precision == "bf16-mixed"
    assert (
        read_json(copy / "evaluate" / "samples" / "Naive-ipndm-4-seed0.json")["precision"]
        == "bf16-mixed"
    )
    apart = (sampled(copy, "Naive-ipndm-4-seed0").float() - single.float()).abs()
    assert 0 < apart.mean() < 2  # of 255
    assert measured(small(copy, *words)).precision == "32-true"


def test_the_reference_is_the_run_s_own_mixture_in_any_order_of_rows(
    small_run: Path, small: Callable[..., Config]
) -> None:
    cfg, other = (
        sha256(folder / "bundle" / "manifest.json")
        for folder in (small_run, small_run / "monolith")
    )
    assert cfg != other
    for rows in ("full, one-model", "one-model, full", "one-model"):
        config = small(small_run, f"evaluate.methods=[{rows}]")
        one_model = {"one-model": small(small_run / "monolith", "partition.k=1")}
        measurement = Measurement(config, one_model, config.evaluate, "evaluate")
        assert measurement.reference.method.run == str(small_run)
        assert measurement.reference.method.version == cfg


def test_the_reference_is_of_all_clusters_and_needs_no_router(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    config = small(
        small_run, f"sample.clusters=['{Partition.read(small_run / 'partition').names[0]}']"
    )
    reference = Measurement(config, {}, config.evaluate, "evaluate").reference
    assert reference.parameters["clusters"] == {} and reference.parameters["source"] == "posterior"
    copy = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(copy / "bundle")
    shutil.rmtree(copy / "router")
    config = small(copy, "evaluate.methods=[switching-gaussian]")
    run(config, ["bundle"])
    reference = Measurement(config, {}, config.evaluate, "evaluate").reference
    assert reference.parameters["source"] == "gaussian"


def test_a_table_without_rows_is_refused(small_run: Path, small: Callable[..., Config]) -> None:
    config = small(small_run, "evaluate.methods=[one-model]", "evaluate.monolith_steps=0")
    with pytest.raises(ConfigError, match=r"evaluate.methods must .*, got \['one-model'\]"):
        Measurement(config, {}, config.evaluate, "evaluate")


def test_cells_of_one_name_are_refused(small_run: Path, small: Callable[..., Config]) -> None:
    config = small(
        small_run,
        "evaluate.methods=[balanced, balanced-cv]",
        "evaluate.samplers={ipndm: {}, cv-ipndm: {order: 2}}",
    )
    with pytest.raises(ConfigError, match="2 cells with the name balanced-cv-ipndm-2-seed0"):
        Measurement(config, {}, config.evaluate, "evaluate")


def test_a_bundle_of_other_clusters_is_not_measured_against_the_partition_s_images(
    copy: Path, small: Callable[..., Config]
) -> None:
    config = small(copy)
    run(small(copy, f"update.cluster={Partition.read(copy / 'partition').names[0]}"), ["remove"])
    with pytest.raises(
        ArtifactError, match=r"bundle has experts of other clusters, .* than .*partition, "
    ):
        Measurement(config, {}, config.evaluate, "evaluate")


def test_one_model_of_fewer_steps_is_not_taken_for_that_of_the_config(
    copy: Path, small: Callable[..., Config]
) -> None:
    config = small(copy, "evaluate.monolith_steps=50")
    with pytest.raises(ArtifactError, match="monolith was trained for 36 steps, not 50: train it"):
        trained_monoliths(config, config.evaluate)


def test_the_report_is_written_again_for_another_policy_of_sample(
    copy: Path, small: Callable[..., Config]
) -> None:
    assert Measurement(small(copy), {}, small(copy).evaluate, "evaluate").specs
    one_model = {"one-model": small(copy / "monolith", "partition.k=1")}
    for policy, made in (("switching", True), ("balanced", False)):
        config = small(copy, f"sample.policy={policy}")
        assert Measurement(config, one_model, config.evaluate, "evaluate").is_made() == made


@pytest.mark.parametrize("kind", [{}, {"cells": 1}, {"cells": [{"method": "full"}]}])
def test_a_record_of_another_kind_is_refused_by_file(
    small_run: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    known = read_json(small_run / "evaluate" / "record.json") if kind else {}
    write_json(tmp_path / "record.json", {**known, **kind})
    with pytest.raises(ArtifactError, match=r"record.json does not hold an evaluation"):
        Evaluation.read(tmp_path / "record.json")


def test_samples_that_are_gone_are_made_again_for_the_report(
    copy: Path, small: Callable[..., Config]
) -> None:
    (copy / "report.html").unlink()
    gone = copy / "evaluate" / "samples" / "balanced-ipndm-4-seed0.safetensors"
    before = sampled(copy, gone.stem)
    gone.unlink()
    evaluate(small(copy), {"one-model": small(copy / "monolith", "partition.k=1")})
    assert (copy / "report.html").exists()
    assert sampled(copy, gone.stem).equal(before)
