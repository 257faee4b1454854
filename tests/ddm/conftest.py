"""The bundle that tests here damage."""

from pathlib import Path

import pytest

from tests.ddm.bundles import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path)
    made.write()
    return made
