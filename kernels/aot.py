"""Compile every kernel for every GPU without having one, and read off what it costs: a performance lint.

Each kernel is compiled as `cuda.plan` would launch it on a 4096 x 4096 weight. A row is one kernel, weight spec and
target:

    shared_bytes   shared memory per program
    registers      per thread
    spills         NVIDIA: bytes of local memory per thread; AMD: registers spilled
    global_loads   instructions that read global memory, unrolled copies counted, whatever their width
    async_copies   those of them that go straight to shared memory (cp.async)

A target this triton cannot compile for gives ok = false and the compiler's reason. results/aot.json keeps the table
and tests/test_aot.py compares. What it cannot show: speed, races, and whether the code is right (the interpreter
shows that).
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import matmul
from .cuda import Plan, plan, triple
from .lang import HAVE_TRITON, interpreted, need_triton
from .spec import Spec
from .tiles import Parts

if HAVE_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

CUDA = (60, 70, 75, 80, 86, 89, 90, 100, 120)
# Wavefront size of each AMD target.
HIP = {"gfx942": 64, "gfx1100": 32}
TARGETS = (*(f"sm_{c}" for c in CUDA), *HIP)

# Every width, group shape, zero point and scale storage at least once.
SPECS = (
    "affine1.g128.sym",
    "affine2.g64.asym",
    "affine3.g128.asym",
    "affine4.g128.asym",
    "affine4.g128.sym",
    "affine4.g32.asym",
    "affine4.g64.zf16",
    "affine4.channel.sym",
    "affine5.g128.asym",
    "affine6.g128.asym",
    "affine7.g128.asym",
    "affine8.g128.asym",
    "minifloat8.e4m3.channel.f32",
    "minifloat8.e4m3.g128x128.f32",
    "minifloat8.e5m2.tensor.f32",
    "codebook4.nf4.g64.f32",
    "codebook4.nf4.g64.u8:f32:256",
)
# (kernel, rows of x): gemv once per size of its accumulator.
KERNELS = (("gemv", 1), ("gemv", 8), ("gemm", 16), ("dequant", 128))
_SHAPE = (4096, 4096)
_POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "e8m0": "*u8", "asym": "*u8"}


@dataclass(frozen=True)
class Row:
    """One compilation. Numbers are None where the compiler does not tell."""

    kernel: str
    rows: int
    family: str
    spec: str
    target: str
    dtype: str
    ok: bool
    shared_bytes: int | None = None
    registers: int | None = None
    spills: int | None = None
    global_loads: int | None = None
    async_copies: int | None = None
    reason: str = ""


def table(
    targets: Iterable[str] = TARGETS,
    specs: Iterable[str] = SPECS,
    kernels: Iterable[tuple[str, int]] = KERNELS,
) -> Iterator[dict[str, Any]]:
    """Rows (as dicts, in INTERFACE order) of every kernel, spec and target asked for, compiled one after the other.

    Raises UserError where triton is missing or set to interpret.
    """
    need_triton("compiling kernels ahead of time")
    if interpreted():
        raise UserError(
            "compiling kernels ahead of time: TRITON_INTERPRET is set, so kernels are interpreted; unset it"
        )
    specs, kernels = list(specs), list(kernels)
    for target in targets:
        for spec in specs:
            for kernel, rows in kernels:
                yield asdict(compile_row(kernel, rows, Spec.parse(spec), target))


def compile_row(kernel: str, rows: int, spec: Spec, target: str) -> Row:
    """Compile one kernel; a compiler's refusal becomes a row with ok = False."""
    capability = int(target[3:]) if target.startswith("sm_") else 80
    dtype = "bf16" if capability >= 80 else "fp16"
    # Only sm_80 and newer launch gemm; the others compile it as sm_80 would launch it, to know that they can.
    how = plan(rows, _SHAPE, max(capability, 80) if kernel == "gemm" else capability)
    assert how.kernel == kernel, (how, kernel)
    found: dict[str, Any]
    try:
        compiled = triton.compile(_source(how, spec, dtype), target=_target(target), options=how.options)
        found = {"ok": True, "shared_bytes": int(compiled.metadata.shared), **_cost(compiled.asm)}
    except (RuntimeError, TritonError) as error:
        found = {"ok": False, "reason": _reason(error)}
    return Row(kernel=kernel, rows=rows, family=spec.family, spec=str(spec), target=target, dtype=dtype, **found)


