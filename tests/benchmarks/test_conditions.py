"""Whether images show what they are conditioned on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.conditions import main, questions
from ddm.condition import Vocabulary
from serve import load
from serve.model.model import Model


def test_the_classifier_finds_the_class_that_is_asked_for(
    small_labels_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With real images in place of sampled ones: all of the class with a condition, a few without."""
    from ddm.partition import Partition
    from ddm.training import to_float

    folder = small_labels_run / "partition"
    whole = Partition.read(folder).all(folder)
    sample = Model.sample

    def real(model: Model, n: int, **settings: Any) -> Any:
        _, trace = sample(model, n, steps=1, trace=True)
        wanted = settings.get("condition")
        chosen = whole["images"]
        if wanted:
            chosen = chosen[whole["labels"] == int(next(iter(wanted)))]
        images: Tensor = to_float(chosen[torch.arange(n) * 7 % len(chosen)])
        return images, trace

    monkeypatch.setattr(Model, "sample", real)
    sheet = tmp_path / "sheet.png"
    words = [str(small_labels_run), "--n=100", "--guidance", "1", f"--sheet={sheet}"]
    assert main([*words, f"--out={tmp_path / 'record.json'}"]) == 0
    with Image.open(sheet) as image:
        assert image.size == (10 * 66 - 2, 10 * 66 - 2)  # ten of each digit
    lines = capsys.readouterr().out.splitlines()
    named = {line.split("|")[1].strip(): float(line.split("|")[3].split("±")[0])
             for line in lines if "±" in line}  # fmt: skip
    assert named["1"] > 85 and named["without a condition"] < 35
    record = json.loads((tmp_path / "record.json").read_text())
    rows = record["questions"]["10 classes"]["rows"]
    assert [row["guidance"] for row in rows] == [None, 1]
    assert 100 * rows[1]["accuracy"] == pytest.approx(named["1"], abs=0.05)
    assert rows[0]["near_copies"] == rows[1]["near_copies"] == 1  # they are training images


def test_each_attribute_is_asked_for_and_against(classifier_steps: Callable[[int], None]) -> None:
    classifier_steps(50)
    generator = torch.Generator().manual_seed(0)
    has = torch.randint(2, (200, 2), generator=generator).byte()
    images = (has[:, :1, None, None] * 200).expand(-1, 1, 8, 8).contiguous()
    whole = {"images": images, "attributes": has}
    words = Vocabulary("attributes", ["Bright", "Other"])
    (found,) = questions(words, whole, ["Bright"], "cpu")
    assert found.conditions == [{"Bright": 0}, {"Bright": 1}] and found.wanted == [0, 1]
    assert torch.equal(found.classes, has[:, 0].long())
    logits = found.classifier(images, lambda _: None).logits
    assert logits is not None and torch.equal(logits.argmax(dim=1), found.classes)


def test_a_run_without_conditions_is_refused(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(small_run).vocabulary is None
    assert main([str(small_run)]) == 2
    assert "must be a run whose experts take a condition" in capsys.readouterr().err
