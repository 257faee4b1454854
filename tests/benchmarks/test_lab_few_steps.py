"""The laboratory's table of samplers and grids, on measurements of a moment."""

import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks.lab import few_steps
from ddm.grids import time_grid
from ddm.schedules import schedule


@pytest.fixture(scope="module")
def small() -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_steps, "REFERENCE_STEPS", 100)
        patch.setattr(few_steps, "PATHS", 4)
        patch.setattr(few_steps, "DIMENSION", 3)
        patch.setenv("DDM_RUN", "no/run")
        return few_steps.measure()


def test_every_defined_cell_is_there_and_small_at_50_nfe(small: dict[str, list]) -> None:
    methods, grids, budgets = len(few_steps.METHODS), len(few_steps.GRIDS), len(few_steps.NFE)
    assert len(small["cells"]) == 2 * methods * budgets * (4 * grids - 1)
    assert small["network"] is None
    for cell in small["cells"]:
        assert cell["nfe"] == cell["budget"] - (
            cell["sampler"] == "heun" and cell["budget"] % 2 == 0
        )
        if cell["budget"] == 50 and cell["grid"] == "cosine":
            assert cell["error"] < 0.05


def test_tables_and_figure_of_a_small_measurement(small: dict[str, list]) -> None:
    rendered = few_steps.render(small)
    assert rendered.tables["network"] == "Not measured."
    for text in rendered.tables.values():
        assert "nan" not in text
    for figure in rendered.figures.values():
        plt.close(figure)


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
)
def test_diffusers_gives_the_same_ends() -> None:
    path = schedule("vp_linear")
    oracle = few_steps._mixtures(path)["even"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, few_steps.DIMENSION, dtype=torch.float64, generator=generator)
    times = time_grid("cosine", 10, path)
    ends = few_steps._by_diffusers(oracle.denoise, x, path, times)
    ours, _ = few_steps.Method("dpmpp_2m").end(oracle.denoise, x, path, 10, "cosine")
    # diffusers keeps its sigmas in float32: 7e-7 for a usual start, 6e-6 for a rare one
    torch.testing.assert_close(ends["dpmpp_2m"], ours, rtol=0, atol=1e-5)


def test_a_run_that_is_not_there_is_left_out() -> None:
    assert few_steps._network(Path("no/run")) is None
