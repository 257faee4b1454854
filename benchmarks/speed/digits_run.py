"""A run to serve and to load: the digits' config, with networks that have hardly been trained."""

import atexit
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = (
    *("partition", "expert", "router", "bundle", "expert.steps=1", "expert.warmup_steps=0"),
    *("router.steps=2", "router.switch_step=1", "router.warmup_steps=0", "expert.workers=0"),
)


@cache
def digits_run() -> Path:
    """The folder of the run, made once and removed at the end of the process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [sys.executable, "-m", "train", "digits", *WORDS, f"run={folder / 'digits'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no run was made"])[-1])
    return folder / "digits"
