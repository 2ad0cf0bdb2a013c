"""Which implementation `BITSMITH_KERNELS` forces, for debugging: one switch for products, attention, norms, rotary
embedding, gated activations, Hadamard transforms and the samplers' end.

    reference    the torch twins, in the model's own order: no native library, no Triton, nothing fused or prepacked
    cpu          the native library, and torch's operators where it has none
    triton       Triton's kernels, and torch's operators where there is none; CPU tensors need TRITON_INTERPRET=1

Unset, device and dtype choose. Products and what a model's modules are replaced by are chosen once, at load; the small
steps ask at every call, which costs 0.8 us and nothing in a recorded step.
"""

import os

from torch import Tensor

from ..errors import UserError
from .lang import HAVE_TRITON, INSTALL, interpreted

PATHS = ("reference", "triton", "cpu")


def forced() -> str:
    """The path that BITSMITH_KERNELS asks for, "" if none. UserError if there is no such path."""
    path = os.environ.get("BITSMITH_KERNELS", "")
    if path and path not in PATHS:
        raise UserError(
            f"BITSMITH_KERNELS is {path!r}; accepted: {', '.join(PATHS)}, or unset to choose by device and dtype"
        )
    return path


def native_allowed() -> bool:
    """Whether steps may take the native library, where it has them."""
    return forced() in ("", "cpu")


def takes_triton(x: Tensor) -> bool:
    """Whether a step on `x` takes its Triton kernel. UserError where it is forced to and cannot."""
    path = forced()
    if path in ("reference", "cpu"):
        return False
    if HAVE_TRITON and (x.is_cuda or interpreted()):
        return True
    if path == "triton":
        problem = f"the tensors are on {x.device}: set TRITON_INTERPRET=1 (slow, for debugging)"
        raise UserError(f"BITSMITH_KERNELS is 'triton' but {problem if HAVE_TRITON else INSTALL}; or unset it")
    return False
