"""Ahead-of-time compilation: every kernel compiles for every target, and costs what results/aot.json says or less."""

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from bitsmith.cli.main import main
from bitsmith.kernels import aot
from bitsmith.kernels.cuda import triple

TABLE = Path(__file__).resolve().parents[1] / "results" / "aot.json"
NVFP4 = "minifloat4.e2m1.g16.ue4m3.a4"
UPDATE = "if the change is meant, keep the new table: bitsmith kernels --aot --save, and say why in the commit"

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or not aot.HAVE_TRITON, reason="needs triton, and TRITON_INTERPRET unset"
)


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def check(rows: list[dict[str, Any]]) -> None:
    refused = [row for row in rows if not row["ok"]]
    assert not refused, refused
    table = recorded()
    if table["triton"] != aot.triton_version():
        pytest.skip(f"compiled; counts not compared: {TABLE.name} is of triton {table['triton']}")
    worse = aot.regressions(table["rows"], rows)
    assert not worse, "\n".join([*worse, UPDATE])


@needs_compiler
def test_each_kernel_and_family_on_four_targets() -> None:
    specs = ("affine4.g128.asym", "minifloat8.e4m3.channel.f32", "codebook4.nf4.g64.f32")
    kernels = (("gemv", 1), ("gemm", 16), ("dequant", 128))
    rows = list(aot.table(("sm_75", "sm_86", "sm_90", "gfx942"), specs, kernels))
    assert len(rows) == 36
    check(rows)


@needs_compiler
def test_experts_native_dots_and_fused_steps_where_they_are_launched() -> None:
    kernels = {("grouped_gemv", 128), ("grouped_gemm", 128), ("scaled", 1), ("rms_norm", 1), ("rope", 1), ("gated", 1)}
    kernels.add(("sample_tail", 1))
    specs = {"affine4.g128.asym", "affine8.channel.sym", "llama", "half", "silu", "float32"}
    rows = list(aot.table(("sm_75", "sm_90", "gfx1100"), specs, kernels))
    launched = [[row["kernel"] for row in rows if row["target"] == t] for t in ("sm_75", "sm_90", "gfx1100")]
    fused = ["rms_norm", "rope", "gated", "sample_tail"]
    assert launched[0] == ["grouped_gemv", *fused]
    assert launched[1] == launched[2] == ["grouped_gemm", "scaled", *fused]
    check(rows)


def test_fp8_dots_are_launched_where_they_exist() -> None:
    found = {t for t in aot.TARGETS for c in aot.cases(t) if c.kernel == "scaled" and c.family == "minifloat"}
    assert found == {"sm_89", "sm_90", "sm_100", "sm_120"}, "AMD's E4M3 is another"
    blocks = {(t, c.spec) for t in aot.TARGETS for c in aot.cases(t) if c.kernel == "scaled_mx"}
    assert {t for t, spec in blocks if spec != NVFP4} == {"sm_100"}
    assert {t for t, spec in blocks if spec == NVFP4} == {"sm_100", "sm_120"}


@needs_compiler
@pytest.mark.parametrize(
    ("target", "kernel", "spec", "instruction"),
    [
        ("sm_80", "scaled", "affine8.channel.sym", r"mma\.sync\S*\.s32\.s8\.s8\.s32"),
        ("sm_89", "scaled", "minifloat8.e4m3.channel.f32", r"mma\.sync\S*\.f32\.e4m3\.e4m3\.f32"),
        ("sm_90", "scaled", "minifloat8.e4m3.channel.f32", r"wgmma\S*\.f32\.e4m3\.e4m3"),
    ],
)
def test_native_dots_are_native(target: str, kernel: str, spec: str, instruction: str) -> None:
    """Compiling proves little here: Triton would turn a dot it has no instruction for into another."""
    found = [c for c in aot.cases(target) if (c.kernel, c.rows, c.spec) == (kernel, 256, spec)]
    assert len(found) == 1
    compiled = aot.triton.compile(aot._source(found[0]), target=aot._target(target), options=dict(found[0].options))
    assert re.search(instruction, compiled.asm["ptx"])


@needs_compiler
@pytest.mark.parametrize(
    ("target", "spec", "instruction"),
    [
        ("sm_100", "minifloat8.e4m3.g32.e8m0", r"tcgen05\.mma\S*mxf8f6f4\.block_scale\.(block32|scale_vec::1X)"),
        ("sm_100", "minifloat4.e2m1.g32.e8m0", r"tcgen05\.mma\S*mxf8f6f4\.block_scale\.(block32|scale_vec::1X)"),
        ("sm_100", NVFP4, r"tcgen05\.mma\S*mxf4nvf4\.block_scale\.(block16|scale_vec::4X)"),
        ("sm_120", NVFP4, r"mma\.sync\S*mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\.f32\.ue4m3"),
    ],
)
def test_dots_of_scaled_blocks_are_native(target: str, spec: str, instruction: str) -> None:
    """For few rows too, and no other dot beside them. The instruction says what scales it takes, by one of two names."""
    cases = [c for c in aot.cases(target) if (c.kernel, c.spec) == ("scaled_mx", spec)]
    assert [c.rows for c in cases] == [1, 256]
    for case in cases:
        compiled = aot.triton.compile(aot._source(case), target=aot._target(target), options=dict(case.options))
        dots = set(re.findall(r"\S*mma\S*\.kind\S*|mma\.sync\S*", compiled.asm["ptx"]))
        assert dots and all(re.fullmatch(instruction, dot) for dot in dots)


