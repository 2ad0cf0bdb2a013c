"""Triton where there is one, and names that import without it where there is none.

Every module with device code takes `jit` and `tl` from here, so that importing it needs neither a GPU nor triton:
without triton a kernel is a `_NoKernel` that raises UserError when it is called or launched, and `tl.constexpr` means
nothing.

`EXACT` goes with every launch and every ahead-of-time compilation. Triton 3.6 to 3.9 fuse a * b + c unless told
otherwise (3.10 turns that round), and a fused decode differs from its torch twin in the last bit. Who wants a fused
multiply-add writes `tl.fma`.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import UserError

EXACT = {"enable_fp_fusion": False}

INSTALL = (
    "this needs triton 3.6 to 3.9, which is not installed: pip install 'bitsmith[triton]' (Linux), "
    "or use device='cpu', which needs none"
)


class _Absent:
    """Stands for `triton.language`: any attribute is again absent, so `tl.constexpr` can stand in a signature."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self


class _NoKernel:
    """A kernel that cannot run here."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.__name__, self.__doc__ = fn.__name__, fn.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(f"{self.__name__}: {INSTALL}")

    def __getitem__(self, grid: Any) -> NoReturn:
        raise UserError(f"{self.__name__}: {INSTALL}")


def _no_jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    return _NoKernel(fn) if fn is not None else _NoKernel


try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
    jit: Any = triton.jit
except ImportError:
    HAVE_TRITON = False
    tl = _Absent()
    jit = _no_jit


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 set before the first import)."""
    return HAVE_TRITON and bool(triton.knobs.runtime.interpret)


def need_triton(what: str) -> None:
    """Raise UserError, naming `what`, where triton is missing."""
    if not HAVE_TRITON:
        raise UserError(f"{what}: {INSTALL}")
