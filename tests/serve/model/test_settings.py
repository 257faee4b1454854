"""The settings of sampling: names, ranges, what belongs together and what is refused."""

import inspect
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from ddm.errors import ConfigError
from ddm.schedules import schedule
from serve import SampleConfig, load
from serve.http.schemas import SampleRequest
from serve.model.model import Model
from serve.model.params import SETTINGS, SampleSettings, over


@pytest.mark.parametrize(
    ("name", "sampler", "said"),
    [
        (
            "rectified_flow",
            "ddpm",
            r"sample.sampler must be one of euler ddim heun dpmpp_2m unipc ipndm for RectifiedFlow.*got 'ddpm'",
        ),
        ("rectified_flow", "accelerated_ode", "it divides by a; got 'accelerated_ode'"),
        (
            "edm",
            "accelerated_sde",
            r"where a\^2 \+ s\^2 is 6401 at t = 1: it needs 1; got 'accelerated_sde'",
        ),
    ],
)
def test_a_sampler_that_the_schedule_does_not_define_is_refused(
    small_run: Path, name: str, sampler: str, said: str
) -> None:
    model = load(small_run)
    model.schedule = schedule(name)
    called: list[int] = []
    with pytest.raises(ConfigError, match=said):
        model.sample(1, sampler=sampler, steps=4, progress=called.append)
    with pytest.raises(ConfigError, match=said):
        model.settings(sampler=sampler, steps=4)
    assert not called
    assert model.settings(sampler="ddim", steps=4, grid="quadratic").steps == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, r"sample.steps must be a whole number in \[1, 1000\], got 0"),
        ({"steps": 2.5}, r"sample.steps must be a whole number in \[1, 1000\], got 2.5"),
        ({"sampler": "eular"}, "sample.sampler must be one of euler ddim heun .*, got 'eular'"),
        ({"policy": "best"}, "sample.policy must be one of full top_k .* adaptive, got 'best'"),
        (
            {"policy": "adaptive", "budget": 0.5},
            r"sample.budget must be a number in \[1, 1000000\], got 0.5",
        ),
        (
            {"control_variate": "best"},
            "sample.control_variate must be one of none gaussian, got 'best'",
        ),
        ({"order": 5}, r"sample.order must be a whole number in \[1, 4\], got 5"),
        (
            {"sampler": "unipc", "order": 1},
            r"sample.order must be in \[2, 3\] for sampler=unipc, got 1",
        ),
        (
            {"grid": "own"},
            r"sample.grid must not be own for VPLinear.*, which has no steps of its own",
        ),
        ({"source": "oracle"}, "sample.source must be one of prior .*, got 'oracle'"),
        ({"grid": "even"}, "sample.grid must be one of uniform_t .*, got 'even'"),
        (
            {"policy": "top_k", "top_k": 0},
            r"sample.top_k must be a whole number in \[1, 2147483648\], got 0",
        ),
        (
            {"policy": "nucleus", "nucleus_p": 1.5},
            r"sample.nucleus_p must be a number in \[1e-06, 1\], got 1.5",
        ),
        ({"temperature": 0}, r"sample.temperature must be a number in \[0.01, 100\], got 0"),
        (
            {"temperature": 0.009},
            r"sample.temperature must be a number in \[0.01, 100\], got 0.009",
        ),
        ({"temperature": 101}, r"sample.temperature must be a number in \[0.01, 100\], got 101"),
        (
            {"temperature": math.nan},
            r"sample.temperature must be a number in \[0.01, 100\], got nan",
        ),
        ({"step": 3}, "sample has no setting 'step'; it takes steps, sampler"),
        ({"seed": -1}, "sample.seed must be"),
        (
            {"first_index": 2**56},
            r"sample.first_index must be at most 2\^56 - n: a seed has so many",
        ),
        ({"first_index": -1}, r"sample.first_index must be a whole number in \[0, 2\^63\), got -1"),
        ({"batch": 0}, r"sample.batch must be a whole number in \[1, 2\^63\), got 0"),
    ],
)
def test_bad_settings_are_refused_by_name(
    small_run: Path, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(small_run).sample(1, **settings)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 0.5}, r"sample.budget must be a number in \[1, 1000000\], got 0.5"),
        ({"order": 5}, r"sample.order must be a whole number in \[1, 4\], got 5"),
        (
            {"control_variate": "best"},
            "sample.control_variate must be one of none gaussian, got 'best'",
        ),
        ({"temperature": -1.0}, r"sample.temperature must be a number in \[0.01, 100\], got -1.0"),
        ({"t_min": 1.0}, r"sample.t_min must be a number in \[0, 0.999\], got 1.0"),
    ],
)
def test_settings_are_refused_without_a_model(settings: dict[str, object], said: str) -> None:
    SampleConfig().check()
    with pytest.raises(ConfigError, match=said):
        SampleConfig(**settings).check()  # type: ignore[arg-type]


def test_an_interval_is_a_list_as_it_is_in_json() -> None:
    assert SampleConfig(guidance_interval=(0.2, 0.8)) == SampleConfig(guidance_interval=[0.2, 0.8])


