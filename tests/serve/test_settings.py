"""The keys of `python -m serve`: every refusal names its key."""

import re
from pathlib import Path

import pytest

from ddm.errors import ConfigError
from serve.engine.shares import Key
from serve.model.params import SampleConfig
from serve.settings import Settings, settings

RUN = {"run": "runs/digits"}


def test_words_stand_above_the_tree_and_the_tree_above_the_defaults() -> None:
    found = settings(
        {**RUN, "serve": {"port": 9000, "limits": {"n": 8}}, "sample": {"steps": 9}},
        ["serve.port=9001", "sample.clusters={a: 2, b: 0.5}", "serve.ray.resources={slot: 1}"],
    )
    expected = Settings(run="runs/digits")
    expected.serve.port, expected.serve.limits.n = 9001, 8
    expected.sample = SampleConfig(steps=9, clusters={"a": 2.0, "b": 0.5})
    expected.serve.ray.resources = {"slot": 1.0}
    assert found == expected


def test_a_word_replaces_an_object_of_the_user_s_keys_and_leaves_the_rest_of_a_section() -> None:
    tree = {
        "run": "one",
        "sample": {"clusters": {"a": 2}, "steps": 7},
        "serve": {
            "ray": {"resources": {"slot": 1}, "gpus": 2},
            "keys": {"a": {"token_file": "a"}},
        },
    }
    words = ["sample.clusters=[b]", "sample.clusters={b: 1}", "sample={t_min: 0.1}"]
    more = ["serve.ray.resources={}", "serve.keys={b: {token_file: b, weight: 2}}"]
    found = settings(tree, [*words, *more])
    assert (found.sample.clusters, found.sample.steps, found.sample.t_min) == ({"b": 1}, 7, 0.1)
    assert (found.serve.ray.resources, found.serve.ray.gpus) == ({}, 2)
    assert {name: key.weight for name, key in found.serve.keys.items()} == {"b": 2}


def test_the_defaults_are_safe_and_make_sense_themselves() -> None:
    found = settings(RUN)
    assert (found.serve.host, found.serve.open, found.serve.token_file) == (
        "127.0.0.1",
        False,
        None,
    )
    assert found.keys() == {}


