"""Signatures of artifacts and bundles, in the format of minisign, so that its own program signs and
verifies them as well: `minisign -S -m expert.json`, `minisign -V -p NAME.pub -m expert-00.json`.

What is signed is the JSON of an artifact, which holds the hash of its weights, or the manifest of a
bundle, which holds the hashes of all artifacts. FILE.minisig is beside it.
"""

import base64
import os
from getpass import getpass
from pathlib import Path
from typing import Any

from ddm.artifacts import naming, replaced
from ddm.bundle import MANIFEST, signature_of
from ddm.errors import ArtifactError, ConfigError, require

try:
    import minisign
except ImportError:
    minisign = None


def make_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.key, which signs and stays secret, and NAME.pub; returns both.

    Raises `ConfigError` if one of them exists.
    """
    plain = name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    require(plain and not name.startswith("."), "name", "have letters, digits, - _ and .", name)
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (secret, public):
        require(not path.exists(), "keygen", "write new files", str(path))
    pair = _minisign().KeyPair.generate()
    with naming(secret, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(pair.secret_key) + b"\n")
    with replaced(public) as scratch:
        scratch.write_bytes(bytes(pair.public_key) + b"\n")
    return secret, public


def sign(path: Path, key: Path) -> Path:
    """Sign a file with a secret key, of `make_key` or of minisign's own program; returns the file
    of the signature. A key with a password asks for it.

    Raises `ConfigError` if the key cannot be used or the file is signed already.
    """
    target = signature_of(path)
    require(not target.exists(), "sign", "be given what is not signed yet", str(target))
    program = _minisign()
    try:
        with program.SecretKey.from_file(key) as secret:
            if secret.is_encrypted():
                secret.decrypt(getpass(f"password of {key}: "))
            signature = secret.sign_file(path, prehash=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"key must be a secret key of minisign, got {str(key)!r}: {error}"
        ) from error
    with replaced(target) as scratch:
        scratch.write_bytes(bytes(signature) + b"\n")
    return target


def read_signers(path: Path) -> dict[str, Any]:
    """Public keys by the names of their files: of one file, or of all NAME.pub in a folder.

    Raises `ConfigError` if there is none, or naming a file that is not a public key.
    """
    files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
    require(bool(files), "signers", "be a file or a folder with NAME.pub files", str(path))
    found = {}
    for file in files:
        try:
            found[file.stem] = _minisign().PublicKey.from_file(file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"signers must be public keys of minisign, got {str(file)!r}: {error}"
            ) from error
    return found


def signer(path: Path, signers: dict[str, Any]) -> str | None:
    """The name of who signed a file: of one of the signers, `key ID` for another; None for nobody.

    Raises `ArtifactError` if the signature of a signer is not that of this file.
    """
    file = signature_of(path)
    if not file.exists():
        return None
    try:
        with naming(file, "read"):
            signature = _minisign().Signature.from_bytes(file.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{file} is damaged: it is not a signature of minisign") from error
    key_id = _key_id(bytes(signature).splitlines()[1])
    for name, key in signers.items():
        if _key_id(key.to_base64()) == key_id:
            try:
                key.verify(path.read_bytes(), signature)
            except ValueError as error:
                raise ArtifactError(
                    f"{path} is not what {name} signed: the signature does not belong to it"
                ) from error
            return name
    return f"key {key_id}"


def check_signed(folder: Path, path: Path) -> None:
    """Check a bundle's signatures against the signers in `path`: its manifest must be signed by one
    of them, and no artifact may carry a signature that is not its own.

    Raises `ArtifactError` naming the file, and who signed it.
    """
    signers = read_signers(path)
    for file in sorted(folder.glob("*.json")):
        who = signer(file, signers)
        if file.name == MANIFEST and who not in signers:
            raise ArtifactError(
                f"{file} must be signed by one of {' '.join(signers)}, got {who or 'no signature'}"
            )


def _key_id(line: bytes) -> str:
    """As minisign prints it, of the base64 of a key or a signature."""
    return base64.b64decode(line)[2:10][::-1].hex().upper()


def _minisign() -> Any:
    if minisign is None:
        raise ConfigError("signatures must have the package py-minisign: pip install py-minisign")
    return minisign
