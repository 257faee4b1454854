"""Training on a Ray cluster: trials of Ray Tune, their processes, and the owners of data."""

import os

# Read when Ray is imported, and inherited by its processes.
_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # our table is shown instead
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # train.stopping answers
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
for _key, _value in _ENV.items():
    os.environ.setdefault(_key, _value)
