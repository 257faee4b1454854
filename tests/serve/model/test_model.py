import inspect
import json
import math
import shutil
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from ddm.bundle_writing import write_half
from ddm.errors import ArtifactError, ConfigError
from ddm.gaussian import moments
from ddm.partition import Partition
from ddm.rng import RngStream, normal
from ddm.samplers import SAMPLERS, drive, sample
from ddm.samplers import start as trajectory_of
from ddm.schedules import schedule
from router.policies import POLICIES
from router.sources import SOURCES
from serve import SampleConfig, load
from serve.http.schemas import SampleRequest
from serve.model.loading import load_experts
from serve.model.model import Model
from serve.model.params import SETTINGS, SampleSettings


@pytest.mark.parametrize(
    ("policy", "sampler"),
    [
        *(
            (policy, "dpmpp_2m")
            for policy in ("balanced", "adaptive", "stochastic", "fixed", "full")
        ),
        *(("balanced", sampler) for sampler in SAMPLERS if sampler != "dpmpp_2m"),
        ("adaptive", "heun"),
        ("stochastic", "ddpm"),
    ],
)
def test_an_image_is_the_same_alone_and_among_others(
    small_run: Path, policy: str, sampler: str
) -> None:
    model = load(small_run)
    settings = {
        "seed": 0,
        "steps": 6,
        "policy": policy,
        "sampler": sampler,
        "control_variate": "gaussian",
    }
    many, traced = model.sample(8, trace=True, **settings)
    one, alone = model.sample(1, first_index=3, trace=True, **settings)
    assert torch.equal(traced.chosen[:, 3], alone.chosen[:, 0])
    assert torch.allclose(many[3], one[0], atol=1e-4)
    assert (many[3] - many[4]).abs().max() > 0.05


def test_the_size_of_the_batch_changes_no_image(small_run: Path) -> None:
    model = load(small_run)
    whole, by_three = (model.sample(8, seed=1, steps=5, batch=batch) for batch in (8, 3))
    assert torch.allclose(whole, by_three, atol=1e-4)


def test_another_seed_gives_other_images(small_run: Path) -> None:
    model = load(small_run)
    assert (model.sample(2, seed=0, steps=3) - model.sample(2, seed=1, steps=3)).abs().mean() > 0.05


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_source_goes_with_every_policy(small_run: Path, source: str, policy: str) -> None:
    images, trace = load(small_run).sample(3, steps=4, source=source, policy=policy, trace=True)
    assert images.dtype == torch.float32
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert torch.allclose(trace.alpha.sum(dim=2), torch.ones(4, 3), atol=1e-5)
    assert trace.calls == int(trace.chosen.sum())


def test_a_trace_counts_calls_per_expert(small_run: Path) -> None:
    model = load(small_run)
    assert model.sample(5, steps=4, policy="balanced", trace=True)[1].calls == 5 * 4
    assert model.sample(5, steps=4, policy="full", trace=True)[1].calls == 5 * 4 * 3
    assert model.sample(5, steps=4, policy="top_k", top_k=2, trace=True)[1].calls == 5 * 4 * 2


def calls_of(sampler: str, steps: int) -> int:
    """Denoiser calls in so many steps to t = 0: the last one needs no second."""
    return 2 * steps - 1 if sampler in ("heun", "accelerated_ode") else steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_with_every_policy_and_its_calls_are_counted(
    small_run: Path, sampler: str
) -> None:
    model, n, steps = load(small_run), 2, 3
    calls = calls_of(sampler, steps)
    for policy in POLICIES:
        images, trace = model.sample(n, steps=steps, sampler=sampler, policy=policy, trace=True)
        assert images.isfinite().all() and images.abs().max() <= 1, policy
        assert (images[0] - images[1]).abs().max() > 0.05, policy
        assert len(trace.t) == calls and trace.calls == int(trace.chosen.sum())
        match policy:
            case "full":
                assert trace.calls == n * calls * 3
            case "nucleus":
                assert n * calls <= trace.calls <= n * calls * 3
            case "adaptive":  # a second expert in one of the three steps at most
                assert n * calls <= trace.calls <= n * (calls + math.ceil(calls / steps))
            case _:
                assert trace.calls == n * calls, policy


