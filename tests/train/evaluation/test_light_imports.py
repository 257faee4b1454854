"""Reading a config loads neither metrics nor plots."""

import subprocess
import sys


def test_the_config_imports_no_metrics() -> None:
    program = (
        "import sys, train.config\n"
        "print(*{'torchmetrics', 'matplotlib', 'lightning', 'ray'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
