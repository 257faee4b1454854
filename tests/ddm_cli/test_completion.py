"""The completion scripts, by the shells that are on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ddm_cli import COMMANDS
from ddm_cli.completion import SHELLS, keys_of, script, words_of
from train.config import Config

# What is typed, some of what it completes to, and what it must not.
TYPED = [
    ("ddm ", {"train", "serve", "completion"}, {"digits"}),
    ("ddm train cifar10_t", {"cifar10_tiny"}, {"digits"}),
    ("ddm train expert.ste", {"expert.steps="}, {"expert.batch="}),
    ("ddm serve serve.ray.serv", {"serve.ray.services="}, {"run="}),
    ("ddm sample form", {"format="}, {"format=sheet"}),
]
VALUES = ("ddm train sample.policy=ba", {"sample.policy=balanced"})


def replies(shell: str, typed: str, folder: Path) -> set[str]:
    """What a shell completes the typed line to."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    file = folder / f"ddm.{shell}"
    file.write_text(script(shell))
    match shell:
        case "bash":
            code = (
                f"source {file}; COMP_LINE='{typed}'; COMP_POINT=${{#COMP_LINE}}; "
                "COMP_WORDBREAKS=$' \\t\\n=:'; read -ra COMP_WORDS <<<\"$COMP_LINE\"; "
                'compopt() { :; }; _ddm; printf "%s\\n" "${COMPREPLY[@]}"'
            )
            words = ["bash", "--norc", "-c", code]
        case "fish":
            words = ["fish", "--no-config", "-c", f"source {file}; complete -C '{typed}'"]
        case _:  # zsh completes in an interactive line alone: its own builtins are stood in for
            code = (
                "compdef() { :; }; _files() { :; }\n"
                "compadd() { local -a found; [[ $1 == -S ]] && shift 2; shift;"
                ' print -rl -- "${(@M)@:#$PREFIX*}"; }\n'
                f"source {file}; typed='{typed}'; words=(${{=typed}});"
                ' [[ $typed == *" " ]] && words+=(""); CURRENT=$#words; PREFIX=$words[-1]; _ddm'
            )
            words = ["zsh", "-f", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("typed", "there", "absent"), TYPED)
def test_words_are_completed(
    shell: str, typed: str, there: set[str], absent: set[str], tmp_path: Path
) -> None:
    found = replies(shell, typed, tmp_path)
    assert there <= found
    assert not absent & found


@pytest.mark.parametrize("shell", SHELLS)
def test_values_are_completed(shell: str, tmp_path: Path) -> None:
    typed, there = VALUES
    # readline replaces what follows the `=` alone.
    wanted = {word.partition("=")[2] for word in there} if shell == "bash" else there
    assert replies(shell, typed, tmp_path) == wanted


def test_every_command_has_words() -> None:
    assert list(words_of()) == list(COMMANDS)


def test_keys_have_their_choices() -> None:
    found = dict(keys_of(Config))
    assert found["expert.unet.channels"] == ()
    assert found["accelerator"] == ("auto", "cpu", "gpu")
    assert "posterior" in found["sample.source"]
    assert found["sample.clip"] == ("true", "false")
    assert found["seed_model.data.name"]
