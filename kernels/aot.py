"""Compile every kernel for every GPU without having one, and read off what it costs: a performance lint.

Each kernel is compiled as it would be launched: the modules of `MODULES` say how (cases.py). A row is one kernel,
weight spec (or variant) and target:

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
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from .cases import Case, Target, Weight
from .codebook import FIXED, VALUES
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

# Every width, group shape, zero point, scale storage and kind of table at least once.
SPECS = (
    "affine1.g128.sym",
    "affine2.g64.asym",
    "affine3.g128.asym",
    "affine4.g128.asym",
    "affine4.g128.sym",
    "affine4.g32.asym",
    "affine4.g64.zf16",
    "affine4.g64.zbf16.bf16",
    "affine4.channel.sym",
    "affine5.g128.asym",
    "affine6.g128.asym",
    "affine7.g128.asym",
    "affine8.g128.asym",
    "affine2.g64.one",
    "affine4.g32.min",
    "affine4.g32.min.u6:f16:8",
    "affine6.g16.sym.s8:f16:16",
    "minifloat8.e4m3.channel.f32",
    "minifloat8.e4m3.g128x128.f32",
    "minifloat8.e5m2.tensor.f32",
    "minifloat4.e2m1.g32.e8m0",
    "minifloat4.e2m1.g16.ue4m3",
    "codebook4.nf4.g64.f32",
    "codebook4.nf4.g64.u8:f32:256",
    "codebook1.sign.g128",
    "codebook4.iq4nl.g32.s6:f16:8",
    "codebook4.rowtable.channel",
    "codebook8.v4.channel",
    "codebook8.v8.x2.channel",
    "codebook12.v8.channel",
    "codebook16.v8.channel",
    "codebook11.iq1s.v8.g32.u4:f16:8",
    "codebook12.iq1m.v8.g16.u3:f16:16",
    "codebook15.iq2xxs.v8.g32.u4:f16:8",
    "codebook18.iq2s.v8.g16.u4:f16:16",
    "codebook23.iq3xxs.v8.g32.u4:f16:8",
    "codebook26.iq3s.v8.g32.u4:f16:8",
    "trellis1.3inst",
    "trellis2.mcg",
    "trellis3.mcg",
    "trellis4.mul1",
    "trellis5.3inst",
    "trellis6.mcg",
    "trellis7.mul1",
    "trellis8.mcg",
)
# Compiled for float16 too where bfloat16 is usual: a weight of each family, and what surrounds the products.
HALF = {
    "affine4.g128.asym",
    "minifloat8.e4m3.channel.f32",
    "codebook4.nf4.g64.u8:f32:256",
    "trellis3.mcg",
    "affine8.channel.sym",
    "llama",
    "half",
    "silu",
    "had128",
    "kv.none.d128",
}
# Modules with an `aot_cases`, in the order of the table.
# The last by name alone, being above this folder: codecs bring device code of their own.
MODULES = ("cuda", "grouped", "scaled", "fused", "sample", "transform_device", "paged", ".kv_quant.base")
_POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "e8m0": "*u8", "ue4m3": "*u8", "asym": "*u8"}


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


def cases(target: str) -> Iterator[Case]:
    """Everything that would be launched on `target`, module by module; then some of it for a model in float16, where
    that is not what the rest is in."""
    capability = int(target[3:]) if target.startswith("sm_") else 80
    yield from _cases(Target(target, capability, "bf16" if capability >= 80 else "fp16"))
    if capability >= 80:
        for case in _cases(Target(target, capability, "fp16")):
            if case.spec in HALF:
                yield replace(case, spec=f"{case.spec}.fp16")


def _cases(target: Target) -> Iterator[Case]:
    weights = [Weight(spec, _pointers(spec)) for spec in map(Spec.parse, SPECS)]
    for module in MODULES:
        yield from import_module(f".{module}", __package__).aot_cases(target, weights)


def table(
    targets: Iterable[str] = TARGETS,
    specs: Iterable[str] | None = None,
    kernels: Iterable[tuple[str, int]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows (as dicts, in INTERFACE order) of every case of the targets, compiled one after the other.

    specs, kernels: only those weight specs or variants, and those (kernel, rows). Raises UserError where triton is
    missing or set to interpret.
    """
    need_triton("compiling kernels ahead of time")
    if interpreted():
        raise UserError(
            "compiling kernels ahead of time: TRITON_INTERPRET is set, so kernels are interpreted; unset it"
        )
    wanted_specs = None if specs is None else set(specs)
    wanted_kernels = None if kernels is None else set(kernels)
    for target in targets:
        for case in cases(target):
            if (wanted_specs is None or case.spec in wanted_specs) and (
                wanted_kernels is None or (case.kernel, case.rows) in wanted_kernels
            ):
                yield asdict(compile_case(case, target))


