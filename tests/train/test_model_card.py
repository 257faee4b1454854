"""The README.md of a bundle: what it says, and what of it is the user's."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ddm.artifacts import read_json
from ddm.bundle import read_bundle
from serve import load
from train.config import Config
from train.model_card import write_card, write_cards
from train.stages.bundle import make_bundle


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_run, tmp_path / small_run.name)  # the card's title


def test_it_is_in_the_hub_s_layout_and_states_no_licence(small_run: Path) -> None:
    text = (small_run / "bundle" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "ddm"
    assert facts["pipeline_tag"] == "unconditional-image-generation"
    assert "license" not in facts
    assert "# small" in body


def test_it_gives_the_clusters_the_compute_and_the_table(small_run: Path) -> None:
    text = (small_run / "bundle" / "README.md").read_text()
    bundle = read_bundle(small_run / "bundle")
    for file, name, size, pi in zip(
        bundle.files, bundle.mixture.names, bundle.mixture.weights, bundle.mixture.pi, strict=True
    ):
        assert f"| {file} | {name} | {size} | {pi:.3f} |" in text
        assert f"| {file}: {name} | 12 | 144 |" in text
    seconds = read_json(small_run / "experts" / "00" / "time.json")["seconds"]
    assert 0 < seconds < 600
    assert " cores of " in text and "not known" not in text
    record = read_json(small_run / "evaluate" / "record.json")
    cells = [cell for cell in record["cells"] if cell["method"] == "Naive"]
    shown = " | ".join(f"{cell['scores']['pixels']['frechet']:.2f}" for cell in cells)
    assert f"| Naive | {shown} |" in text
    assert "| one model (ipndm) |" in text
    assert "Near-copies of training images" in text
    assert "There is no seed model" in text and "Images of several owners" not in text
    assert "Each expert: batch 12, learning rate " in text
    assert "## Not for" in text


def test_what_the_user_writes_is_kept_and_the_rest_is_written_again(
    copy: Path, small: Callable[..., Config]
) -> None:
    path, half = copy / "bundle" / "README.md", copy / "bundle-half" / "README.md"
    written = path.read_text()
    version = read_bundle(copy / "bundle").version
    mine = written.replace("# license: state", "license: mit\n# state") + "\nMine.\n"
    path.write_text(mine)
    (copy / "evaluate" / "record.json").rename(copy / "aside.json")
    make_bundle(small(copy, "bundle.half=true"))
    assert "Not measured yet" in path.read_text() and "Not measured yet" in half.read_text()
    (copy / "bundle" / "expert-00.safetensors").unlink()  # the bundle is made again
    make_bundle(small(copy))
    (copy / "aside.json").rename(copy / "evaluate" / "record.json")
    write_cards(small(copy))
    assert path.read_text() == mine
    ours = written.partition("<!--")[2]
    assert half.read_text().partition("<!--")[2] == ours.replace(
        ": bundle", ": the half precision of bundle"
    )
    assert load(copy / "bundle").version == version
    path.write_text("All of it is mine.")
    make_bundle(small(copy))
    assert path.read_text() == "All of it is mine."


def test_a_bundle_from_elsewhere_keeps_its_name_and_its_terms(
    copy: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(copy / "bundle", tmp_path / "given"))
    card = folder / "README.md"
    card.write_text(
        card.read_text().replace("## Not for\n\n", "## Not for\n\n- Anything on Sundays.\n")
    )
    write_card(small(tmp_path / "mine"), folder)
    text = card.read_text()
    assert "# small\n" in text and "Images of several owners" in text
    assert "## Not for\n\n- Anything on Sundays.\n- Images that are passed off" in text


def test_a_record_of_another_bundle_is_not_in_it(copy: Path, small: Callable[..., Config]) -> None:
    path = copy / "evaluate" / "record.json"
    version = read_bundle(copy / "bundle").version
    path.write_text(path.read_text().replace(version, "0" * 64))
    write_cards(small(copy))
    assert "Not measured yet" in (copy / "bundle" / "README.md").read_text()


def test_a_damaged_record_leaves_a_card_without_a_table(
    copy: Path, small: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "evaluate" / "record.json").write_text("{}")
    write_cards(small(copy))
    assert "record.json does not hold an evaluation" in caplog.text
    assert "Not measured yet" in (copy / "bundle" / "README.md").read_text()
