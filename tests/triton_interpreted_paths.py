"""BITSMITH_KERNELS where Triton's interpreter makes every kernel possible: only what is forced launches.

Run by test_triton.py, as triton_interpreted.py is.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from bitsmith.kernels import fused, transform, transform_device
from bitsmith.kernels.paths import takes_triton


class _Launched(Exception):
    pass


class _Kernel:
    def __getitem__(self, grid: Any) -> NoReturn:
        raise _Launched


def steps() -> dict[str, Callable[[], Any]]:
    x, angle = torch.randn(3, 4, 64), torch.randn(3, 64)
    return {
        "norm": lambda: fused.rms_norm(x, x[0, 0], 1e-5, "llama"),
        "rope": lambda: fused.rope(x, x, angle, angle, False),
        "gated": lambda: fused.gated(x, x, "silu"),
        "hadamard": lambda: transform.rotate(x[0], None, 64, True),
    }


@pytest.mark.parametrize("path", ["", "triton", "cpu", "reference"])
@pytest.mark.parametrize("name", steps())
def test_only_what_is_forced_launches(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("norm_kernel", "rope_kernel", "gated_kernel"):
        monkeypatch.setattr(fused, kernel, _Kernel())
    monkeypatch.setattr(transform_device, "launch", lambda *arguments: _Kernel()[arguments])
    monkeypatch.setenv("BITSMITH_KERNELS", path)
    step, launches = steps()[name], path in ("", "triton")
    assert takes_triton(torch.zeros(1)) is launches
    if launches:
        with pytest.raises(_Launched):
            step()
    else:
        step()