def test_a_choice_is_held_within_a_step_of_two_calls(
    small_run: Path,
) -> None:
    _, trace = load(small_run).sample(
        8, steps=5, sampler="heun", policy="stochastic", source="prior", trace=True
    )
    first, second = trace.chosen[0:8:2], trace.chosen[1:8:2]
    assert first.equal(second)
    assert not any(one.equal(other) for one, other in pairwise(trace.chosen[0:9:2]))


def test_adaptive_spends_its_budget_where_alpha_is_even(
    small_run: Path,
) -> None:
    model = load(small_run)
    for budget, calls in ((1.0, 8), (1.25, 10), (1.5, 12), (2.0, 16)):
        settings = {"steps": 8, "source": "prior", "policy": "adaptive", "budget": budget}
        assert model.sample(3, trace=True, **settings)[1].calls == 3 * calls


def test_the_order_of_unipc_changes_the_images_from_the_third_step(small_run: Path) -> None:
    model = load(small_run)
    for steps, differs in ((2, False), (6, True)):
        settings = {"steps": steps, "sampler": "unipc", "source": "prior", "policy": "full"}
        third, second = (model.sample(2, order=order, **settings) for order in (3, 2))
        assert ((third - second).abs().max() > 1e-4) == differs
        assert torch.equal(model.sample(2, **settings), third)  # the default


def test_the_gaussians_are_those_of_the_clusters_in_their_order(small_run: Path) -> None:
    model, cut = load(small_run), Partition.read(small_run / "partition")
    for k in range(3):
        mean, variance = moments(cut.cluster(small_run / "partition", k)["images"])
        torch.testing.assert_close(model.gaussians.means[k], mean)
        torch.testing.assert_close(model.gaussians.variances[k], variance)
    assert model.gaussians.schedule == model.schedule
    assert (model.gaussians.means[0] - model.gaussians.means[1]).abs().max() > 0.1


def test_the_control_variate_adds_the_gaussians_of_the_rest_of_alpha(
    small_run: Path,
) -> None:
    model = load(small_run)
    settings = {"steps": 1, "clip": False, "source": "prior", "policy": "balanced"}
    plain, trace = model.sample(4, trace=True, control_variate="none", **settings)
    controlled = model.sample(4, control_variate="gaussian", **settings)
    noise = normal(0, RngStream.START, torch.arange(4), 0, model.shape)
    x = noise * model.schedule(torch.ones(())).s
    left = trace.alpha[0] - trace.chosen[0].float()
    expected = plain + model.gaussians.mix(x, torch.ones(()), left)
    torch.testing.assert_close(controlled, expected, rtol=1e-4, atol=1e-5)
    assert (controlled - plain).abs().max() > 0.1


def test_the_control_variate_is_the_default_and_does_nothing_for_fixed_or_full(
    small_run: Path,
) -> None:
    model = load(small_run)

    def both(policy: str) -> tuple[Tensor, Tensor]:
        plain, controlled = (
            model.sample(4, steps=4, policy=policy, control_variate=c) for c in ("none", "gaussian")
        )
        assert torch.equal(controlled, model.sample(4, steps=4, policy=policy))
        return plain, controlled

    assert SampleConfig().control_variate == "gaussian"
    assert torch.equal(*both("fixed"))
    assert torch.allclose(*both("full"), atol=1e-5)
    for policy in ("balanced", "adaptive", "stochastic", "top_k"):
        plain, controlled = both(policy)
        assert (plain - controlled).abs().max() > 1e-2, policy


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


