"""ddm train [CONFIG] [stage ...] [key=value ...] [--dry-run]          (in the checkout: python -m train ...)

Stages: partition seed_model expert router bundle monolith sample evaluate, in this order; all of them if none is named. A
stage is skipped if its output exists and its inputs are unchanged; an interrupted one resumes. CONFIG is a YAML file or the
name of one of the shipped ones, such as cifar10_tiny; by default the built-in digits. Every key of it can be given a value:
expert.steps=1000 sample.policy=stochastic run=runs/another. One expert alone: expert expert.index=3. With --dry-run nothing
is written: each stage's parameters, memory, time and disk are printed, and what would be refused is refused.

Commands, which run only if they are named (docs/owners.md):
  export   write each cluster of the partition as a shard, a folder that holds all that its owner needs
  shard    make a shard from images of one's own: shard.images=FOLDER shard.name=NAME
  answer   answer the router's questions about a shard from its owner's machine, a node of a Ray cluster:
           expert.shard=FOLDER launch.backend=ray launch.address=auto
  grow     add an expert to the bundle: update.expert=PATH, or one trained here from expert.shard=FOLDER
  retrain  put one in the place of another: update.cluster=NAME and the same
  remove   take one out: update.cluster=NAME
  reroute  train the bundle's router on for the experts that it now has
An owner trains from one with expert expert.shard=FOLDER; bundle bundle.experts=[PATH, PATH] takes the artifacts of anyone.
"""

import gc
import logging
import sys

from ddm_cli import check_packages

check_packages()  # before any of them is imported

from ddm.errors import ConfigError, DdmError, require  # noqa: E402
from train import stopping  # noqa: E402

log = logging.getLogger(__name__)


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status.

    0: done; 1: an error of the program, with its traceback; 2: an error that the user can mend; 128 + N: signal N.
    """
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with stopping.on_signals():
            _run(words)
    except stopping.Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except DdmError as error:
        return _refuse(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        return _refuse(f"{error.filename}: {reason}" if error.filename else reason)
    except Exception:
        log.exception("an error of the program, not of its input:")
        return 1
    return 0


def _run(words: list[str]) -> None:
    from train.config import (  # imports torch
        COMMANDS,
        STAGES,
        config_file,
        load_config,
        shipped_configs,
    )

    gc.freeze()  # torch stays: collections, such as the one at exit, need not look at it
    overrides = [word for word in words if "=" in word]
    stages = [word for word in words if word in (*STAGES, *COMMANDS)]
    known = (*STAGES, *COMMANDS, "--dry-run")
    named = [word for word in words if "=" not in word and word not in known]
    unknown = [word for word in named if config_file(word) is None]
    if unknown or len(named) > 1:
        raise ConfigError(
            f"a word must be a config (*.yaml, or one of {' '.join(shipped_configs())}), a stage ({' '.join(STAGES)}), "
            f"a command ({' '.join(COMMANDS)}) or key=value, got {(unknown or named[1:])[0]!r}"
        )
    config = load_config(config_file(named[0]) if named else None, overrides)
    if "--dry-run" in words:
        for word in stages:
            require(word in STAGES, "--dry-run", f"be of stages ({' '.join(STAGES)})", word)
        from train.dry_run import dry_run as run  # here: it imports Lightning, which takes seconds
    else:
        from train.stages.run import run

    run(config, stages or STAGES)


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
