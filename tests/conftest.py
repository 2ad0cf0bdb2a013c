"""Fixtures every test file may use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("models/books-8m")` is that path of the material beside the checkout, or a skip that says what is missing."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"{path} is absent: this test needs the shared material beside the checkout")
        return path

    return find


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