def test_clusters_are_names_or_weights(small_run: Path) -> None:
    model = load(small_run)
    first, second, _ = model.names
    listed = model.settings(clusters=[first, second])
    assert listed == model.settings(clusters={second: 1, first: 1.0})
    assert hash(listed) == hash(model.settings(clusters={second: 1.0, first: 1}))
    assert listed != model.settings(clusters=[first])
    assert model.settings(clusters=[]) == model.settings(clusters={}) == model.settings()
    images = model.sample(3, steps=2, clusters=[first, second])
    assert images.equal(model.sample(3, steps=2, clusters={first: 1.0, second: 1.0}))


@pytest.mark.parametrize("clusters", [3, [["a"]], [None], {"a": "b"}, {"a": True}, {"a": []}])
def test_clusters_of_another_type_are_refused(clusters: object) -> None:
    with pytest.raises(ConfigError, match="^sample.clusters must be a list of clusters, or"):
        SampleConfig(clusters=clusters).check()


def test_every_setting_is_checked_at_both_ends_of_its_range() -> None:
    for setting in SETTINGS:
        needed = {"condition": "cat"} if setting.name == "guidance" else {}
        for key, beyond in (("low", -1), ("high", 1)):
            if (bound := setting.metadata[key]) is None:
                continue
            SampleConfig(**{setting.name: setting.type(bound)}, **needed).check()
            past = (
                bound + beyond if setting.type is int else math.nextafter(bound, beyond * math.inf)
            )
            for value in (past, math.nan, None, True, "1"):
                with pytest.raises(ConfigError, match=f"^sample.{setting.name} must ") as error:
                    SampleConfig(**{setting.name: value}, **needed).check()
                assert error.value.key == f"sample.{setting.name}"


def test_python_and_http_have_one_range_for_each_setting() -> None:
    properties = SampleRequest.model_json_schema()["properties"]
    for setting in SETTINGS:
        schema = properties[setting.name]
        value = schema["anyOf"][0]
        assert schema["description"] == setting.metadata["doc"]
        assert value.get("minimum") == setting.metadata["low"], setting.name
        assert value.get("maximum") == setting.metadata["high"], setting.name
        assert tuple(schema.get("enum", [None])[:-1]) == (setting.metadata["names"] or ())


def test_help_lists_every_setting_with_its_type_and_default() -> None:
    shown = inspect.signature(Model.sample).parameters
    types = get_type_hints(SampleSettings)
    assert list(types) == [setting.name for setting in SETTINGS]
    for setting in SETTINGS:
        assert shown[setting.name].default == getattr(SampleConfig(), setting.name)
        assert shown[setting.name].annotation == types[setting.name]
        assert setting.type in (types[setting.name], Any)
        assert setting.metadata["doc"] in (Model.sample.__doc__ or "")


@pytest.mark.parametrize(
    ("clusters", "said"),
    [
        ({"nobody": 1.0}, "sample.clusters must be one of .*, got 'nobody'"),
        ({"": 1.0}, "sample.clusters must be one of .*, got ''"),
    ],
)
def test_an_unknown_cluster_is_refused_with_the_list(
    small_run: Path, clusters: dict[str, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load(small_run).settings(clusters=clusters)
    assert error.value.key == "sample.clusters"
    assert all(name in str(error.value) for name in load(small_run).names)


@pytest.mark.parametrize(
    "weights", [[0.0], [-1.0], [math.nan], [math.inf], [1.0, -1.0], [0.0, 0.0]]
)
def test_bad_cluster_weights_are_refused(small_run: Path, weights: list[float]) -> None:
    model = load(small_run)
    with pytest.raises(
        ConfigError,
        match="sample.clusters must be .* a finite weight of at least 0 for each, not all 0",
    ):
        model.settings(clusters=dict(zip(model.names, weights, strict=False)))


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, "fast", True])
def test_a_switch_rate_that_cannot_be_is_refused_by_name(rate: object) -> None:
    with pytest.raises(ConfigError, match=r"sample.switch_rate must be a number in \[0, 1000\]"):
        SampleConfig(policy="switching", switch_rate=rate).check()  # type: ignore[arg-type]


def test_a_switch_rate_for_a_policy_without_one_is_refused_by_name() -> None:
    message = "sample.switch_rate must be left at 1 for policy=balanced, which has none, got 3"
    with pytest.raises(ConfigError, match=message):
        SampleConfig(policy="balanced", switch_rate=3).check()


def test_the_switch_rate_of_the_defaults_goes_with_their_policy() -> None:
    base = {"policy": "switching", "switch_rate": 4.0, "steps": 5}
    assert over(base, {"policy": "balanced"}) == {
        "policy": "balanced",
        "switch_rate": 1.0,
        "steps": 5,
    }
    assert over(base, {"steps": 7}) == {**base, "steps": 7}
    assert over(base, {"policy": "balanced", "switch_rate": 3.0})["switch_rate"] == 3.0
