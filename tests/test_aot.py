"""Ahead-of-time compilation: every kernel compiles for every target, and costs what results/aot.json says or less."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from bitsmith.cli.main import main
from bitsmith.kernels import aot

TABLE = Path(__file__).resolve().parents[1] / "results" / "aot.json"
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
        source = aot._source(aot.plan(1, (64, 64)), aot.Spec.parse("affine4.g32.sym"), "fp16")
        return str(source.hash())

    before = key()
    monkeypatch.setattr(aot.triple("affine").unpack, "hash", "edited")
    assert key() != before


def test_table_covers_every_kernel_spec_and_target() -> None:
    rows = recorded()["rows"]
    wanted = {(k, r, s, t) for k, r in aot.KERNELS for s in aot.SPECS for t in aot.TARGETS}
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
    }
    return {**row, "reason": "", **changes}


def test_regressions_are_named() -> None:
    assert aot.regressions([_row()], [_row(shared_bytes=1100, global_loads=11)]) == []
    assert aot.regressions([_row()], [_row(shared_bytes=1101)]) == ["gemv 1 s t: shared_bytes rose from 1000 to 1101"]
    assert aot.regressions([_row()], [_row(global_loads=12)]) == ["gemv 1 s t: global_loads rose from 10 to 12"]
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
