"""What is seen of training while it goes on: the keys `watch`."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from ddm.errors import ConfigError, require


@dataclass
class WatchConfig:
    """What is seen of networks while they learn. It changes no weight, and may change between two calls.

    logger: where losses, learning rates and speeds go besides losses.txt: `none`, or one of
        Lightning's loggers, into the folder `log` of each network
    validate_every: but for the router: steps between validations on the held-out images, raw and averaged,
        by band of t, into validation.csv; 0 for none
    sheet_every: likewise: steps between contact sheets of the same 16 images, into the folder `sheets`; 0
        for none
    """

    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    validate_every: int = 0
    sheet_every: int = 0

    def check(self, holdout: float) -> None:
        """Raise `ConfigError` naming the key `watch.…`; `holdout`: the fraction that is held out."""
        for key in ("validate_every", "sheet_every"):
            value = getattr(self, key)
            require(value >= 0, f"watch.{key}", "be at least 0", value)
        rule = "be 0 where nothing is held out (partition.holdout=0)"
        every = self.validate_every
        require(every == 0 or holdout > 0, "watch.validate_every", rule, every)
        if self.logger in ("tensorboard", "wandb") and find_spec(self.logger) is None:
            raise ConfigError(
                f"watch.logger={self.logger} needs the package {self.logger}, which is not "
                f"installed: pip install {self.logger}",
                "watch.logger",
            )
