"""python -m train [CONFIG] [stage ...] [key=value ...]

Stages: partition expert router bundle monolith sample evaluate, in this order; none named means all. What is up to date is
skipped, what was cut off resumes. CONFIG is a YAML file; none named means the built-in digits. Every key of it can be
given a value: expert.steps=1000 sample.policy=stochastic run=runs/another. One expert alone: expert expert.index=3.
"""

import logging
import sys
from pathlib import Path

from ddm.errors import ConfigError, DdmError
from train.config import STAGES, default_config, load_config


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        overrides = [word for word in words if "=" in word]
        stages = [word for word in words if word in STAGES]
        paths = [word for word in words if "=" not in word and word not in STAGES]
        if len(paths) > 1 or any(not path.endswith((".yaml", ".yml")) for path in paths):
            raise ConfigError(
                f"a word must be a config (*.yaml), a stage ({' '.join(STAGES)}) or key=value, got {paths[-1]!r}"
            )
        config = load_config(Path(paths[0]) if paths else default_config(), overrides)
        from train.stages.run import run  # here, so that a typo need not wait for Lightning

        run(config, stages or STAGES)
    except DdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Lightning answers the first with the second
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
