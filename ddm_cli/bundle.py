"""ddm bundle info RUN [signers=KEYS]                what is in a bundle, and who signed it
ddm bundle push RUN URL                           copy it to a new folder at a URL
ddm bundle pull URL FOLDER [version=HASH] [signers=KEYS]
                                                  copy one from a URL to a new folder
ddm bundle keygen NAME [out=FOLDER]               write NAME.key, which is secret, and NAME.pub
ddm bundle sign PATH key=NAME.key                 sign an expert's artifact, or a bundle

RUN is the folder of a run or of a bundle. URL is a folder or any URL that fsspec knows: s3://BUCKET/FOLDER,
gs://..., hf://OWNER/NAME, https://... to pull from; the package for it must be installed. Nothing is overwritten,
every hash is checked, and the same command goes on after an interruption.

PATH is an artifact of an expert, such as experts/00 or experts/00/expert.json, or the folder of a run or of a
bundle, whose manifest is signed. KEYS is a public key NAME.pub or a folder of them, NAME being who it belongs to:
with signers, a bundle must be signed by one of them. Keys and signatures are those of minisign (docs/commands.md).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddm.artifacts import check_is_file
from ddm.bundle import MANIFEST, read_bundle
from ddm.errors import ConfigError, one_of, require
from ddm_cli.terminal import parted, run
from serve.model.config_merge import filled
from serve.model.loading import bundle_folder
from serve.model.signatures import check_signed, make_key, read_signers, sign, signer
from train.publishing import files_of, pull, push

log = logging.getLogger(__name__)

ACTIONS = ("info", "push", "pull", "keygen", "sign")


@dataclass
class BundleCommand:
    """The keys of `ddm bundle`."""

    version: str | None = None
    signers: str | None = None
    out: str = "."
    key: str | None = None


_KEYS = {"info": {"signers"}, "pull": {"version", "signers"}, "keygen": {"out"}, "sign": {"key"}}


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    return run(words, _run)


def _run(words: list[str]) -> None:
    action, rest = (words[0], words[1:]) if words else ("nothing", [])
    if action not in ACTIONS:
        raise one_of("bundle", action, ACTIONS)
    what = {"push": ("RUN", "URL"), "pull": ("URL", "FOLDER"), "keygen": ("NAME",)}
    given, settings = parted(rest, *what.get(action, ("RUN",)))
    keys = filled(BundleCommand, *settings)
    for word in settings:
        if word.partition("=")[0] not in _KEYS.get(action, set()):
            raise ConfigError(f"bundle {action} has no key {word.partition('=')[0]!r}")
    signers = None if keys.signers is None else Path(keys.signers)
    match action:
        case "info":
            _info(bundle_folder(given[0]), signers)
        case "push":
            log.info("%s holds version %s", given[1], push(bundle_folder(given[0]), given[1]))
        case "pull":
            version = pull(given[0], Path(given[1]), keys.version, signers)
            log.info("%s holds version %s", given[1], version)
        case "keygen":
            for path in make_key(given[0], Path(keys.out)):
                log.info("%s", path)
        case _:
            require(keys.key is not None, "key", "be a file with a secret key", keys.key)
            log.info("%s", sign(_signed_file(Path(given[0])), Path(str(keys.key))))


def _signed_file(path: Path) -> Path:
    """The file that is signed for an artifact or a bundle. Raises `ArtifactError` if there is none."""
    if path.is_dir() and (path / "expert.json").exists():
        return path / "expert.json"
    if path.is_dir():
        check_is_file(bundle_folder(path) / MANIFEST)
        return bundle_folder(path) / MANIFEST
    found = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    check_is_file(found)
    return found


def _info(folder: Path, signers: Path | None) -> None:
    bundle = read_bundle(folder)
    bundle.check_weights()
    known = {} if signers is None else read_signers(signers)
    size = sum(path.stat().st_size for path in files_of(folder))
    print(f"{folder}: {bundle.mixture.k} experts, {size / 1e6:,.1f} MB")
    print(f"version   {bundle.version}")
    print(f"images    {' x '.join(map(str, bundle.mixture.shape))}")
    print(f"schedule  {bundle.schedule['name']}")
    print(f"manifest  {_who(bundle.manifest, known)}")
    mixture = bundle.mixture
    clusters = dict(
        zip(bundle.files, zip(mixture.names, mixture.pi.tolist(), strict=True), strict=True)
    )
    for artifact in bundle.artifacts:
        file, steps = artifact.stem.name, artifact.facts.get("steps", 0)
        name, pi = clusters.get(file, ("", 0.0))
        of = f"{name}, pi {pi:.3f}, " if name else ""
        print(f"{file}  {of}{steps} steps, {_who(artifact.json, known)}")
    if signers is not None:
        check_signed(folder, signers)


def _who(path: Path, known: dict[str, object]) -> str:
    who = signer(path, known)
    if who is None:
        return "not signed"
    return (
        f"signed by {who}" if who in known else f"with a signature by {who}, which is not checked"
    )
