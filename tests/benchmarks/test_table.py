"""The table: its record, resuming after an interruption, and that the page is a function of the
record.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations import __main__ as ablations
from benchmarks.ablations import variants
from benchmarks.table.__main__ import main
from benchmarks.table.results_page import difference, page
from ddm.artifacts import sha256
from tests.conftest import ROOT, SMALL
from train.config import load_config
from train.evaluation.results import Evaluation
from train.evaluation.rows import METHODS
from train.evaluation.samples import SampleStore

TABLE = (
    "table={n: 20, seeds: 2, steps: [2, 4], trajectories: 4, reference_steps: 8, batch: 20, "
    f"methods: [{', '.join(METHODS)}], samplers: {{ddim: {{sampler: ddim}}, 2M: {{sampler: dpmpp_2m}}}}}}"
)


def words(folder: Path, *more: str) -> list[str]:
    return [
        "configs/digits.yaml",
        *SMALL,
        TABLE,
        f"run={folder / 'tiny'}",
        f"--out={folder / 'results'}",
        *more,
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run and its results, interrupted once on the way."""
    folder = tmp_path_factory.mktemp("table")
    sample = SampleStore.sample
    made: list[str] = []

    def interrupted(self: SampleStore, *job: Any) -> None:
        if len(made) == 5:
            signal.raise_signal(signal.SIGINT)
        made.append(job[0].name)
        sample(self, *job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleStore, "sample", interrupted)
        assert main(words(folder)) == 130
    files = sorted((folder / "tiny" / "table" / "samples").glob("*.safetensors"))
    assert len(files) == 5
    before = {file: file.stat().st_mtime_ns for file in files}
    assert main(words(folder)) == 0
    # Finished samples are not made again.
    assert before == {file: file.stat().st_mtime_ns for file in files}
    return folder


@pytest.fixture
def record(made: Path) -> Any:
    return json.loads((made / "results" / "tiny.json").read_text())


def test_record_holds_every_method_sampler_step_count_and_seed(record: Any) -> None:
    cells = {(c["method"], c["sampler"], c["steps"], c["seed"]) for c in record["cells"]}
    methods = [
        "one-model",
        "one-model-time",
        "Naive",
        "MoG-a",
        "MoG-da",
        "switching",
        "switching-gaussian",
        "balanced",
        "balanced-cv",
        "adaptive",
        "top-1",
        "top-2",
        "nucleus",
        "full",
    ]
    assert cells == {
        (m, s, n, seed) for m in methods for s in ("ddim", "2M") for n in (2, 4) for seed in (0, 1)
    }
    assert len(record["cells"]) == len(cells)
    copies = record["memorization"]["methods"]
    assert set(copies) == {name for m in methods for name in (m, f"{m}, 2M")}
    assert {len(seeds) for seeds in copies.values()} == {2}
    nfe = {c["method"]: c["nfe"] for c in record["cells"] if c["steps"] == 4}
    assert nfe["one-model"] == nfe["balanced"] == nfe["top-1"] == 4
    assert nfe["top-2"] == 8
    assert nfe["full"] == 12


def test_monolith_and_experts_have_equal_compute(record: Any) -> None:
    cost = record["compute"]
    assert cost["experts"] == cost["one-model"] > cost["router"] > cost["seed_model"] == 0
    seen = record["images_seen"]
    assert seen["one-model"] == seen["full"] == 3 * 12 * 12
    # 12 noisy images per step, 240 real ones of 64 pixels: 4 steps of stage 1, and twice 6 of stage 2.
    assert cost["exact_targets"] == 2 * 12 * 240 * 64 * (4 + 2 * 6)


def test_the_page_is_a_function_of_its_record(made: Path, tmp_path: Path, record: Any) -> None:
    copy = tmp_path / "tiny.json"
    copy.write_text((made / "results" / "tiny.json").read_text())
    assert main([f"--page={copy}"]) == 0
    assert (
        (tmp_path / "tiny.md").read_text()
        == (made / "results" / "tiny.md").read_text()
        == page(record, "tiny")
    )


def test_every_image_of_the_page_is_there_with_its_hash(made: Path, record: Any) -> None:
    text = (made / "results" / "tiny.md").read_text()
    shown = {
        part.split(")")[0] for part in text.split("](")[1:] if part.split(")")[0].endswith(".png")
    }
    assert shown == set(record["files"])
    assert all(
        sha256(made / "results" / file) == expected for file, expected in record["files"].items()
    )


def test_a_difference_is_taken_seed_by_seed(record: Any) -> None:
    evaluation = Evaluation.of(record)
    of = {
        (c.method, c.seed): c.scores["classifier"].frechet
        for c in evaluation.cells
        if (c.steps, c.sampler) == (4, "2M") and c.method in ("full", "Naive")
    }
    first, second = (of["Naive", seed] - of["full", seed] for seed in (0, 1))
    found = difference(evaluation, "Naive", "full", 4, "classifier", "2M")
    assert found is not None
    mean, deviation = found
    assert mean == pytest.approx((first + second) / 2)
    assert deviation == pytest.approx(abs(first - second) / 2**0.5)