def rewrite(bundle: Path, name: str, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    """Write an artifact of a bundle anew, with all hashes right."""
    write_artifact(
        bundle / name, tensors, {key: value for key, value in facts.items() if key != "sha256"}
    )
    manifest = read_json(bundle / "manifest.json")
    manifest["artifacts"][name] = sha256(bundle / f"{name}.json")
    write_json(bundle / "manifest.json", manifest)


def without(bundle: Path, name: str, tensor: str) -> None:
    """Take one tensor from an artifact of a bundle."""
    tensors, facts = read_artifact(bundle / name)
    del tensors[tensor]
    rewrite(bundle, name, tensors, facts)


@pytest.mark.parametrize("tensor", ["gaussian.mean", "gaussian.variance"])
def test_an_expert_without_the_moments_of_its_cluster_is_refused_by_name(
    small_run: Path, tmp_path: Path, tensor: str
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    without(bundle, "expert-02", tensor)
    with pytest.raises(
        ArtifactError,
        match=rf"expert-02.safetensors does not fit .*expert-02.json: it has no tensor {tensor}$",
    ):
        load(bundle)


def test_a_bundle_carried_away_gives_the_same_images(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "bundle", tmp_path / "elsewhere")
    there, here = load(tmp_path / "elsewhere"), load(small_run)
    assert there.version == here.version
    assert torch.equal(there.sample(2, steps=3), here.sample(2, steps=3))
    with pytest.raises(ConfigError, match="source=analytic needs the training images"):
        there.sample(1, source="analytic")


def test_a_clipped_image_differs_only_where_it_would_leave_the_range(small_run: Path) -> None:
    model = load(small_run)
    free = model.sample(4, steps=1, clip=False)
    assert torch.allclose(model.sample(4, steps=1, clip=True), free.clamp(-1, 1), atol=1e-6)


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


def test_the_representation_says_what_the_model_is(small_run: Path) -> None:
    model = load(small_run)
    said = repr(model)
    words = ("3 of 0.0", "float32", "posterior and derivative nets", "1 x 8 x 8", "VPLinear", "cpu")
    for part in (*model.names, *words):
        assert part in said
    assert model.version[:12] in said


def test_progress_counts_each_step_of_each_image_once(small_run: Path) -> None:
    for sampler in ("ddim", "heun"):
        seen: list[int] = []
        load(small_run).sample(5, steps=4, batch=3, sampler=sampler, progress=seen.append)
        assert seen == [3] * 4 + [2] * 4


def test_a_model_that_is_dropped_frees_its_memory_at_once(small_run: Path) -> None:
    model = load(small_run)
    model.sample(1, steps=2, source="analytic")
    gone = weakref.ref(model)
    del model
    assert gone() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_file(
    small_run: Path, tmp_path: Path, value: float
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    tensors, facts = read_artifact(bundle / "expert-01")
    name = "network.head.2.weight"
    tensors[name][0, 1, 2, 0] = value
    rewrite(bundle, "expert-01", tensors, facts)
    for read in (load, lambda folder: load_experts(folder, [1])):
        with pytest.raises(
            ArtifactError, match=f"expert-01.safetensors is damaged: {name} must be finite numbers"
        ):
            read(bundle)


def test_images_that_are_not_finite_are_never_returned(small_run: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    tensors, facts = read_artifact(bundle / "expert-01")
    huge = {name: tensor * 1e30 for name, tensor in tensors.items()}
    rewrite(bundle, "expert-01", huge, facts)
    with pytest.raises(
        ArtifactError, match=r"manifest.json: images 0 to 3 of seed 0 are not finite"
    ):
        load(bundle).sample(4, steps=2, policy="full", source="prior", clip=False)


def test_half_precision_weights_run_in_float32(small_run: Path, tmp_path: Path) -> None:
    write_half(small_run / "bundle", tmp_path / "half")
    half = load(tmp_path / "half")
    assert {p.dtype for p in half.experts[0].parameters()} == {torch.float32}
    whole = load(small_run)
    assert (half.sample(2, steps=3) - whole.sample(2, steps=3)).abs().max() < 0.1
    kernel = half.experts[0].network.encoder.stem.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_trajectory_ends_at_t_min(small_run: Path) -> None:
    model = load(small_run)
    settings = {
        "steps": 9,
        "policy": "top_k",
        "source": "prior",
        "control_variate": "none",
        "grid": "uniform_t",
        "clip": False,
    }
    images, trace = model.sample(3, t_min=0.1, trace=True, **settings)
    torch.testing.assert_close(trace.t, torch.linspace(1, 0.1, 10, dtype=torch.float64)[:-1])
    assert (images - model.sample(3, **settings)).abs().max() > 0.05


def test_no_images_are_refused(small_run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sample.n must be a whole number in \[1, 2\^63\), got 0"
    ):
        load(small_run).sample(0)


def test_a_changed_weight_is_refused_with_file_and_hashes(small_run: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    path = bundle / "expert-01.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError,
        match=r"expert-01.safetensors is damaged or foreign: its SHA-256 is \w{64}, expected \w{64}",
    ):
        load(bundle)


def test_an_expert_of_another_run_is_refused_even_with_its_hash_in_the_manifest(
    small_run: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    facts = json.loads((bundle / "expert-01.json").read_text())
    (bundle / "expert-01.json").write_text(json.dumps({**facts, "cluster": "0" * 64}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["artifacts"]["expert-01"] = sha256(bundle / "expert-01.json")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match="expert-01.json does not belong to this bundle: its cluster is '000"
    ):
        load(bundle)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        load(tmp_path)


# Clusters, and the parts that serving takes


def test_a_single_cluster_is_its_expert_alone(small_run: Path) -> None:
    model = load(small_run)
    for k, name in enumerate(model.names):
        for policy in ("full", "balanced", "top_k"):
            settings = {"steps": 4, "policy": policy, "control_variate": "none", "clip": False}
            images, trace = model.sample(2, trace=True, clusters={name: 2.0}, **settings)
            start = normal(0, RngStream.START, torch.arange(2), 0, model.shape)
            with torch.inference_mode():
                at_one = start * model.schedule(torch.ones(())).s
                plan = ("ipndm", 4, "cosine")
                alone = sample(model.experts[k], at_one, model.schedule, *plan)
            assert trace.chosen.equal(torch.eye(3, dtype=torch.bool)[k].expand(4, 2, 3))
            assert trace.calls == 4 * 2
            torch.testing.assert_close(images, alone.float(), rtol=1e-4, atol=1e-4)


def test_cluster_weights_multiply_alpha(small_run: Path) -> None:
    model = load(small_run)
    first, second, third = model.names
    settings = {"steps": 1, "policy": "full", "source": "posterior", "trace": True}
    plain, weighted = (
        model.sample(3, **settings, **more)[1].alpha[0]
        for more in ({}, {"clusters": {first: 3.0, third: 0.5}})
    )
    left = plain * torch.tensor([3.0, 0.0, 0.5])
    torch.testing.assert_close(weighted, left / left.sum(dim=1, keepdim=True))
    same = dict.fromkeys((first, second, third), 7.0)
    torch.testing.assert_close(
        model.sample(3, steps=4, clusters=same), model.sample(3, steps=4), rtol=0, atol=1e-5
    )


def test_temperature_raises_alpha_to_its_inverse(
    small_run: Path,
) -> None:
    model = load(small_run)
    settings = {"steps": 4, "source": "posterior", "policy": "stochastic", "trace": True}
    (images, plain), (same, _) = (
        model.sample(6, **settings, **more) for more in ({}, {"temperature": 1.0})
    )
    assert images.equal(same)
    for temperature in (0.25, 4.0):
        cooled, trace = model.sample(6, **settings, temperature=temperature)
        power = plain.alpha[0].double() ** (
            1 / temperature
        )  # at the first step all are at the same noise
        torch.testing.assert_close(
            trace.alpha[0].double(), power / power.sum(dim=1, keepdim=True), rtol=1e-4, atol=0
        )
        assert (cooled - images).abs().max() > 1e-3


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


def test_an_expert_loads_without_the_files_of_the_others(small_run: Path, tmp_path: Path) -> None:
    model = load(small_run)
    x, t = torch.randn(2, *model.shape), torch.tensor([0.9, 0.2])
    for k in range(3):
        bundle = tmp_path / f"{k}"
        bundle.mkdir()
        for name in ("manifest.json", f"expert-{k:02d}.json", f"expert-{k:02d}.safetensors"):
            shutil.copyfile(small_run / "bundle" / name, bundle / name)
        (expert,), shape, version = load_experts(bundle, [k])
        assert (shape, version) == (model.shape, model.version)
        assert not expert.training and not any(p.requires_grad for p in expert.parameters())
        torch.testing.assert_close(expert(x, t), model.experts[k](x, t))
    assert load_experts(small_run, [1])[2] == model.version


def test_a_missing_or_damaged_expert_is_refused_by_name(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="bundle has no expert 3, it has 3"):
        load_experts(small_run, [3])
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    without(bundle, "expert-02", "gaussian.mean")
    with pytest.raises(
        ArtifactError,
        match="expert-02.safetensors does not fit .*expert-02.json: it has no tensor gaussian.mean",
    ):
        load(bundle)
    path = bundle / "expert-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="expert-01.safetensors is damaged or foreign"):
        load_experts(bundle, [1])
    assert load_experts(bundle, [0])


def test_a_model_without_its_experts_routes_as_the_whole_one(small_run: Path) -> None:
    whole, bare = load(small_run), load(small_run, experts=False)
    assert bare.experts == [] and len(whole.experts) == 3
    assert bare.version == whole.version and bare.names == whole.names
    x, half = torch.randn(2, *whole.shape), torch.full((2,), 0.5, dtype=torch.float64)
    for source in SOURCES:
        routed = []
        for model in (whole, bare):
            router = model.plan(model.settings(source=source)).router
            alpha, memory = router.route(x, torch.tensor(1.0), router.start(x, half), half)
            routed.append((alpha, router.route(x, torch.tensor(0.6), memory, half)[0]))
        torch.testing.assert_close(routed[0], routed[1])
    torch.testing.assert_close(bare.gaussians.means, whole.gaussians.means)


def test_a_bundle_with_a_damaged_expert_is_refused_without_experts_too(
    small_run: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    path = bundle / "expert-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="expert-01.safetensors is damaged or foreign"):
        load(bundle, experts=False)


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "euler_maruyama", "accelerated_sde"])
def test_a_plan_samples_as_the_samplers_do(small_run: Path, name: str) -> None:
    model = load(small_run)
    plan = model.plan(model.settings(sampler=name, steps=5, grid="quadratic", t_min=0.02))
    index = torch.tensor([4, 9])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * (1 - t.to(x).reshape(-1, *(1,) * (x.ndim - 1)))

    start = normal(3, RngStream.START, index, 0, model.shape) * model.schedule(torch.ones(())).s
    torch.testing.assert_close(plan.start(3, index), start)
    found, calls = drive(plan.trajectory(plan.start(3, index), 3, index), denoise)
    by_hand = trajectory_of(
        start, model.schedule, name, 5, "quadratic", seed=3, index=index, t_min=0.02
    )
    expected, _ = drive(by_hand, denoise)
    torch.testing.assert_close(found, expected)
    assert calls == (10 if name == "heun" else 5)


def test_a_plan_is_cached_by_its_settings_and_holds_no_state(
    small_run: Path,
) -> None:
    model = load(small_run)
    plan = model.plan(model.settings(steps=3))
    assert model.plan(model.settings(steps=3)) is plan
    other = model.plan(model.settings(steps=4, sampler="heun"))
    assert other is not plan and other.router is plan.router
    assert model.plan(model.settings(steps=3, relaxation_rate=1.0)).router is not plan.router
    for seed in range(5):
        model.sample(2, seed=seed, steps=3)
    assert plan.schedule.cache_info().currsize <= 4  # the times of its grid
    for top_k in range(1, 200):
        model.plan(model.settings(policy="top_k", top_k=top_k))
    assert model._cached_plan.cache_info().currsize == 64
    assert model._cached_router.cache_info().currsize == 64
