"""The model whose images the engine must sample."""

from pathlib import Path

import pytest

from serve import load
from serve.model.model import Model


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)