def compile_row(kernel: str, rows: int, spec: Spec | str, target: str) -> Row:
    """Compile the one case of that name; ValueError where the target does not launch it."""
    for case in cases(target):
        if (case.kernel, case.rows, case.spec) == (kernel, rows, str(spec)):
            return compile_case(case, target)
    raise ValueError(f"{target} launches no {kernel} of {rows} rows with {spec}")


def compile_case(case: Case, target: str) -> Row:
    """Compile one kernel; a compiler's refusal becomes a row with ok = False."""
    found: dict[str, Any]
    try:
        compiled = triton.compile(_source(case), target=_target(target), options=dict(case.options))
        found = {"ok": True, "shared_bytes": int(compiled.metadata.shared), **_cost(compiled.asm)}
    except (RuntimeError, TritonError) as error:
        found = {"ok": False, "reason": _reason(error)}
    named = {name: getattr(case, name) for name in ("kernel", "rows", "family", "spec", "dtype")}
    return Row(target=target, **named, **found)


# What may not rise.
_COSTS = ("shared_bytes", "global_loads", "registers", "spills")


def regressions(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[str]:
    """What got worse, a line each: a kernel that stopped compiling, one of its costs up by more than 10 %.

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
        for field in _COSTS:
            if None not in (row[field], old[field]) and row[field] > 1.1 * old[field]:
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


def _source(case: Case) -> Any:
    """The kernel with the argument types and alignments of a launch."""
    signature: dict[str, Any] = dict.fromkeys(case.fn.arg_names, "constexpr")
    constants: dict[Any, Any] = dict(case.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(case.fn.params):
        if parameter.name not in case.arguments:
            continue
        given = case.arguments[parameter.name]
        nested = isinstance(given, tuple)
        for j, kind in enumerate(given if nested else (given,)):
            place = (i, j) if nested else (i,)
            if kind is None:
                constants[place if nested else parameter.name] = None
            elif not parameter.do_not_specialize:
                attributes[place] = [["tt.divisibility", 16]]
        make = getattr(given, "_make", tuple)
        signature[parameter.name] = make(k or "constexpr" for k in given) if nested else given or "constexpr"
    return ASTSource(fn=case.fn, signature=signature, constexprs=constants, attrs=attributes)


def _pointers(spec: Spec) -> Parts:
    """Pointer types of the parts a QTensor of this spec has."""
    level = spec.two_level
    scales = None if spec.family == "trellis" else _level_pointer(spec) if level else _POINTERS[spec.scale]
    mapped = level and spec.family == "codebook" and spec.table not in FIXED
    return Parts(
        codes="*i32",
        scales=scales,
        zeros=_POINTERS.get(spec.zero.removeprefix("z")),
        table=_table_pointer(spec) if spec.family == "codebook" else None,
        super_scales=_POINTERS[level[0]] if level else None,
        scale_table="*fp32" if mapped else None,
        scale_offset="*fp32" if mapped else None,
        mins=scales if spec.zero == "min" else None,
        super_mins=_POINTERS[level[0]] if level and spec.zero == "min" else None,
    )


def _level_pointer(spec: Spec) -> str:
    return "*u8" if spec.scale_code[0] == 8 else "*i32"


def _table_pointer(spec: Spec) -> str:
    if spec.grid_code is not None:
        return "*i8"
    return _POINTERS["f32" if spec.table in VALUES else "f16"]


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
