"""Fixtures every test may use: where the reference outputs lie, and what they hold."""

from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN_DIR = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of reference weights, outputs and shapes."""
    return GOLDEN_DIR


@pytest.fixture(scope="session")
def golden_cases() -> dict[str, dict[str, Any]]:
    """Reference inputs and outputs by case name; treat them as read-only (clone before changing one)."""
    return torch.load(GOLDEN_DIR / "small_cases.pt", weights_only=True)
