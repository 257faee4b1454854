from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddm.errors import ConfigError, DataError
from train.clustering import PartitionConfig, assign
from train.data import DataConfig, ImageSet


def _image(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def test_digits_are_the_1797_of_scikit_learn_from_black_to_white() -> None:
    images = DataConfig().build()
    assert images.images.shape == (1797, 1, 8, 8)
    assert images.images.dtype == torch.uint8
    assert (int(images.images.min()), int(images.images.max())) == (0, 255)
    assert images.labels is not None
    assert images.labels[:10].tolist() == list(range(10))


def test_a_folder_of_folders_gives_classes_by_name_and_is_resized_once(tmp_path: Path) -> None:
    _image(tmp_path / "cat" / "2.png", 200, (20, 10))
    _image(tmp_path / "cat" / "10.png", 10)
    _image(tmp_path / "ant" / "1.jpg", 90, (16, 16))
    images = DataConfig(name="folder", root=str(tmp_path), size=4).build()
    assert images.label_names == ["ant", "cat"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]
    assert images.images.shape == (3, 3, 4, 4)
    assert images.images[1, 0].unique().tolist() == [200]  # 2.png comes before 10.png
    (cached,) = (tmp_path / "cache").iterdir()
    written = cached.stat().st_mtime_ns
    assert torch.equal(
        DataConfig(name="folder", root=str(tmp_path), size=4).build().images, images.images
    )
    assert cached.stat().st_mtime_ns == written


def test_an_image_is_cut_to_a_square_about_its_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "1.png")
    images = DataConfig(name="folder", root=str(tmp_path), size=8).build().images
    assert images.unique().tolist() == [255]


def test_celeba_hq_takes_images_of_any_size_with_their_attributes(tmp_path: Path) -> None:
    root = tmp_path / "celeba_hq"
    for i in range(4):
        _image(root / "images" / f"{i}.jpg", 50 * i, (32, 32))
    lines = ["4", "Male Smiling", "0.jpg  -1  1", "1.jpg   1 -1", "2.jpg   1  1", "3.jpg  -1 -1"]
    (root / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join(lines) + "\n")
    images = DataConfig(name="celeba_hq", root=str(tmp_path), size=8).build()
    assert images.images.shape == (4, 3, 8, 8)
    cluster, names = assign(
        images, PartitionConfig(by="attribute", attributes=["Male", "Smiling"]), 0
    )
    assert names == [
        "not male, not smiling",
        "not male, smiling",
        "male, not smiling",
        "male, smiling",
    ]
    assert cluster.tolist() == [1, 2, 3, 0]
    with pytest.raises(
        ConfigError, match="partition.attributes must be among Male, Smiling; got 'Bald'"
    ):
        assign(images, PartitionConfig(by="attribute", attributes=["Bald"]), 0)


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"CIFAR-10 is not in .*cifar-10-batches-py there, or .* data.download=true"
    ):
        DataConfig(name="cifar10", root=str(tmp_path)).build()
    with pytest.raises(
        DataError, match=r"CelebA-HQ is not in .*images \(or CelebA-HQ-img\) and CelebAMask"
    ):
        DataConfig(name="celeba_hq", root=str(tmp_path)).build()


def test_one_changed_pixel_changes_the_content_hash() -> None:
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    other = images.clone()
    other[2, 0, 1, 1] = 1
    assert ImageSet(images).hash == ImageSet(images.clone()).hash != ImageSet(other).hash


def test_fewer_clusters_than_labels_merge_neighbours() -> None:
    images = ImageSet(
        torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5), ["a", "b", "c", "d", "e"]
    )
    cluster, names = assign(images, PartitionConfig(k=2), 0)
    assert cluster.tolist() == [0, 0, 0, 1, 1]
    assert names == ["a + b + c", "d + e"]


def test_k_means_finds_well_separated_groups_in_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(30) % 3
    images = (
        group[:, None, None, None] * 80 + torch.randint(0, 20, (30, 1, 4, 4), generator=generator)
    ).to(torch.uint8)
    cluster, names = assign(ImageSet(images), PartitionConfig(by="kmeans", k=3), 0)
    assert names == ["cluster 0", "cluster 1", "cluster 2"]
    for g in range(3):
        assert len(cluster[group == g].unique()) == 1
    assert len(cluster.unique()) == 3


def test_k_means_uses_the_features_of_a_given_network(tmp_path: Path) -> None:
    class Corner(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, :1, 0].float()

    with pytest.warns(Warning, match="torch.jit"):
        torch.jit.script(Corner()).save(tmp_path / "corner.pt")
    images = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    bright = torch.arange(20) % 2
    images[:, 0, 0, 0] = (bright * 200).to(torch.uint8)
    cluster, _ = assign(
        ImageSet(images), PartitionConfig(by="kmeans", k=2, features=str(tmp_path / "corner.pt")), 0
    )
    assert torch.equal(cluster, bright) or torch.equal(cluster, 1 - bright)


def test_one_cluster_holds_all_whatever_the_rule() -> None:
    images = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    assert assign(images, PartitionConfig(by="attribute", attributes=["Male"], k=1), 0)[
        0
    ].tolist() == [0, 0, 0, 0]


@pytest.mark.data
def test_real_cifar10_is_read_as_torchvision_reads_it(real_data: Path) -> None:
    from torchvision.datasets import CIFAR10

    images = DataConfig(name="cifar10", root=str(real_data), limit=100).build()
    truth = CIFAR10(str(real_data), train=True)
    assert np.array_equal(images.images[7].permute(1, 2, 0).numpy(), truth.data[7])
    assert images.labels is not None
    assert images.labels.tolist() == truth.targets[:100]
    assert images.label_names[0] == "airplane"