def regressions(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[str]:
    """What got worse, a line each: a kernel that stopped compiling, shared_bytes or global_loads up by more than 10 %.

    Rows are matched by kernel, rows, spec and target; one that is only on one side is no regression.
    """
    known = {_key(row): row for row in before}
    found = []
    for row in after:
        old = known.get(_key(row))
        if old is None or not old["ok"]:
            continue
        name = " ".join(map(str, _key(row)))
        if not row["ok"]:
            found.append(f"{name}: no longer compiles: {row['reason']}")
            continue
        for field in ("shared_bytes", "global_loads"):
            if row[field] > 1.1 * old[field]:
                found.append(f"{name}: {field} rose from {old[field]} to {row[field]}")
    return found


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["rows"], row["spec"], row["target"]


def triton_version() -> str:
    """Of the triton that compiles here: another one's numbers are not comparable."""
    need_triton("compiling kernels ahead of time")
    return str(triton.__version__)


def _target(name: str) -> Any:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, HIP[name])


def _source(how: Plan, spec: Spec, dtype: str) -> Any:
    """The kernel with the argument types and alignments of a launch: pointers, N and K divide by 16."""
    fn = getattr(matmul, how.kernel)
    pointers = _pointers(spec)
    types: dict[str, Any] = {
        "x": f"*{dtype}",
        "y": "*fp32" if how.split > 1 else f"*{dtype}",
        "M": "i32",
        "N": "i32",
        "K": "i32",
    }
    types["parts"] = Parts(*(p or "constexpr" for p in pointers))
    constants: dict[Any, Any] = {"SPEC": spec, "TRIPLE": triple(spec.family), **how.tile}
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(fn.arg_names):
        if name == "parts":
            constants.update({(i, j): None for j, p in enumerate(pointers) if p is None})
            attributes.update({(i, j): [["tt.divisibility", 16]] for j, p in enumerate(pointers) if p})
        elif name in ("x", "y", "N", "K"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def _pointers(spec: Spec) -> Parts:
    """Pointer types of the parts a QTensor of this spec has."""
    level = spec.two_level
    return Parts(
        codes="*i32",
        scales="*u8" if level else _POINTERS[spec.scale],
        zeros=_POINTERS.get(spec.zero.removeprefix("z")),
        table="*fp32" if spec.family == "codebook" else None,
        super_scales=_POINTERS[level[0]] if level else None,
        scale_table="*fp32" if level and spec.family == "codebook" else None,
        scale_offset="*fp32" if level and spec.family == "codebook" else None,
    )


def _cost(asm: dict[str, Any]) -> dict[str, int | None]:
    if "ptx" in asm:
        copies = len(re.findall(r"\bcp\.async\.c[ag]", asm["ptx"]))
        loads = len(re.findall(r"\bld\.global", asm["ptx"])) + copies
        return {"global_loads": loads, "async_copies": copies, **_resources(asm["cubin"])}
    text = asm["amdgcn"]
    loads = len(re.findall(r"^\s*(?:global|buffer|flat)_load_", text, re.M))
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
    return {
        "global_loads": loads,
        "async_copies": 0,
        "registers": int(registers[1]) if registers else None,
        "spills": sum(map(int, spilled)) if spilled else None,
    }


def _resources(cubin: bytes) -> dict[str, int | None]:
    """Registers and local memory of a cubin, as the cuobjdump that comes with triton prints them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return {"registers": int(registers[1]) if registers else None, "spills": int(stack[1]) if stack else None}


def _reason(error: Exception) -> str:
    """The last informative line of a compiler's complaint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()] or lines
    return f"{type(error).__name__}: {told[-1] if told else ''}"[:300]
