"""`bench attention`: everyone computes the same, what is counted, and the command on small shapes."""

import json
import re
from pathlib import Path

import pytest
import torch
from bitsmith.cli.main import main
from bitsmith.eval import attention_speed as speed
from bitsmith.eval.attention_speed import Case, Heads
from bitsmith.eval.kernel_speed import Ceiling, Timing, detail, rows
from bitsmith.eval.results import read
from bitsmith.kernels import native

CPU = torch.device("cpu")
HEADS = Heads(6, 2, 32)


@pytest.mark.parametrize("kv", ["none", "int8"])
@pytest.mark.parametrize("prefill", [False, True])
def test_contenders_compute_the_same(kv: str, prefill: bool) -> None:
    """Over a context that fills no whole block."""
    case = Case(kv, HEADS, 3, 45, prefill)
    found = speed.contenders(case, CPU)
    assert list(found) == ["bitsmith", "sdpa", *([] if prefill else ["sdpa-grouped"])]
    ours = found["bitsmith"].run().float()
    assert ours.shape == (3 * case.queries, 6, 32)
    for name, peer in found.items():
        theirs = peer.run()
        if name == "sdpa":
            theirs = theirs.transpose(1, 2)
        # bfloat16 outputs and, of ours, int8 keys and values: absmax / 254 of numbers up to 4.
        torch.testing.assert_close(ours, theirs.reshape(ours.shape).float(), atol=0.03, rtol=0.02)


def test_each_path_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def paths(kv: str, prefill: bool) -> list[str]:
        return [c.path for c in speed.contenders(Case(kv, HEADS, 1, 16, prefill), CPU).values()]

    plain = "torch" if native.library() is None else "native"
    assert paths("none", False) == [plain, "bfloat16", "bfloat16"]
    assert paths("none", True)[0] in ("torch", plain) and paths("int8", False)[0] == plain
    monkeypatch.setenv("BITSMITH_KERNELS", "reference")
    assert paths("none", False)[0] == "torch"


def test_bytes_are_those_of_the_cache_and_work_that_of_visible_keys() -> None:
    decode, prompt = Case("int8", HEADS, 3, 40), Case("int8", HEADS, 1, 40, prefill=True)
    found = speed.contenders(decode, CPU)
    assert found["bitsmith"].nbytes == 2 * 3 * 40 * 2 * (32 + 2)
    assert found["sdpa"].nbytes == 2 * 3 * 40 * 2 * 32 * 2
    assert decode.work == 3 * 40 * 6 * 32 * 4 and prompt.work == 820 * 6 * 32 * 4
    timings = {"bitsmith": Timing([2e-6], 16320, "torch"), "sdpa": Timing([4e-6], 30720, "bfloat16")}
    (row,) = rows(decode, timings, Ceiling(16.32e9, 1e12))
    assert row["name"] == "int8 6/2x32 decode 3x40" and row["ratio"] == pytest.approx(2)
    assert row["gb_s"] == pytest.approx(8.16) and row["of_copy"] == pytest.approx(0.5)
    assert detail({decode: timings}, Ceiling(1e9, 1e12))["rows"]["decode 3x40"]["against"] == {"sdpa": 4.0}


def test_cases_end_with_one_prompt() -> None:
    found = speed.cases("none", HEADS, (1, 8), (512, 4096))
    assert [c.label for c in found] == [
        "decode 1x512", "decode 8x512", "decode 1x4096", "decode 8x4096", "prefill 1x2048"
    ]  # fmt: skip
    assert speed.cases("none", HEADS, (1,), (64,))[-1].label == "prefill 1x64"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "bench attention --heads 4/2x16 --kv-cache-dtype int8,auto,none --sequences 1,2 --contexts 20,40 --samples 2"
    )
    assert main([*words.split(), "--device", "cpu", "--json", "--results", str(tmp_path)]) == 0
    out = json.loads(capsys.readouterr().out)
    labels = ["decode 1x20", "decode 2x20", "decode 1x40", "decode 2x40", "prefill 1x40"]
    assert [(row["name"], row["against"]) for row in out["rows"]] == [
        (f"{kv} 4/2x16 {label}", peer)
        for kv in ("int8", "none")
        for label in labels
        for peer in (("sdpa",) if label.startswith("prefill") else ("sdpa", "sdpa-grouped"))
    ]
    recorded = read(tmp_path)
    assert [(r.model, r.spec, r.kv, r.metric, r.n) for r in recorded] == [
        ("4/2x16", "", "int8", "decode 1x20 us", 2), ("4/2x16", "", "none", "decode 1x20 us", 2)
    ]  # fmt: skip
    assert re.fullmatch(r"attention/cpu/\d+ threads", recorded[0].task) and recorded[0].processor in recorded[0].key
    assert list(recorded[0].detail["rows"]) == labels
    assert recorded[0].value == pytest.approx(recorded[0].detail["rows"]["decode 1x20"]["us"], rel=1e-3)


def test_the_command_prints_a_line_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench attention --heads 4/4x16 --kv-cache-dtype auto --sequences 1 --contexts 16 --samples 1 --no-record"
    assert main([*words.split(), "--device", "cpu", "--against", "sdpa"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "copy" in lines[0] and len(lines) == 3
    assert lines[1].startswith("none 4/4x16 decode 1x16") and " x sdpa (" in lines[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8b"], "bench attention takes no '8b': heads go into --heads 32/8x128"),
        (["--heads", "32x128"], "--heads '32x128': accepted are QUERY/KVxDIM"),
        (["--heads", "32/5x128"], "query heads a multiple of KV heads: 32/8x128"),
        (["--contexts", "0"], "--contexts '0': accepted are numbers from 1"),
        (["--sequences", "1,two"], "--sequences 'two': accepted are numbers from 1"),
        (["--kv-cache-dtype", "int3"], "kv_cache_dtype 'int3' is unknown; choose one of: auto, int8, none"),
        (["--against", "flash-attn"], "--against 'flash-attn' is not known; accepted: sdpa, sdpa-grouped, or none"),
    ],
)
def test_bad_commands_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", *words]) == 2
    assert message in capsys.readouterr().err
