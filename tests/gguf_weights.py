"""Seeded weights that quantizers of GGUF types are compared on."""

import numpy as np
import torch
from torch import Tensor

ROWS, COLUMNS = 48, 512


def weights(shape: str) -> Tensor:
    """float32 [ROWS, COLUMNS], "gauss" or "student" (4 degrees of freedom)."""
    random = np.random.RandomState(7)
    size = (ROWS, COLUMNS)
    found = random.standard_normal(size) if shape == "gauss" else random.standard_t(4.0, size)
    return torch.from_numpy((0.05 * found).astype(np.float32))


def importance() -> Tensor:
    """float32 [COLUMNS]"""
    return torch.from_numpy((np.random.RandomState(9).standard_normal(COLUMNS) ** 2 + 0.01).astype(np.float32))


def error(w: Tensor, w_hat: Tensor, weight: Tensor | None) -> float:
    """Weighted RMSE."""
    squared = (w - w_hat).double().square()
    return float((squared if weight is None else squared * weight.double()).mean().sqrt())
