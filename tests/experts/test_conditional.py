"""Experts that are told a class or attributes."""

import pytest
import torch
from torch import Tensor

from ddm.condition import ImageConditions, Vocabulary
from ddm.errors import ConfigError
from ddm.schedules import schedule
from ddm.training import Batches
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from experts.unet import UNetConfig

SMALL = UNetConfig(channels=8, multipliers=[1, 2], blocks=1, attention=[], dropout=0.0)
CLASSES = Vocabulary("label", ["dark", "bright"])


class Learning(ExpertLearning):
    """Without Lightning's trainer: the step is set by hand."""

    global_step = 0


def learning(kind: str = "label", batch: int = 400, **settings: float) -> Learning:
    """Of dark images of class 0 and bright ones of class 1; of attributes both are told three."""
    config = ExpertConfig(unet=SMALL, condition=kind, learning_rate=1e-2, **settings)  # type: ignore[arg-type]
    config.check()
    labels = torch.arange(40) % 2
    images = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    told = ImageConditions(CLASSES, labels)
    if kind == "attributes":
        has = torch.stack([labels, 1 - labels, labels], dim=1).byte()
        told = ImageConditions(Vocabulary("attributes", ["a", "b", "c"]), has)
    torch.manual_seed(0)
    names = len(told.vocabulary.names)
    denoiser = config.build([1, 4, 4], schedule("vp_linear"), condition=names)
    return Learning(denoiser, Batches(images, batch, seed=1), config, told)


def test_a_condition_changes_nothing_before_it_is_learned() -> None:
    torch.manual_seed(0)
    plain = ExpertConfig(unet=SMALL).build([1, 4, 4], schedule("vp_linear"))
    told = learning().denoiser
    names = {"network.condition.weight"}
    assert told.state_dict().keys() - plain.state_dict().keys() == names
    told.load_state_dict({**told.state_dict(), **plain.state_dict()})
    for network in (told, plain):
        torch.nn.init.normal_(
            network.network.head[2].weight,  # type: ignore[arg-type, index, union-attr]
            generator=torch.Generator().manual_seed(1),
        )
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 0.8])
    answer = told(x, t, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(answer, plain(x, t)) and bool(answer.any())
    assert torch.equal(answer, told(x, t))


def test_the_condition_of_a_part_of_the_images_is_left_out() -> None:
    found = learning(batch=4000, condition_dropout=0.25)
    _, place = found.batches.x0(5)
    vectors = found.condition(5, 0, place)
    assert vectors is not None
    kept = vectors.any(dim=1)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    expected = CLASSES.vectors(place % 2)
    assert torch.equal(vectors[kept], expected[kept])
    again = found.condition(5, 0, place)
    other = found.condition(6, 0, place)
    assert again is not None and other is not None
    assert torch.equal(vectors, again) and not torch.equal(vectors, other)


def test_any_number_of_attributes_is_told() -> None:
    found = learning("attributes", batch=4000)
    _, place = found.batches.x0(0)
    vectors = found.condition(0, 0, place)
    assert vectors is not None and found.conditions is not None
    told = vectors.abs().sum(dim=1).long()
    share = torch.bincount(told, minlength=4) / len(told)
    # A tenth is told nothing at all; the others 0 to 3, each equally often.
    assert share.tolist() == pytest.approx([0.325, 0.225, 0.225, 0.225], abs=0.03)
    right = found.conditions.vectors(place)
    assert torch.equal(vectors[vectors != 0], right[vectors != 0])


def test_parts_of_a_batch_are_told_the_same_as_the_whole() -> None:
    found = learning(batch=8)
    place = torch.arange(8)
    whole = found.condition(3, 0, place)
    found.batches.parts = 2
    parts = [found.condition(3, part, place[part::2]) for part in (0, 1)]
    assert whole is not None
    for part, vectors in enumerate(parts):
        assert vectors is not None and torch.equal(vectors, whole[part::2])


def test_an_expert_learns_what_a_class_looks_like() -> None:
    found = learning(batch=32)
    optimizer = found.configure_optimizers()["optimizer"]
    for step in range(60):
        found.global_step = step
        optimizer.zero_grad()
        found.training_step(None, step).backward()
        optimizer.step()
    noise, t = torch.randn(64, 1, 4, 4), torch.ones(64)

    def mean(vector: Tensor | None) -> float:
        rows = None if vector is None else vector.expand(64, -1)
        return found.denoiser(noise, t, rows).mean().item()

    dark, bright = (mean(CLASSES.vector({name: 1})) for name in CLASSES.names)
    assert dark < -0.6 and bright > 0.6  # at t = 1 the noise says nothing
    assert abs(mean(None)) < 0.4


def test_dropout_of_the_condition_is_above_0() -> None:
    with pytest.raises(ConfigError, match=r"condition_dropout must be in \(0, 1\), got 0"):
        learning(condition_dropout=0.0)
