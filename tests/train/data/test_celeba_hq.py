"""Lists of attributes as they are found: read rightly, or refused by file and line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ddm.errors import ConfigError, DataError
from train.clustering import PartitionConfig, assign
from train.data import DataConfig, ImageSet
from train.data.celeba_hq import LIST

MALE = [False, True, True, False]
SMILING = [True, False, True, False]
ROWS = ["0.jpg  -1  1", "1.jpg   1 -1", "2.jpg   1  1", "3.jpg  -1 -1"]
LINES = ["4", "Male Smiling", *ROWS]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (50 * i, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
    return tmp_path


def load(root: Path, text: str | bytes, limit: int | None = None) -> ImageSet:
    (root / LIST).write_bytes(text if isinstance(text, bytes) else text.encode())
    return DataConfig(name="celeba_hq", root=str(root), size=8, limit=limit).build()


def attributes(images: ImageSet) -> dict[str, list[bool]]:
    assert images.attributes is not None
    columns = images.attributes.T.tolist()
    return dict(zip(images.attribute_names, columns, strict=True))


def text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


PLAIN = text(LINES)
CSV = "image_id,Male,Smiling\n0.jpg,-1,1\n1.jpg,1,-1\n2.jpg,1,1\n3.jpg,-1,-1\n"


@pytest.mark.parametrize(
    "form",
    [
        PLAIN,
        text(LINES[1:]),  # no count
        text(["4", "", *LINES[1:], ""]),
        text(["4", "image_id Male Smiling", *ROWS]),
        CSV,
        CSV.replace("image_id", ""),
        CSV.replace("image_id,", ""),
        CSV.replace(",", " , ").replace("Male", '"Male"'),
        CSV.replace(",", ";"),
        CSV.replace(",", "\t"),
        PLAIN.replace("-1", "0"),
        PLAIN.replace(".jpg", ""),
        PLAIN.replace(".jpg", ".png"),
        PLAIN.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + PLAIN.encode(),
        text([*LINES[:2], *reversed(ROWS)]),
    ],
)
def test_a_list_is_read_in_every_form(root: Path, form: str | bytes) -> None:
    assert attributes(load(root, form)) == {"Male": MALE, "Smiling": SMILING}


@pytest.mark.parametrize(
    ("form", "line", "why"),
    [
        (PLAIN.replace(ROWS[2], "2.jpg 1"), 5, "must hold a name and 2 values, got 1"),
        (PLAIN.replace(ROWS[0], "0.jpg 1 1 1"), 3, "must hold a name and 2 values, got 3"),
        (PLAIN.replace("Male Smiling", "Male Smiling Bald"), 3, "a name and 3 values, got 2"),
        (PLAIN.replace("Male Smiling", "Smiling"), 3, "must hold a name and 1 values, got 2"),
        (PLAIN.replace(ROWS[3], "3.jpg yes -1"), 6, "values must be 1 and -1, or 1 and 0, got 'yes'"),
        (PLAIN.replace(ROWS[3], "3.jpg 2 -1"), 6, "values must be 1 and -1, or 1 and 0, got '2'"),
        (PLAIN.replace(ROWS[3], "3.jpg 0 1"), 6, "has 0, where line 3 has -1"),
        (PLAIN.replace(ROWS[3], "1.jpg 1 1"), 6, "1.jpg is already on line 4"),
        (PLAIN.replace(ROWS[3], "1 1 1"), 6, "1 is already on line 4"),
        (PLAIN.replace("4\n", "5\n", 1), 1, "says 5 rows, and 4 follow"),
        (PLAIN.replace(ROWS[1] + "\n", ""), 1, "says 4 rows, and 3 follow"),
        (text(["4", *ROWS]), 2, "must be the names of the attributes, and is a row"),
        (PLAIN.replace("Male Smiling", "Male Male"), 2, "names the attribute 'Male' twice"),
        (CSV.replace("1.jpg,1,-1", "1.jpg 1 -1"), 3, "must hold a name and 2 values, got 0"),
    ],
)  # fmt: skip
def test_a_list_that_is_wrong_is_refused_by_its_line(
    root: Path, form: str, line: int, why: str
) -> None:
    with pytest.raises(DataError) as refused:
        load(root, form)
    assert f"{LIST}, line {line}: " in str(refused.value)
    assert why in str(refused.value)


def test_a_list_without_text_is_refused_by_name(root: Path) -> None:
    for form in (b"", b"\n\n", b"4\n"):
        with pytest.raises(DataError, match=rf"{LIST} must hold a header and one row per image"):
            load(root, form)
    with pytest.raises(DataError, match=rf"{LIST} cannot be read as text"):
        load(root, PLAIN.encode("utf-16"))


def test_images_without_a_row_and_rows_without_an_image_are_counted(
    root: Path, data_log: Callable[[], list[str]]
) -> None:
    rows = [*ROWS[:3], "8.jpg 1 1", "9.jpg 1 1"]
    images = load(root, text(["Male Smiling", *rows]))
    assert attributes(images) == {"Male": MALE[:3], "Smiling": SMILING[:3]}
    (line,) = data_log()
    assert f"1 without a row in {LIST} ({root}/images/3.jpg)" in line
    assert "2 rows without an image (8)" in line


def test_a_list_of_other_images_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=rf"images holds no image that .*{LIST} lists"):
        load(root, text(["Male Smiling", "a.jpg 1 1"]))


def test_two_images_of_one_row_are_refused(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "images" / "2.png")
    with pytest.raises(DataError, match=r"2.png and .*2.jpg both belong to the row 2"):
        load(root, PLAIN)


def test_the_limit_takes_the_first_images_that_have_a_row(root: Path) -> None:
    images = load(root, text(LINES[1:2] + ROWS[1:]), limit=2)
    assert attributes(images) == {"Male": MALE[1:3], "Smiling": SMILING[1:3]}
    assert images.images[:, 0, 0, 0].tolist() == pytest.approx([50, 100], abs=2)


def test_the_combinations_of_attributes_are_clusters(root: Path) -> None:
    images = load(root, PLAIN)
    cluster, names = assign(
        images, PartitionConfig(by="attribute", attributes=["Male", "Smiling"]), 0
    )
    assert [names[k] for k in cluster] == [
        "not male, smiling",
        "male, not smiling",
        "male, smiling",
        "not male, not smiling",
    ]
    with pytest.raises(
        ConfigError, match="partition.attributes must be among Male, Smiling; got 'Bald'"
    ):
        assign(images, PartitionConfig(by="attribute", attributes=["Bald"]), 0)
