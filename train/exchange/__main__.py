"""ddm import diffusers FOLDER [key=value ...]    ddm export diffusers RUN FOLDER

From the checkout: python -m train.exchange import diffusers FOLDER.

import  makes an artifact of a diffusers UNet2DModel, or of a pipeline's in unet/: a network that an expert, the seed model
        or a single model starts from (expert.init=OUT), or that is an expert of a bundle as it is (bundle.experts=[OUT]).
        Only config.json, scheduler_config.json and safetensors are read; diffusers need not be installed.
        Keys: out=OUT shard=SHARD name=NAME count=IMAGES size=SIDE, and what the scheduler's file does not say:
        prediction_type beta_schedule beta_start beta_end num_train_timesteps rescale_betas_zero_snr (docs/diffusers.md).
export  writes a run's or a bundle's experts and router, with a pipeline.py that samples the mixture where diffusers is
        installed and ddm is not.
"""

import logging
import sys
from pathlib import Path

from ddm.errors import ConfigError, DdmError, one_of


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status: 2 for an error that the user can mend."""
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(words)
    except (DdmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(words: list[str]) -> None:
    command, *rest = words
    if command not in ("import", "export"):
        raise one_of("the command", command, ("import", "export"))
    named = [word for word in rest if "=" not in word]
    keys = [word for word in rest if "=" in word]
    usual = "FOLDER" if command == "import" else "RUN FOLDER"
    if len(named) != 1 + len(usual.split()):
        raise ConfigError(f"give {command} diffusers {usual}, got {' '.join(rest) or 'nothing'}")
    if named[0] != "diffusers":
        raise one_of("the format", named[0], ("diffusers",))
    if command == "import":
        from serve.model.config_merge import filled  # imports torch
        from train.exchange.incoming import ImportConfig, import_diffusers

        import_diffusers(Path(named[1]), filled(ImportConfig, *keys))
        return
    if keys:
        raise ConfigError(f"export takes no keys, got {keys[0]}")
    from train.exchange.outgoing import export_diffusers

    export_diffusers(named[1], Path(named[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