def test_finished_parts_are_not_repeated(made: Path) -> None:
    def times() -> dict[Path, int]:
        kinds = (".safetensors", ".ckpt")
        return {
            f: f.stat().st_mtime_ns
            for f in (made / "tiny").rglob("*")
            if f.suffix in kinds or "scores" in f.parts
        }

    before = times()
    assert main(words(made)) == 0
    assert times() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["table.methods=[best]"], "table.methods must be one of one-model one-model-time Naive"),
        (
            ["table.samplers={x: {sampler: heum}}"],
            "table.samplers.x: sample.sampler must be one of",
        ),
        (["table.samplers={x: {stepz: 3}}"], "table.samplers.x: "),
        (
            ["table.features=[nowhere.pt]"],
            "table.features must hold classifier, pixels, inception, or TorchScript files",
        ),
        (["--pages=1"], "unrecognized arguments: --pages=1"),
    ],
)
def test_bad_config_is_refused_before_training(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path, *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_the_benchmarks_need_neither_ray_nor_a_server() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'fastapi', 'uvicorn', 'prometheus_client', 'pydantic']));"
        "import benchmarks.table.measurements, benchmarks.table.results_page, benchmarks.ablations.__main__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_ablation_trains_only_what_it_touches(made: Path, tmp_path: Path) -> None:
    """Another temperature trains nothing, another loss only the experts."""
    base = made / "tiny"
    more = [*SMALL, TABLE, f"run={base}", f"--out={tmp_path}"]
    assert ablations.main(["configs/digits.yaml", "temperature", "loss", *more]) == 0
    record = json.loads((tmp_path / "ablations-tiny.json").read_text())
    assert list(record["groups"]) == ["loss", "temperature"]
    rows = {row["name"]: row for group in record["groups"].values() for row in group}
    assert rows["expert.loss_weight=min_snr"]["default"]
    assert len(rows["sample.temperature=0.5"]["cells"]["switching-4"]) == 2

    def same(part: str, word: str) -> bool:
        for run in (made / "tiny-ablations").iterdir():
            if word in (run / "config.yaml").read_text():
                return (run / part).read_bytes() == (base / part).read_bytes()
        raise AssertionError(word)

    assert same("experts/00/expert.safetensors", "temperature: 0.5")
    assert same("router/router.safetensors", "loss_weight: constant")
    assert not same("experts/00/expert.safetensors", "loss_weight: constant")
    assert "sample.temperature=0.5" in (tmp_path / "ablations.md").read_text()


def test_the_images_of_a_seed_model_are_ablated_at_equal_compute(
    made: Path, tmp_path: Path
) -> None:
    more = [*SMALL, TABLE, "seed_model.steps=18", "expert.steps=6", f"run={made / 'seeded'}"]
    words = ["configs/digits.yaml", "images of the seed model", *more, f"--out={tmp_path}"]
    assert ablations.main(words) == 0
    record = json.loads((tmp_path / "ablations-seeded.json").read_text())
    base, noisy, above, alone = record["groups"][
        "images of the seed model"
    ]  # no faces: no CIFAR-10
    assert base["default"]
    half = ["seed_model.steps=18", "seed_model.above=null", "expert.steps=6"]
    assert noisy["words"] == [*half, "seed_model.t_min=0.6"]
    assert above["words"] == [*noisy["words"], "seed_model.above=0.6", "expert.t_max=0.6"]
    assert alone["words"] == ["seed_model.steps=0", "seed_model.above=null", "expert.steps=12"]
    runs = [made / "seeded", *(made / "seeded-ablations").iterdir()]
    assert len({(run / "experts/00/expert.safetensors").read_bytes() for run in runs}) == 4
    assert len({(run / "router/router.safetensors").read_bytes() for run in runs}) == 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_variants_that_apply_to_a_config_are_configs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "_clusters", lambda _: 5)
    monkeypatch.setattr(variants, "_groups", lambda _: 10)
    monkeypatch.setattr(variants, "energy_bands", lambda _: [0.3, 0.6])
    root = tmp_path / "a, b"
    (root / "celeba_hq").mkdir(parents=True)
    more = [f"data.root='{root}'"]
    base = load_config(path, more)
    for name in variants.GROUPS:
        found = ablations._asked(name, path, more, base)
        left_out = {variant.name for variant in variants.GROUPS[name][1]} - set(found)
        assert left_out <= ({"other images: faces"} if base.data.name != "cifar10" else set())


def test_the_bands_hold_a_third_of_the_energy_each(made: Path) -> None:
    """Against finite differences of the exact alpha along the paths."""
    import torch

    from ddm.partition import Partition
    from ddm.schedules import schedule
    from ddm.training import Batches
    from router.targets import exact_posterior

    config = load_config(Path("configs/digits.yaml"), [*SMALL, f"run={made / 'tiny'}"])
    cut = Partition.read(config.folder / "partition")
    whole, process = cut.all(config.folder / "partition"), schedule("vp_linear")
    batches = Batches(whole["images"], 256, 1)
    x0, eps = batches.x0(0)[0].double(), batches.noise(0).double()

    def alpha(t: torch.Tensor) -> torch.Tensor:
        a, s, _, _ = process(t)
        return exact_posterior(
            a * x0 + s * eps, t, whole["images"], whole["cluster"], process
        ).double()

    times = torch.linspace(1e-3, 1, 201, dtype=torch.float64)
    rates = torch.stack([alpha(t) for t in times]).diff(dim=0) / times.diff()[:, None, None]
    share = rates.square().sum(dim=2).mean(dim=1).cumsum(dim=0)
    for edge, part in zip(variants.energy_bands(config), (1 / 3, 2 / 3), strict=True):
        found = float(share[int((edge - 1e-3) / (1 - 1e-3) * 200)] / share[-1])
        assert found == pytest.approx(part, abs=0.12)
