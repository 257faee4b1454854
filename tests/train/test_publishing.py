"""Bundles at a URL, and who signed them."""

import asyncio
import shutil
import subprocess
from pathlib import Path

import fsspec
import pytest

from ddm.bundle import read_bundle
from ddm.bundle_writing import Parts, write_bundle
from ddm.errors import ArtifactError, ConfigError
from ddm_cli.bundle import main
from serve import load
from serve.engine.metrics import Metrics
from serve.engine.service import Service
from serve.model.loading import bundle_folder
from serve.model.signatures import read_signers, signer
from serve.settings import settings
from train.publishing import files_of, pull, push

DEMO = bundle_folder("demo")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/digits"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "copy")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("alice", "bob"):
        assert main(["keygen", name, f"out={tmp_path / 'keys'}"]) == 0
    return tmp_path / "keys"


def test_what_is_pushed_is_pulled_byte_for_byte(url: str, tmp_path: Path) -> None:
    assert push(DEMO, url) == push(DEMO, url)  # again: nothing to do
    version = pull(url, tmp_path / "new")
    assert version == read_bundle(DEMO).version
    for path in files_of(DEMO):
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()
    assert pull(url, tmp_path / "new") == version
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_is_a_url_too(tmp_path: Path) -> None:
    push(DEMO, str(tmp_path / "there"))
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == sorted(
        path.name for path in files_of(DEMO)
    )


def test_nothing_is_overwritten(url: str, tmp_path: Path) -> None:
    push(DEMO, url)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/digits/expert-01.json", b"{}")
    with pytest.raises(ConfigError, match=r"URL must be a new folder, .* its expert-01\.json"):
        push(DEMO, url)
    assert fs.cat_file("/bucket/digits/expert-01.json") == b"{}"
    fs.rm_file("/bucket/digits/expert-02.json")
    fs.pipe_file("/bucket/digits/manifest.json", b"{}")
    with pytest.raises(ConfigError, match=r"URL must be a new folder, .* its manifest\.json"):
        push(DEMO, url)
    assert not fs.exists("/bucket/digits/expert-02.json")  # nothing was written before that
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="FOLDER must be new or hold"):
        pull(url, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["expert-02.json", "expert-02.safetensors"])