def test_a_case_that_no_target_launches_is_named() -> None:
    with pytest.raises(ValueError, match=r"sm_75 launches no scaled of 256 rows with affine8.channel.sym"):
        aot.compile_row("scaled", 256, "affine8.channel.sym", "sm_75")


@needs_compiler
def test_each_case_on_one_target() -> None:
    """The whole table takes a quarter of an hour: each kernel, number of rows and spec meets one of its targets here, in
    turn; in float16 is one more target."""
    on: dict[tuple[str, int, str], list[tuple[aot.Case, str]]] = {}
    for target in aot.TARGETS:
        for case in aot.cases(target):
            on.setdefault((case.kernel, case.rows, case.spec.removesuffix(".fp16")), []).append((case, target))
    chosen = [launches[i % len(launches)] for i, launches in enumerate(on.values())]
    assert {target for _, target in chosen} == set(aot.TARGETS)
    assert {case.kernel for case, _ in chosen if case.spec.endswith(".fp16")} >= {"gemv", "gemm", "dequant"}
    check([aot.asdict(aot.compile_case(*launch)) for launch in chosen])


@needs_compiler
@pytest.mark.slow
def test_full_table() -> None:
    check(list(aot.table()))


@needs_compiler
def test_a_tile_is_decoded_not_an_element() -> None:
    """Decoding per element loads each word eight times: 136 loads and 82 KB of shared memory for this kernel."""
    row = aot.asdict(aot.compile_row("gemm", 16, aot.Spec.parse("affine4.g128.asym"), "sm_86"))
    assert row["global_loads"] <= 10 and row["shared_bytes"] <= 26 * 1024 and row["spills"] == 0


@needs_compiler
def test_a_refused_target_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_target", lambda name: aot.GPUTarget("cuda", 35, 32))
    row = aot.compile_row("dequant", 128, aot.Spec.parse("affine4.g128.asym"), "sm_35")
    assert not row.ok and row.reason and row.shared_bytes is None


@needs_compiler
def test_disk_cache_knows_the_source_of_a_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triple.cache_key the key names the functions only, and an edited decode runs as its old self."""

    def key() -> str:
        case = next(case for case in aot.cases("sm_80") if case.kernel == "gemv" and case.family == "affine")
        return str(aot._source(case).hash())

    before = key()
    monkeypatch.setattr(triple("affine").unpack, "hash", "edited")
    assert key() != before


def test_table_covers_every_kernel_spec_and_target() -> None:
    rows = recorded()["rows"]
    wanted = {(case.kernel, case.rows, case.spec, t) for t in aot.TARGETS for case in aot.cases(t)}
    assert {(row["kernel"], row["rows"], row["spec"], row["target"]) for row in rows} == wanted
    assert {"kernel", "family", "target", "ok", "shared_bytes", "registers", "spills", "global_loads"} <= rows[0].keys()


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "kernel": "gemv",
        "rows": 1,
        "spec": "s",
        "target": "t",
        "ok": True,
        "shared_bytes": 1000,
        "global_loads": 10,
        "registers": 100,
        "spills": 0,
    }
    return {**row, "reason": "", **changes}


def test_regressions_are_named() -> None:
    assert aot.regressions([_row()], [_row(shared_bytes=1100, global_loads=11)]) == []
    assert aot.regressions([_row()], [_row(shared_bytes=1101)]) == ["gemv 1 s t: shared_bytes rose from 1000 to 1101"]
    assert aot.regressions([_row()], [_row(global_loads=12)]) == ["gemv 1 s t: global_loads rose from 10 to 12"]
    assert aot.regressions([_row()], [_row(registers=111, spills=4)]) == [
        "gemv 1 s t: registers rose from 100 to 111",
        "gemv 1 s t: spills rose from 0 to 4",
    ]
    assert aot.regressions([_row(spills=None)], [_row(spills=8)]) == []
    assert aot.regressions([_row()], [_row(ok=False, reason="no")]) == ["gemv 1 s t: no longer compiles: no"]
    assert aot.regressions([_row(target="u")], [_row(global_loads=99)]) == []


def test_command_prints_the_recorded_table() -> None:
    with redirect_stdout(io.StringIO()) as out:
        assert main(["kernels", "--json"]) == 0
    assert json.loads(out.getvalue()) == recorded()
    with redirect_stdout(io.StringIO()) as out:
        assert main(["kernels"]) == 0
    lines = out.getvalue().splitlines()
    assert lines[0].split()[:3] == ["target", "kernel", "rows"] and len(lines) == len(recorded()["rows"]) + 2


def test_save_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--save"]) == 2
    assert "--save writes what --aot compiled: give both" in capsys.readouterr().err
