"""ddm completion bash | zsh | fish

Prints a script that completes commands, shipped configs, stages, keys and their values:

  bash    ddm completion bash > ~/.local/share/bash-completion/completions/ddm
  zsh     ddm completion zsh > "${fpath[1]}/_ddm"
  fish    ddm completion fish > ~/.config/fish/completions/ddm.fish

All words are in the script, so that completing starts no Python; write it again after an update.
"""

# Its own, since argcomplete and shtab complete what argparse parses: options, not `key=value`.

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from benchmarks.load.__main__ import MODES
from ddm.errors import ConfigError
from ddm_cli import COMMANDS
from ddm_cli.bundle import ACTIONS, BundleCommand
from ddm_cli.evaluate import CompareCommand
from ddm_cli.sample import SampleCommand
from ddm_cli.terminal import run
from serve.model.loading import DEMO
from serve.settings import Settings
from train.config import COMMANDS as RUN_COMMANDS
from train.config import STAGES, Config, shipped_configs

SHELLS = ("bash", "zsh", "fish")


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    return run(words, _print)


def _print(words: list[str]) -> None:
    if len(words) != 1 or words[0] not in SHELLS:
        raise ConfigError(
            f"the shell must be one of {' '.join(SHELLS)}, got {' '.join(words) or 'none'}"
        )
    print(script(words[0]))


def script(shell: str) -> str:
    """The completion script of a shell."""
    match shell:
        case "bash":
            return _BASH.replace("COMMANDS", " ".join(COMMANDS)).replace("CASES", _cases())
        case "zsh":
            return _ZSH.replace("COMMANDS", " ".join(COMMANDS)).replace("CASES", _cases())
        case _:
            return "\n".join(_fish())


def words_of() -> dict[str, list[str]]:
    """What may follow each command: plain words, and keys with their `=`."""
    configs = shipped_configs()
    run_keys = [f"{key}=" for key, _ in keys_of(Config)]
    return {
        "train": [*configs, *STAGES, *RUN_COMMANDS, "--dry-run", *run_keys],
        "serve": [DEMO, *(f"{key}=" for key, _ in keys_of(Settings))],
        "sample": [DEMO, *(f"{key}=" for key, _ in keys_of(SampleCommand))],
        "evaluate": [f"{key}=" for key, _ in keys_of(CompareCommand)] + run_keys,
        "bundle": [*ACTIONS, *(f"{key}=" for key, _ in keys_of(BundleCommand))],
        "table": [*configs, "--out=", "--page=", *run_keys],
        "ablations": [*configs, "--out=", "--page=", *run_keys],
        "load": [DEMO, *MODES, "--clients=", "--requests=", "--rate=", "--out="],
        "import": ["diffusers"],
        "export": ["diffusers"],
        "completion": list(SHELLS),
    }


def values_of() -> dict[str, list[str]]:
    """The values of the keys that have few, as `key=value`, for each command that has such keys."""
    schemas: dict[str, list[Any]] = {
        "train": [Config],
        "serve": [Settings],
        "sample": [SampleCommand],
        "evaluate": [CompareCommand, Config],
        "table": [Config],
        "ablations": [Config],
    }
    return {
        command: [
            f"{key}={value}"
            for schema in schemas_of
            for key, values in keys_of(schema)
            for value in values
        ]
        for command, schemas_of in schemas.items()
    }


def keys_of(schema: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The keys of a config dataclass, such as `expert.steps`, and the values of those that have
    few.
    """
    hints = get_type_hints(schema)
    for field in fields(schema):
        members = get_args(hints[field.name]) or (hints[field.name],)
        inner = [member for member in members if isinstance(member, type) and is_dataclass(member)]
        if inner and get_origin(hints[field.name]) not in (list, dict):
            yield from keys_of(inner[0], f"{prefix}{field.name}.")
        else:
            values = field.metadata.get("names") or _choices(hints[field.name])
            yield f"{prefix}{field.name}", values


def _choices(hint: Any) -> tuple[str, ...]:
    if hint is bool:
        return ("true", "false")
    return tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()


def _cases() -> str:
    """For bash and zsh: what may follow a command, whose keys have values once there is a `=`."""
    words, values = words_of(), values_of()
    lines = []
    for command, found in words.items():
        quoted = " ".join(f"'{value}'" for value in values.get(command, []))
        lines += [
            f"    {command})",
            f"      keys=({' '.join(found)})",
            f"      values=({quoted})",
            "      ;;",
        ]
    return "\n".join(lines)


def _fish() -> Iterator[str]:
    """One `complete` for each command's words; fish filters them by what is typed."""
    yield "# Completion of ddm for fish: ddm completion fish"
    yield f"complete -c ddm -n __fish_use_subcommand -f -a '{' '.join(COMMANDS)}'"
    values = values_of()
    for command, words in words_of().items():
        seen = f"__fish_seen_subcommand_from {command}"
        yield f"complete -c ddm -n '{seen}' -a '{' '.join(words)}'"
        if values.get(command):
            typed = 'string match -q "*=*" -- (commandline -ct)'
            yield f"complete -c ddm -n '{seen}; and {typed}' -a '{' '.join(values[command])}'"


# readline replaces what follows the last `=` of the word under the cursor, if `=` breaks words.
_BASH = """# Completion of ddm for bash: ddm completion bash
_ddm() {
  local line="${COMP_LINE:0:COMP_POINT}" word keys=() values=() found
  word="${line##*[[:space:]]}"
  if [[ "$line" =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+[^[:space:]]*$ ]]; then
    COMPREPLY=($(compgen -W 'COMMANDS' -- "$word"))
    return
  fi
  case "${COMP_WORDS[1]}" in
CASES
  esac
  if [[ "$word" == *=* ]]; then found="${values[*]}"; else found="${keys[*]}"; fi
  COMPREPLY=($(compgen -W "$found" -- "$word"))
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
  fi
  if [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace; fi
}
complete -o default -o bashdefault -F _ddm ddm"""

_ZSH = """#compdef ddm
# Completion of ddm for zsh: ddm completion zsh
_ddm() {
  local -a keys values
  if (( CURRENT == 2 )); then
    compadd -- COMMANDS
    return
  fi
  case $words[2] in
CASES
  esac
  if [[ $PREFIX == *=* ]]; then
    compadd -- $values
  else
    compadd -S '' -- ${(M)keys:#*=}
    compadd -- ${keys:#*=}
  fi
  _files
}
if [[ $funcstack[1] == _ddm ]]; then _ddm "$@"; else compdef _ddm ddm; fi"""
