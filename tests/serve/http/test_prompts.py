"""Conditions over HTTP, and prompts in plain words."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddm.bundle import read_bundle
from ddm.bundle_writing import Parts, write_bundle
from ddm.condition import Vocabulary
from ddm.errors import ConfigError
from serve import Model, load
from serve.engine.metrics import Prometheus
from serve.engine.models import Models
from serve.http.app import build_app
from serve.http.prompt import condition_of, in_words
from serve.settings import settings
from tests.serve.conftest import Reply, pixels, request, same

FACES = Vocabulary(
    "attributes",
    ["Eyeglasses", "Male", "No_Beard", "Smiling", "Wearing_Hat", "Young", "Blond_Hair"],
)
ANIMALS = Vocabulary("label", ["cat", "frog", "polar bear"])


@pytest.mark.parametrize(
    ("prompt", "condition"),
    [
        ("a smiling woman with glasses", {"Smiling": 1, "Male": 0, "Eyeglasses": 1}),
        ("Portrait of an old man, not smiling.", {"Young": 0, "Male": 1, "Smiling": 0}),
        ("a man without glasses or a hat", {"Male": 1, "Eyeglasses": 0, "Wearing_Hat": 0}),
        ("without glasses, smiling", {"Eyeglasses": 0, "Smiling": 1}),
        ("a woman wearing a hat", {"Male": 0, "Wearing_Hat": 1}),
        ("no beard", {"No_Beard": 1}),
        ("a man not smiling and no beard", {"Male": 1, "Smiling": 0, "No_Beard": 1}),
        ("a man without glasses wearing a hat", {"Male": 1, "Eyeglasses": 0, "Wearing_Hat": 1}),
        ("a bearded man with blond hair", {"No_Beard": 0, "Male": 1, "Blond_Hair": 1}),
        ("Wearing_Hat", {"Wearing_Hat": 1}),
        ("not young", {"Young": 0}),
        ("a not smiling girl", {"Smiling": 0, "Male": 0}),
        ("without a hat and smiling", {"Wearing_Hat": 0, "Smiling": 1}),
        (
            "a man without a hat who is wearing glasses",
            {"Male": 1, "Wearing_Hat": 0, "Eyeglasses": 1},
        ),
    ],
)
def test_known_words_are_attributes(prompt: str, condition: dict[str, int]) -> None:
    assert condition_of(prompt, FACES) == condition


def test_a_class_is_named_in_a_sentence() -> None:
    assert condition_of("a photo of a frog", ANIMALS) == {"frog": 1}
    assert condition_of("Polar bear", ANIMALS) == {"polar bear": 1}
    assert condition_of("three", Vocabulary("label", ["2", "3"])) == {"3": 1}
    bands = Vocabulary("label", ["The Beatles", "Queen", "C", "C++"])
    assert (
        condition_of("The Beatles", bands) == condition_of("beatles", bands) == {"The Beatles": 1}
    )
    assert condition_of("C", bands) == {"C": 1} and condition_of("C++", bands) == {"C++": 1}
    assert in_words({"frog": 1}, ANIMALS) == "frog"
    assert in_words({"Male": 0, "Young": 1}, FACES) == "Male=0, Young=1"


@pytest.mark.parametrize(
    ("vocabulary", "prompt", "said"),
    [
        (
            FACES,
            "a smiling unicorn",
            "prompt must use words for Eyeglasses, Male, .*'unicorn' is not",
        ),
        (FACES, "a photo of a person", "prompt must name one of Eyeglasses, Male"),
        (FACES, "a young old man", "prompt must not say both Young and the opposite"),
        (ANIMALS, "a cat and a frog", "prompt must name one class alone, of cat, frog, polar bear"),
        (ANIMALS, "not a cat", "prompt must name one class alone"),
        (ANIMALS, "glasses", "'glasses' is not one of them"),
        (ANIMALS, "a frog without", "prompt must say what is not to be there"),
        (FACES, "a man with no face", "prompt must say what is not to be there"),
        (FACES, "without glasses, hat and blond hair", "prompt must repeat 'without', or say 'or'"),
        (FACES, "without glasses and blond hair", "prompt must repeat 'without', or say 'or'"),
        (FACES, "without glasses and hat", "prompt must repeat 'without', or say 'or'"),
        (Vocabulary("label", ["C", "C++"]), "a c", "prompt must use words for C, C\\+\\+"),
    ],
)
def test_nothing_is_guessed(vocabulary: Vocabulary, prompt: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        condition_of(prompt, vocabulary)
    assert error.value.key == "prompt"


@pytest.fixture(scope="module")
def model(small_labels_run: Path) -> Model:
    return load(small_labels_run)


def answers(run: Path, *trees: tuple[str, dict[str, Any] | None], **sample: Any) -> list[Reply]:
    async def work() -> list[Reply]:
        tree = {"run": str(run), "serve": {"device": "cpu"}, "sample": {"steps": 4, **sample}}
        service = Models(settings(tree), Prometheus())
        app = build_app(service)
        await service.start()
        try:
            return [await request(app, path, body) for path, body in trees]
        finally:
            await service.stop()

    return asyncio.run(work())


def test_http_gives_the_images_of_sample_and_says_the_vocabulary(
    small_labels_run: Path, model: Model
) -> None:
    given = {"condition": "7", "guidance": 3.0, "guidance_interval": [0.1, 0.9], "seed": 2}
    body = {**given, "n": 3, "format": "npz"}
    samples, wrong, both, models = answers(
        small_labels_run,
        ("/v1/samples", body),
        ("/v1/samples", {"condition": "frog"}),
        ("/v1/samples", {"guidance": 2}),
        ("/v1/models", None),
    )
    expected, trace = model.sample(3, steps=4, trace=True, **given)  # type: ignore[call-overload]
    with np.load(io.BytesIO(samples.body)) as file:
        assert same(file["images"], pixels(expected))
    assert samples.headers["ddm-nfe"] == str(trace.calls)
    assert wrong.status == 422 and wrong.error["param"] == "condition"
    assert wrong.error["message"].startswith("condition must name one of the class names 0, 1")
    assert both.status == 422 and both.error["param"] == "guidance"
    (card,) = models.json["data"]
    assert card["vocabulary"] == {"kind": "label", "names": [str(digit) for digit in range(10)]}


def test_autoguidance_is_a_field_where_the_bundle_has_a_seed_model(
    small_run: Path, tmp_path: Path
) -> None:
    parts = Parts.of(read_bundle(small_run / "bundle"))
    seed_model = small_run / "experts" / "00" / "expert"
    write_bundle(tmp_path / "seeded", replace(parts, seed_model=(seed_model, 1.0)), "test")
    body = {"autoguidance": 2.0, "n": 2, "seed": 1, "format": "npz"}
    samples, models = answers(tmp_path / "seeded", ("/v1/samples", body), ("/v1/models", None))
    expected, trace = load(tmp_path / "seeded").sample(
        2, steps=4, seed=1, autoguidance=2.0, trace=True
    )
    with np.load(io.BytesIO(samples.body)) as file:
        assert same(file["images"], pixels(expected))
    assert samples.headers["ddm-nfe"] == str(trace.calls) == "16"
    assert models.json["data"][0]["seeded"] is True
    (wrong,) = answers(small_run, ("/v1/samples", body))
    assert wrong.status == 422 and wrong.error["param"] == "autoguidance"


def test_a_prompt_is_a_condition_and_the_answer_says_which(
    small_labels_run: Path, model: Model
) -> None:
    path = "/v1/images/generations"
    named, wrong, twice, plain, streamed = answers(
        small_labels_run,
        (path, {"prompt": "the digit seven", "seed": 2, "guidance": 2.0}),
        (path, {"prompt": "a unicorn"}),
        (path, {"prompt": "seven", "condition": "7"}),
        (path, {"prompt": "", "condition": "7", "seed": 2}),
        (path, {"prompt": "seven", "stream": True}),
    )
    (data,) = named.json["data"]
    assert data["revised_prompt"] == "7"
    assert named.json["usage"]["output_tokens"] == 2 * 4
    assert wrong.status == 422 and "'unicorn' is not one of them" in wrong.error["message"]
    assert (
        twice.status == 422 and "must be empty where condition is given" in twice.error["message"]
    )
    assert plain.status == 200 and "revised_prompt" not in plain.json["data"][0]
    assert b'"revised_prompt": "7"' in streamed.body.replace(b'":"', b'": "')


def test_a_request_without_a_condition_is_not_guided_by_the_services_own(
    small_labels_run: Path, model: Model
) -> None:
    default, none = answers(
        small_labels_run,
        ("/v1/samples", {"seed": 1, "format": "npz"}),
        ("/v1/samples", {"seed": 1, "format": "npz", "condition": {}}),
        condition="7",
        guidance=2.0,
    )
    assert (default.headers["ddm-nfe"], none.headers["ddm-nfe"]) == ("8", "4")
