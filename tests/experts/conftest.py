"""What every test here starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers from torch's own generator, alone or among others."""
    torch.manual_seed(0)