def test_what_is_damaged_on_the_way_is_no_bundle(url: str, tmp_path: Path, name: str) -> None:
    push(DEMO, url)
    fs = fsspec.filesystem("memory")
    whole = fs.cat_file(f"/bucket/digits/{name}")
    fs.pipe_file(f"/bucket/digits/{name}", whole[:-2] + b"xx")
    with pytest.raises(ArtifactError, match="expert-02"):
        pull(url, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    fs.pipe_file(f"/bucket/digits/{name}", whole)
    pull(url, tmp_path / "new")  # goes on
    assert read_bundle(tmp_path / "new").version == read_bundle(DEMO).version


def test_an_interrupted_push_is_no_bundle_and_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    put, calls = type(fs).put_file, []

    def broken(self: object, *args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) > 3:
            raise OSError("the line is cut")
        put(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", broken)
    with pytest.raises(ArtifactError, match=r"memory://bucket/digits cannot be written: the line"):
        push(DEMO, url)
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        pull(url, tmp_path / "new")
    monkeypatch.setattr(type(fs), "put_file", put)
    push(DEMO, url)
    pull(url, tmp_path / "new")


def test_a_version_can_be_asked_for(url: str, tmp_path: Path) -> None:
    push(DEMO, url)
    with pytest.raises(ConfigError, match="version must be that of"):
        pull(url, tmp_path / "new", version="0" * 12)
    pull(url, tmp_path / "new", version=read_bundle(DEMO).version[:12])


def test_signatures_say_who_made_what(
    copy: Path, keys: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sign", str(copy / "expert-01.json"), f"key={keys / 'alice.key'}"]) == 0
    assert main(["sign", str(copy), f"key={keys / 'bob.key'}"]) == 0
    assert main(["info", str(copy), f"signers={keys}"]) == 0
    said = capsys.readouterr().out
    assert [line.split(", ")[-1] for line in said.splitlines() if line.startswith("expert")] == [
        "not signed",
        "signed by alice",
        *["not signed"] * 3,
    ]
    assert "manifest  signed by bob" in said
    push(copy, url)
    pull(url, tmp_path / "new", signers=keys)
    load(tmp_path / "new", experts=False, signers=keys / "bob.pub")
    with pytest.raises(
        ArtifactError, match=r"must be signed by one of alice, got key [0-9A-F]{16}"
    ):
        load(tmp_path / "new", experts=False, signers=keys / "alice.pub")
    with pytest.raises(ArtifactError, match="must be signed by one of alice bob, got no signature"):
        load(DEMO, experts=False, signers=keys)


def test_a_signature_that_comes_later_is_pulled(
    copy: Path, keys: Path, url: str, tmp_path: Path
) -> None:
    push(copy, url)
    pull(url, tmp_path / "new")
    assert main(["sign", str(copy), f"key={keys / 'bob.key'}"]) == 0
    push(copy, url)
    pull(url, tmp_path / "new", signers=keys)
    load(tmp_path / "new", experts=False, signers=keys / "bob.pub")


def test_nothing_of_another_bundle_stays_in_one_that_is_pulled(
    copy: Path, keys: Path, url: str, tmp_path: Path
) -> None:
    assert main(["sign", str(copy / "expert-01"), f"key={keys / 'alice.key'}"]) == 0
    push(copy, url)
    with pytest.raises(ArtifactError, match="must be signed by"):
        pull(url, tmp_path / "new", signers=keys)
    scratch = tmp_path / ".new.pull"
    (scratch / "expert-09.json").write_text("{}")
    push(DEMO, "memory://bucket/other")
    pull("memory://bucket/other", tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {p.name for p in files_of(DEMO)}


def test_a_bundle_is_pulled_into_the_current_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(DEMO, url)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["pull", url, "."]) == 0
    assert read_bundle(tmp_path / "here").version == read_bundle(DEMO).version


def test_a_server_with_signers_serves_what_they_signed_and_nothing_else(
    copy: Path, keys: Path
) -> None:
    main(["sign", str(copy), f"key={keys / 'bob.key'}"])
    tree = {"run": str(copy), "serve": {"signers": str(keys / "bob.pub")}}
    service = Service(settings(tree), Metrics())
    with pytest.raises(ArtifactError, match="must be signed by one of bob, got no signature"):
        asyncio.run(service.switch(DEMO))
    with pytest.raises(ConfigError, match="serve.signers must be a file or a folder with NAME.pub"):
        Service(settings({**tree, "serve": {"signers": str(copy)}}), Metrics())


def test_an_owner_s_signature_goes_into_new_bundles(copy: Path, keys: Path, tmp_path: Path) -> None:
    main(["sign", str(copy / "expert-01"), f"key={keys / 'alice.key'}"])
    write_bundle(tmp_path / "next", Parts.of(read_bundle(copy)), "a test")
    main(["sign", str(tmp_path / "next"), f"key={keys / 'bob.key'}"])
    load(tmp_path / "next", experts=False, signers=keys)
    assert signer(tmp_path / "next" / "expert-01.json", read_signers(keys)) == "alice"


def test_the_program_minisign_reads_keys_and_signatures(copy: Path, keys: Path) -> None:
    if shutil.which("minisign") is None:
        pytest.skip("needs minisign")
    main(["sign", str(copy), f"key={keys / 'alice.key'}"])
    words = ["minisign", "-V", "-p", keys / "alice.pub", "-m", copy / "manifest.json"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_signature_of_something_else_is_refused(copy: Path, keys: Path) -> None:
    main(["sign", str(copy / "expert-01.json"), f"key={keys / 'alice.key'}"])
    main(["sign", str(copy), f"key={keys / 'alice.key'}"])
    (copy / "expert-01.json.minisig").rename(copy / "expert-02.json.minisig")
    with pytest.raises(ArtifactError, match=r"expert-02\.json is not what alice signed"):
        load(copy, experts=False, signers=keys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steal"], "bundle must be one of info push pull keygen sign, got 'steal'"),
        (["info", "demo", "key=x"], "bundle info has no key 'key'"),
        (["sign", str(DEMO)], "key must be a file with a secret key, got None"),
        (["sign", str(DEMO), "key=nowhere"], "key must be a secret key of minisign, got 'nowhere'"),
        (["info", "demo", "signers=."], "signers must be a file or a folder with NAME.pub files"),
        (["push", "demo", "foo://x"], "URL must be a folder or a URL that fsspec knows"),
        (["pull", "memory://nothing/here", "x"], "memory://nothing/here/manifest.json is missing"),
    ],
)
def test_bad_words_are_refused(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
