"""A data set cut into clusters: nothing lost, nothing shared, nothing changed unseen."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddm.artifacts import digest, read_json, sha256, write_json, write_tensors
from ddm.errors import ArtifactError, DataError
from ddm.partition import Partition

IMAGES = torch.arange(6 * 2 * 3 * 3).reshape(6, 2, 3, 3).to(torch.uint8)
CLUSTER = torch.tensor([1, 0, 1, 2, 1, 0])
LABELS = torch.tensor([10, 11, 12, 13, 14, 15])
NAMES = ["round", "long", "other"]


def write(
    folder: Path, images: Tensor = IMAGES, cluster: Tensor = CLUSTER, labels: Tensor | None = LABELS
) -> Partition:
    return Partition.write(folder, images, cluster, NAMES, labels)


def test_a_cluster_is_its_own_images_and_no_others(tmp_path: Path) -> None:
    cluster = write(tmp_path).cluster(tmp_path, 1)
    assert cluster["index"].tolist() == [0, 2, 4]
    assert torch.equal(cluster["images"], IMAGES[[0, 2, 4]])
    assert cluster["labels"].tolist() == [10, 12, 14]


def test_a_cluster_is_read_from_its_own_file_alone(tmp_path: Path) -> None:
    write(tmp_path)
    for k in (0, 2):
        Partition.file(tmp_path, k).unlink()
    assert Partition.read(tmp_path).cluster(tmp_path, 1)["labels"].tolist() == [10, 12, 14]


def test_the_union_of_the_clusters_is_the_data_set(tmp_path: Path) -> None:
    whole = write(tmp_path).all(tmp_path)
    assert sorted(whole["index"].tolist()) == list(range(6))
    assert torch.equal(whole["images"], IMAGES[whole["index"]])
    assert torch.equal(whole["labels"], LABELS[whole["index"]])
    assert torch.equal(whole["cluster"], CLUSTER[whole["index"]])


def test_images_without_labels_stay_without(tmp_path: Path) -> None:
    assert write(tmp_path, labels=None).all(tmp_path).keys() == {"images", "index", "cluster"}


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    partition = write(tmp_path)
    assert Partition.read(tmp_path) == partition
    assert (partition.k, partition.names, partition.sizes, partition.shape) == (
        3,
        NAMES,
        [2, 3, 1],
        [2, 3, 3],
    )
    assert partition.hashes == [sha256(tmp_path / f"cluster-{k:02d}.safetensors") for k in range(3)]
    torch.testing.assert_close(partition.pi, torch.tensor([1 / 3, 1 / 2, 1 / 6]))


def test_the_hash_is_that_of_the_contents(tmp_path: Path) -> None:
    same = {
        write(tmp_path / "a").hash,
        write(tmp_path / "b").hash,
        Partition.read(tmp_path / "a").hash,
    }
    one_pixel = IMAGES.clone()
    one_pixel[3, 1, 2, 2] ^= 1
    others = [
        write(tmp_path / "pixel", images=one_pixel).hash,
        write(tmp_path / "label", labels=LABELS.flip(0)).hash,
        write(tmp_path / "moved", cluster=torch.tensor([1, 0, 1, 2, 0, 1])).hash,
        Partition.write(tmp_path / "named", IMAGES, CLUSTER, [*NAMES[:2], "rest"], LABELS).hash,
    ]
    assert len(same) == 1
    assert len({*same, *others}) == 5


def test_a_changed_pixel_is_refused_naming_the_file_and_both_hashes(tmp_path: Path) -> None:
    partition = write(tmp_path)
    path = Partition.file(tmp_path, 1)
    tensors = partition.cluster(tmp_path, 1)
    tensors["images"][0, 0, 0, 0] ^= 1
    write_tensors(path, tensors)
    message = f"{path} is damaged or foreign: its SHA-256 is {sha256(path)}, expected {partition.hashes[1]}"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        partition.cluster(tmp_path, 1)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        partition.all(tmp_path)


def test_a_changed_description_is_refused_naming_the_file_and_both_hashes(tmp_path: Path) -> None:
    partition = write(tmp_path)
    path = tmp_path / "partition.json"
    changed = {**read_json(path), "sizes": [3, 2, 1]}
    write_json(path, changed)
    found = Partition(partition.shape, partition.names, [3, 2, 1], partition.hashes).hash
    message = f"{path} is damaged: the hash of its partition is {found}, it says '{partition.hash}'"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        Partition.read(tmp_path)


HASH = "0" * 64


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"shape": shape}
            for shape in ([8, 8], [0, 8, 8], [1, 8, 10**6], [1, 8.0, 8], "188", None)
        ),
        *({"shape": shape} for shape in ([True, 8, 8], {"0": 1})),
        *({"sizes": sizes} for sizes in ([], [1, 2], [1, 2, 0], [1, 2, -3], [1, 2, 2**41])),
        *({"sizes": sizes} for sizes in ([1, 2, 3.0], [1, 2, True], [1, 2, None], 3, [1] * 10**5)),
        *({"names": names} for names in (["a", "b"], ["a", "b", "a"], ["a", "b", 3], "abc")),
        *({"names": names} for names in (["a", "b", "x" * 256], ["a", "b", "\ud800"], None)),
        *({"hashes": [HASH, HASH, value]} for value in (None, "", "g" * 64, "0" * 63, 0)),
        {"hashes": [HASH]},
    ],
)
def test_json_that_describes_no_partition_is_refused_by_name(
    tmp_path: Path, change: dict[str, object]
) -> None:
    write(tmp_path)
    path = tmp_path / "partition.json"
    facts = {key: value for key, value in read_json(path).items() if key != "hash"} | change
    write_json(path, {**facts, "hash": digest(facts)})
    with pytest.raises(
        ArtifactError, match=re.escape(f"{path} does not describe a partition: ")
    ) as error:
        Partition.read(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [None, "", 3, []])
def test_a_partition_without_its_hash_is_refused_by_name(tmp_path: Path, value: object) -> None:
    write(tmp_path)
    path = tmp_path / "partition.json"
    write_json(path, {**read_json(path), "hash": value})
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged: the hash")):
        Partition.read(tmp_path)


def test_a_folder_without_a_partition_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / 'partition.json'} is missing")):
        Partition.read(tmp_path)


@pytest.mark.parametrize(
    ("cluster", "k", "name"), [([1, 0, 1, 0, 1, 0], 2, "other"), ([1, 1, 1, 2, 1, 2], 0, "round")]
)
def test_an_empty_cluster_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, cluster: list[int], k: int, name: str
) -> None:
    message = f"cluster {k} ({name}) of 3 has no images: every cluster needs at least one"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        write(tmp_path, cluster=torch.tensor(cluster))
    assert list(tmp_path.iterdir()) == []


HELD = torch.tensor([True, False, False, False, True, False])


def write_with_holdout(folder: Path) -> Partition:
    return Partition.write(folder, IMAGES, CLUSTER, NAMES, LABELS, HELD)


def test_held_out_images_are_in_files_of_their_own(tmp_path: Path) -> None:
    partition = write_with_holdout(tmp_path)
    assert (partition.sizes, partition.holdout_sizes) == ([2, 1, 1], [0, 2, 0])
    assert partition.cluster(tmp_path, 1)["index"].tolist() == [2]
    held = partition.cluster_holdout(tmp_path, 1)
    assert held["index"].tolist() == [0, 4]
    assert torch.equal(held["images"], IMAGES[[0, 4]])
    assert held["labels"].tolist() == [10, 14]
    torch.testing.assert_close(partition.pi, torch.tensor([2 / 4, 1 / 4, 1 / 4]))
    hashes = [sha256(Partition.holdout_file(tmp_path, k)) for k in range(3)]
    assert partition.holdout_hashes == hashes
    assert {path.name for path in partition.files(tmp_path)} | {"partition.json"} == {
        path.name for path in tmp_path.iterdir()
    }


def test_trained_and_held_out_images_are_together_the_data_set(tmp_path: Path) -> None:
    partition = write_with_holdout(tmp_path)
    trained, held = partition.all(tmp_path), partition.holdout(tmp_path)
    assert sorted(trained["index"].tolist() + held["index"].tolist()) == list(range(6))
    assert held["index"].tolist() == [0, 4]
    assert held["cluster"].tolist() == [1, 1]
    assert torch.equal(trained["cluster"], CLUSTER[trained["index"]])


def test_a_partition_with_a_holdout_is_read_as_written_and_hashed_with_it(tmp_path: Path) -> None:
    partition = write_with_holdout(tmp_path / "held")
    assert Partition.read(tmp_path / "held") == partition
    other = Partition.write(
        tmp_path / "other", IMAGES, CLUSTER, NAMES, LABELS.where(~HELD, 9), HELD
    )
    assert other.hashes == partition.hashes
    assert other.hash != partition.hash


def test_a_partition_without_a_holdout_is_described_as_before(tmp_path: Path) -> None:
    partition = write(tmp_path)
    facts = read_json(tmp_path / "partition.json")
    assert set(facts) == {"shape", "names", "sizes", "hashes", "hash"}
    assert partition.hash == digest({key: facts[key] for key in facts if key != "hash"})
    none = torch.zeros(6, dtype=torch.bool)
    same = Partition.write(tmp_path / "none", IMAGES, CLUSTER, NAMES, LABELS, none)
    assert same == partition
    with pytest.raises(ArtifactError, match="has no held-out images: cut it with partition.holdou"):
        partition.holdout(tmp_path)


def test_a_changed_held_out_image_is_refused_naming_the_file(tmp_path: Path) -> None:
    partition = write_with_holdout(tmp_path)
    path = Partition.holdout_file(tmp_path, 1)
    tensors = partition.cluster_holdout(tmp_path, 1)
    tensors["images"][0, 0, 0, 0] ^= 1
    write_tensors(path, tensors)
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged or foreign")):
        partition.holdout(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"holdout_sizes": [1, 2]}, "holdout_sizes must be"),
        ({"holdout_sizes": [0, 0, 0]}, "holdout_sizes must be"),
        ({"holdout_sizes": [0, -1, 2]}, "holdout_sizes must be"),
        ({"holdout_sizes": [0, 1.5, 2]}, "holdout_sizes must be"),
        ({"holdout_sizes": None}, "holdout_sizes must be"),
        ({"holdout_hashes": [HASH, HASH]}, "holdout_hashes must be"),
        ({"holdout_hashes": ["x", HASH, HASH]}, "holdout_hashes must be"),
        ({"holdout_hashes": []}, "holdout_hashes must be"),
        ("holdout_hashes", "must both be there, got only holdout_sizes"),
        ("holdout_sizes", "must both be there, got only holdout_hashes"),
    ],
)
def test_json_that_describes_no_holdout_is_refused_by_name(
    tmp_path: Path, change: dict[str, object] | str, said: str
) -> None:
    write_with_holdout(tmp_path)
    path = tmp_path / "partition.json"
    facts = {key: value for key, value in read_json(path).items() if key != "hash"}
    if isinstance(change, str):
        del facts[change]
    else:
        facts |= change
    write_json(path, {**facts, "hash": digest(facts)})
    with pytest.raises(ArtifactError, match=said):
        Partition.read(tmp_path)
