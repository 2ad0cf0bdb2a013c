"""The compiled library of `kernels/cpp/`: found, checked, its functions declared."""

import ctypes
import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

# Of native.cpp's functions and structures.
_ABI = 19


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where the package was built without a compiler."""
    found = sorted(Path(__file__).parent.glob("_native*.so")) + sorted(Path(__file__).parent.glob("_native*.pyd"))
    if not found:
        log.info("no native CPU kernels in this installation (no C++ compiler when it was built): using torch's own")
        return None
    lib = ctypes.CDLL(str(found[-1]))
    if getattr(lib, "bitsmith_abi", lambda: 0)() != _ABI:
        log.warning("%s was built from other sources: run `pip install -e .` again; using torch's own", found[-1])
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    products = ("linear", "floats", "two_level_linear", "grids_linear")
    lib.bitsmith_unpack.argtypes = [pointer, size, size, number, pointer, number]
    lib.bitsmith_pack.argtypes = [pointer, size, size, size, size, number, pointer, number]
    lib.bitsmith_pack_groups.argtypes = [pointer, size, size, size, size, number, pointer]
    lib.bitsmith_pack_blocks.argtypes = [pointer, number]
    lib.bitsmith_pack_levels.argtypes = [pointer, size, size, number, number, pointer]
    lib.bitsmith_unpack_levels.argtypes = lib.bitsmith_pack_levels.argtypes
    lib.bitsmith_pack_groups.argtypes = [pointer, size, size, size, size, number, pointer]
    lib.bitsmith_codes.argtypes = [pointer, size, size, size, number, pointer, number]
    lib.bitsmith_run.argtypes = [pointer, size]
    lib.bitsmith_invoker.argtypes, lib.bitsmith_invoker.restype = [pointer], pointer
    for name in products:
        getattr(lib, f"bitsmith_{name}").argtypes = [pointer, pointer, number, size, pointer, number, number, number]
    for name in (
        *products,
        "pack",
        "pack_groups",
        "pack_blocks",
        "unpack",
        "pack_levels",
        "unpack_levels",
        "codes",
        "run",
    ):
        getattr(lib, f"bitsmith_{name}").restype = None
    return lib
