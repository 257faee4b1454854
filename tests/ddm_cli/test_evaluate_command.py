"""`ddm evaluate IMAGES against=RUN`: a table that a terminal of 80 columns shows whole, or JSON."""

import json
from pathlib import Path

import pytest

from ddm_cli import evaluate, sample


def test_a_folder_of_images_is_compared(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    words = ["n=20", "format=folder", f"out={folder}", "steps=2"]
    assert sample.main([str(small_run), *words]) == 0
    asked = [str(folder), f"against={small_run}", "features=[pixels]"]
    capsys.readouterr()
    assert evaluate.main(asked) == 0
    shown = capsys.readouterr().out
    assert "coverage" in shown and "…" not in shown
    assert evaluate.main([*asked, "format=json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["pixels"]["images"] == 20