@pytest.mark.parametrize(
    ("word", "key", "said"),
    [
        ("run=''", "run", "run must be the folder of a run or of a bundle, got ''"),
        ("serve.port=65536", "serve.port", "must be in [0, 65535], got 65536"),
        ("serve.port=-1", "serve.port", "must be in [0, 65535], got -1"),
        ("serve.port=web", "serve.port", "'web'"),
        ("serve.port=null", "serve.port", "None"),
        ("serve.port", "serve.port", "None"),
        ("serve.prot=80", "serve.prot", "Key 'prot' not in 'ServeConfig'"),
        ("server.port=80", "server", "Key 'server' not in 'Settings'"),
        ("serve=3", "serve", "int is not a subclass of ServeConfig"),
        ("serve.limits=3", "serve.limits", "int is not a subclass of LimitsConfig"),
        ("serve.placement=moon", "serve.placement", "'moon'"),
        ("serve.degraded=maybe", "serve.degraded", "'maybe'"),
        ("serve.open=perhaps", "serve.open", "'perhaps'"),
        ("serve.max_batch=0", "serve.max_batch", "must be above 0, got 0"),
        ("serve.max_active=0", "serve.max_active", "must be above 0, got 0"),
        ("serve.call_timeout_s=0", "serve.call_timeout_s", "must be above 0, got 0"),
        ("serve.retry_s=.nan", "serve.retry_s", "must be above 0, got nan"),
        ("serve.limits.n=0", "serve.limits.n", "must be above 0, got 0"),
        ("serve.limits.steps=-1", "serve.limits.steps", "must be above 0, got -1"),
        ("serve.limits.body_bytes=0", "serve.limits.body_bytes", "must be above 0, got 0"),
        ("serve.limits.body_timeout_s=0", "serve.limits.body_timeout_s", "must be above 0, got 0"),
        ("serve.limits.pending=0", "serve.limits.pending", "must be above 0, got 0"),
        ("serve.limits.deadline_s=-2", "serve.limits.deadline_s", "must be above 0, got -2"),
        ("serve.ray.replicas=0", "serve.ray.replicas", "must be above 0, got 0"),
        (
            "serve.ray.experts_per_replica=0",
            "serve.ray.experts_per_replica",
            "must be above 0, got 0",
        ),
        ("serve.ray.services=0", "serve.ray.services", "must be above 0, got 0"),
        ("serve.ray.gpus=-1", "serve.ray.gpus", "must be at least 0, got -1"),
        ("serve.ray.cpus=-1", "serve.ray.cpus", "must be at least 0, got -1"),
        ("serve.ray.service_cpus=-1", "serve.ray.service_cpus", "must be at least 0, got -1"),
        (
            "serve.ray.max_replicas=0",
            "serve.ray.max_replicas",
            "must be at least serve.ray.replicas, got 0",
        ),
        ("serve.ray.resources={a: b}", "serve.ray.resources.a", "'b'"),
        ("serve.ray.resources={a", "serve.ray.resources", "while parsing"),
        ("run=[", "run", "while parsing"),
        ("sample.steps=0", "sample.steps", "must be a whole number in [1, 1000], got 0"),
        ("sample.sampler=best", "sample.sampler", "must be one of euler"),
        ("sample.clusters=[[a]]", "sample.clusters", "must be a list of clusters, or"),
        ("sample.clusters={a: -1}", "sample.clusters", "finite weight of at least 0 for each"),
        ("sample.clusters={a: .inf}", "sample.clusters", "finite weight of at least 0 for each"),
        ("sample.clusters={a: 0}", "sample.clusters", "not all 0"),
    ],
)
def test_a_word_that_makes_no_sense_is_refused_by_its_key(word: str, key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        settings(RUN, ["serve.max_batch=32", word])
    assert error.value.key == key
    assert str(error.value).startswith(key)


def test_a_tree_that_makes_no_sense_is_refused_by_its_key() -> None:
    for tree, key in (
        ({}, "run"),
        ({"run": None}, "run"),
        ({**RUN, "serve": 3}, "serve"),
        ({**RUN, "serve": {"port": "web"}}, "serve.port"),
        ({**RUN, "serve": {"limits": {"m": 1}}}, "serve.limits.m"),
        ({**RUN, "simple": {}}, "simple"),
    ):
        with pytest.raises(ConfigError) as error:
            settings(tree)
        assert error.value.key == key


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_a_host_beyond_this_machine_is_refused_without_a_token_unless_told_to(host: str) -> None:
    tree = {**RUN, "serve": {"host": host}}
    with pytest.raises(
        ConfigError, match="serve.host must be this machine's own .* unless serve.token_file"
    ) as error:
        settings(tree)
    assert error.value.key == "serve.host"
    assert settings(tree, ["serve.open=true"]).serve.host == host
    assert settings(tree, ["serve.token_file=token"]).serve.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_s_own_hosts_need_no_token(host: str) -> None:
    assert settings(RUN, [f"serve.host={host}"]).serve.host == host


def test_keys_have_tokens_of_their_own_and_quotas(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}-token\n")
    words = [
        f"serve.keys.alice.token_file={tmp_path / 'a'}",
        "serve.keys.alice.weight=2",
        "serve.keys.alice.requests=3",
        f"serve.keys.bob.token_file={tmp_path / 'b'}",
        "serve.host=0.0.0.0",
    ]
    alice = Key("alice", weight=2, requests=3)
    assert settings(RUN, words).keys() == {"a-token": alice, "b-token": Key("bob")}
    for more, said in (
        (f"serve.keys.bob.token_file={tmp_path / 'a'}", "serve.keys.bob.token_file must hold a"),
        ("serve.keys.bob.weight=0", "serve.keys.bob.weight must be above 0, got 0"),
        ("serve.keys.bob.requests=0", "serve.keys.bob.requests must be above 0, got 0"),
        ("serve.keys.default.weight=1", "serve.keys must not be named default"),
        ("serve.keys.bob.wait=0", "serve.keys.bob.wait"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings(RUN, [*words, more]).keys()


def test_a_webhook_secret_that_cannot_sign_is_refused_by_key(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    config = settings(RUN, [f"serve.jobs.webhook_secret_file={path}"])
    path.write_text("whsec_abc")
    with pytest.raises(ConfigError, match="serve.jobs.webhook_secret_file must hold base64 after"):
        config.webhook_secret()
    for secret in ("sesame", "whsec_c2VzYW1l"):
        path.write_text(secret)
        assert config.webhook_secret() == secret


def test_the_token_is_what_its_file_holds_and_a_file_without_one_is_refused_by_key(
    tmp_path: Path,
) -> None:
    path = tmp_path / "token"
    config = settings(RUN, [f"serve.token_file={path}"])

    def refused() -> None:
        with pytest.raises(
            ConfigError, match="serve.token_file must be a file with a token"
        ) as error:
            config.keys()
        assert error.value.key == "serve.token_file"

    refused()
    for content in (b"", b" \n", b"\xff\xfe\x80"):
        path.write_bytes(content)
        refused()
    path.write_text("  s3cret\n")
    assert config.keys() == {"s3cret": Key("default")}
    path.unlink()
    path.mkdir()
    refused()
