"""Conditions: vectors of a vocabulary, what clusters show, and guidance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddm.condition import (
    ClusterCounts,
    Condition,
    Conditions,
    ImageConditions,
    Vocabulary,
    check_same_vocabulary,
    guided,
)
from ddm.errors import ArtifactError, ConfigError

ANIMALS = Vocabulary("label", ["cat", "dog", "frog"])
FACES = Vocabulary("attributes", ["Smiling", "Male", "Young"])
FACTS: dict[str, Any] = {"kind": "label", "names": ["cat", "dog"], "counts": [3, 1], "images": 4}


def test_a_class_is_one_number_and_attributes_are_signs() -> None:
    assert ANIMALS.vectors(torch.tensor([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert ANIMALS.vector({"dog": 1}).tolist() == [0, 1, 0]
    has = torch.tensor([[1, 0, 1]], dtype=torch.uint8)
    assert FACES.vectors(has).tolist() == [[1, -1, 1]]
    assert FACES.vector({"Male": 0, "Young": 1}).tolist() == [0, -1, 1]
    assert ANIMALS.vector({}).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("vocabulary", "condition", "said"),
    [
        (ANIMALS, {"cow": 1}, "condition must name one of the class names cat, dog, frog; got"),
        (ANIMALS, {"cat": 0}, "condition must name one class, got {'cat': 0}"),
        (ANIMALS, {"cat": 1, "dog": 1}, "condition must name one class"),
        (FACES, {"Hat": 1}, "attribute names Smiling, Male, Young; got 'Hat'"),
    ],
)
def test_what_no_image_can_show_is_refused(
    vocabulary: Vocabulary, condition: dict[str, int], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        vocabulary.check(condition)
    assert error.value.key == "condition"


def test_counts_are_of_the_images_and_fractions_follow() -> None:
    labels = ImageConditions(ANIMALS, torch.tensor([0, 0, 2, 0]))
    assert labels.facts == {
        "kind": "label",
        "names": ANIMALS.names,
        "counts": [3, 0, 1],
        "images": 4,
    }
    counts = ClusterCounts.from_facts(labels.facts, Path("x"))
    assert counts is not None
    assert [counts.fraction({name: 1}) for name in ANIMALS.names] == [0.75, 0, 0.25]
    has = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.uint8)
    faces = ClusterCounts.from_facts(ImageConditions(FACES, has).facts, Path("x"))
    assert faces is not None
    assert faces.fraction({"Smiling": 1}) == 0.75
    assert faces.fraction({"Smiling": 1, "Male": 0}) == 0.75 * 0.75


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "words"}, "kind must be label or attributes, got 'words'"),
        ({"names": []}, "names must be strings, at least one"),
        ({"names": ["cat", "cat"]}, "names must be different"),
        ({"counts": [1]}, "counts must be 2 whole numbers"),
        ({"counts": [1, 5]}, "counts must be 2 whole numbers in"),
        ({"images": 0}, "images must be a whole number"),
    ],
)
def test_damaged_counts_are_refused_by_file(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=f"e.json is damaged: condition: {said}"):
        ClusterCounts.from_facts({**FACTS, **change}, Path("e.json"))


def test_experts_of_one_bundle_have_one_vocabulary() -> None:
    other = {**FACTS, "names": ["cat", "cow"]}
    check_same_vocabulary({Path("a"): FACTS, Path("b"): {**FACTS, "counts": [0, 4]}})
    with pytest.raises(ArtifactError, match=r"b does not fit a: its condition is label of \['cat"):
        check_same_vocabulary({Path("a"): FACTS, Path("b"): other})
    with pytest.raises(ArtifactError, match="b does not fit a: its condition is none"):
        check_same_vocabulary({Path("a"): FACTS, Path("b"): None})


def test_guidance_extrapolates_from_no_condition_and_asks_twice_only_where_it_is_not_1() -> None:
    asked: list[int] = []

    def denoise(x: Tensor, t: Tensor, vector: Tensor) -> Tensor:
        asked.append(len(x))
        return x * 10 + vector.sum(dim=1, keepdim=True) + t[:, None]

    x, t = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.1, 0.2, 0.3])
    vector = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    given = Conditions(vector, torch.tensor([1.0, 3.0, 0.0]), torch.ones(3))
    found = guided(denoise, x, t, given)
    without = x[:, 0] * 10 + t
    torch.testing.assert_close(found[:, 0], without + torch.tensor([1.0, 3.0, 0.0]))
    assert asked == [3, 2] and given.evaluations.tolist() == [1, 2, 2]


def test_guidance_applies_within_its_interval() -> None:
    condition = Condition(torch.tensor([1.0, 0.0]), 4.0, interval=(0.2, 0.6))
    t = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.7])
    assert condition.at(t, 5).guidance.tolist() == [1, 4, 4, 4, 1]
    assert condition.at(torch.tensor(0.4), 2).guidance.tolist() == [4, 4]
    assert condition.at(torch.tensor(0.4), 2).vector.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("told", [True, False])
def test_autoguidance_extrapolates_from_the_guide_and_adds_to_guidance(told: bool) -> None:
    def network(factor: float) -> Any:
        def denoise(x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
            assert (vector is not None) == told
            return factor * x + (0 if vector is None else vector.sum(dim=1, keepdim=True))

        return denoise

    x = torch.tensor([[1.0], [2.0], [3.0]])
    vector = torch.tensor([[1.0, 0], [0, 1], [0, 1]]) if told else torch.zeros(3, 0)
    guidance = torch.tensor([1.0, 1.0, 2.0]) if told else torch.ones(3)
    given = Conditions(vector, guidance, torch.tensor([1.0, 3.0, 3.0]))
    found = guided(network(5), x, torch.tensor(0.5), given, network(4))
    expected = x[:, 0] * torch.tensor([5.0, 7, 7])
    if told:
        expected = expected + torch.tensor([1.0, 1, 2])
    torch.testing.assert_close(found[:, 0], expected)
    assert given.evaluations.tolist() == ([1, 2, 3] if told else [1, 2, 2])


def test_a_guide_is_asked_only_where_it_has_learned_and_is_not_the_denoiser_itself() -> None:
    condition = Condition(torch.zeros(0), 1.0, 2.0, (0.0, 0.6), learned_from=0.3, above=0.5)
    at = condition.at(torch.tensor([0.1, 0.3, 0.5, 0.55, 0.7]), 5)
    assert at.autoguidance.tolist() == [1, 2, 2, 1, 1]
    assert at.guidance.tolist() == [1, 1, 1, 1, 1] and at.vector.shape == (5, 0)
