"""`bench kernels`: what is compared, how rows follow from times, and the command on small shapes."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bitsmith.cli.main import main
from bitsmith.eval import ggml_peer
from bitsmith.eval import kernel_speed as speed
from bitsmith.eval.kernel_peers import PEERS, Product
from bitsmith.eval.kernel_speed import DENSE, OURS, Case, Ceiling, Clock, Timing
from bitsmith.eval.results import read
from bitsmith.kernels.recording import Recording, Unrecordable
from bitsmith.kernels.spec import Spec

CPU = torch.device("cpu")


def test_rows_say_rate_share_and_ratio() -> None:
    case = Case("affine4.g128.asym", (1000, 2000), 1)
    ours = Timing([4e-6, 1e-6, 2e-6], 994_000, "gemv")
    found = speed.rows(case, {"bitsmith": ours, "linear": Timing([8e-6], 4_000_000, "bf16")}, Ceiling(1e12, 4e12))
    assert found == [
        {
            "name": "affine4.g128.asym 1000x2000 m1", "value": pytest.approx(2.0), "unit": "us", "path": "gemv",
            "gb_s": pytest.approx(500.0), "tflop_s": pytest.approx(2.0), "of_copy": pytest.approx(0.5),
            "of_matmul": pytest.approx(0.5), "ratio": pytest.approx(4.0), "against": "linear",
            "against_value": pytest.approx(8.0),
        }
    ]  # fmt: skip
    (alone,) = speed.rows(case, {"bitsmith": ours}, Ceiling(1e12, 4e12))
    assert (alone["value"], alone["against"], alone["ratio"]) == (pytest.approx(2.0), None, None)


def test_a_row_of_results_keeps_every_figure() -> None:
    cases = [Case("affine4.g128.asym", (1000, 2000), m) for m in (1, 8)]
    ours = Timing([4e-6, 1e-6, 2e-6], 994_000, "gemv")
    table = {
        cases[0]: {"bitsmith": ours, "linear": Timing([8e-6], 4_000_000, "bf16")},
        cases[1]: {"bitsmith": Timing([3.0000001e-6], 994_000, "gemm")},
    }
    found = speed.detail(table, Ceiling(1e12, 4e12))
    assert found == {
        "copy_gb_s": 1000.0,
        "matmul_tflop_s": 4.0,
        "rows": {
            "1": {"us": 2.0, "gb_s": 500.0, "tflop_s": 2.0, "of_copy": 0.5, "of_matmul": 0.5, "path": "gemv", "n": 3, "against": {"linear": 8.0}},
            "8": {"us": 3.0, "gb_s": 347.3, "tflop_s": 10.67, "of_copy": 0.3473, "of_matmul": 2.667, "path": "gemm", "n": 1, "against": {}},
        },
    }  # fmt: skip


class _Counting(Clock):
    """Gives milliseconds that count up and notes the order of calls."""

    def __init__(self) -> None:
        super().__init__(CPU, 64)
        self.order: list[Any] = []

    def seconds(self, run: Any) -> float:
        self.order.append(run())
        return len(self.order) / 1000


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> None:
        raise RuntimeError("no such kernel")

    # `run` gets what `bind` made of x.
    products = {name: Product(lambda x, name=name: name, 1, name) for name in ("bitsmith", "linear")}
    products["peer"] = Product(broken, 1, "peer")
    made: list[Any] = []
    monkeypatch.setattr(speed, "contenders", lambda spec, shape, *_: made.append((str(spec), shape)) or products)
    clock, told = _Counting(), list[str]()
    cases = [Case("affine4.g32.sym", (8, 64), m) for m in (1, 2)] + [Case("affine8.g32.sym", (8, 64), 1)]
    table = dict(speed.measure(cases, clock, samples=3, told=told.append))
    # Each case warms up once, then three rounds.
    assert clock.order == ["bitsmith", "linear"] * 12
    assert table[cases[0]]["bitsmith"].seconds == [0.003, 0.005, 0.007]
    assert told == [f"peer is left out of {case.name}: no such kernel" for case in cases]
    assert made == [("affine4.g32.sym", (8, 64)), ("affine8.g32.sym", (8, 64))]


class _Slow(Clock):
    """Gives the seconds that a product says it takes."""

    def seconds(self, run: Any) -> float:
        return float(run())


def test_slow_products_are_called_less_and_those_of_others_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    products = {
        name: Product(run, 1, name, bind=len)
        for name, run in (("bitsmith", lambda m: m / 100), ("linear", lambda m: m / 1000), ("peer", lambda m: m / 500))
    }
    monkeypatch.setattr(speed, "contenders", lambda *_: products)
    told: list[str] = []
    cases = [Case("affine4.g32.sym", (8, 64), m) for m in (1, 16, 64, 256, 2048)]
    table = dict(speed.measure(cases, _Slow(CPU, 64), samples=3, told=told.append))
    taken = [{name: len(timing.seconds) for name, timing in table[case].items()} for case in cases]
    assert taken == [
        {"bitsmith": 3, "linear": 3, "peer": 3},
        {"bitsmith": 3, "linear": 3, "peer": 3},
        # 0.64 s is one call, 0.256 s three, of which the first counts.
        {"bitsmith": 1, "linear": 3, "peer": 3},
        {"bitsmith": 1, "linear": 3, "peer": 1},
        {"bitsmith": 1},
    ]
    assert told == [
        "linear is left out of affine4.g32.sym 8x64 m2048: it would take 2.0 s",
        "peer is left out of affine4.g32.sym 8x64 m2048: it would take 4.1 s",
    ]


@pytest.mark.parametrize("text", speed.SPECS)
def test_random_weights_of_every_spec_decode(text: str) -> None:
    q = speed.random_weight(Spec.parse(text), (128, 256), CPU)
    weight = q.dequantize()
    assert weight.shape == (128, 256) and weight.isfinite().all() and weight.std() > 0


def test_peers_take_weights_of_their_kind_and_absent_ones_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def no_peers(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("gemlite", "bitsandbytes", "torchao"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_peers)
    monkeypatch.setattr(ggml_peer, "find_spec", lambda name: None)
    ggml_peer.load.cache_clear()
    told: list[str] = []
    for text, names in (
        ("affine4.g128.asym", ["bitsmith", "linear", "torch-int4"]),
        ("affine3.g128.asym", ["bitsmith", "linear"]),
        ("codebook4.nf4.g64.f32", ["bitsmith", "linear"]),
        ("affine8.g32.sym", ["bitsmith", "linear"]),
    ):
        found = speed.contenders(Spec.parse(text), (64, 256), CPU, list(PEERS), told.append)
        assert list(found) == names
        for product in found.values():
            assert product.call(torch.randn(3, 256).bfloat16())().shape == (3, 64)
    assert not told


@pytest.mark.parametrize("name", [OURS, DENSE])
def test_products_are_recorded_where_that_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 256).bfloat16()

    def made() -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        call = speed.contenders(Spec.parse("affine4.g128.asym"), (64, 256), CPU, [], [].append)[name].call(x)
        return call.args[0].__wrapped__, call()

    recording, expected = made()
    assert isinstance(recording, Recording)
    monkeypatch.setattr(speed, "record", Mock(side_effect=Unrecordable("numpy of a tensor")))
    plain, y = made()
    assert not isinstance(plain, Recording)
    assert torch.equal(y, expected)


def test_a_peer_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("needs sm_80")

    monkeypatch.setitem(PEERS, "torch-int4", refuse)
    told: list[str] = []
    found = speed.contenders(Spec.parse("affine4.g128.asym"), (64, 256), CPU, ["torch-int4"], told.append)
    assert list(found) == ["bitsmith", "linear"]
    assert told == ["torch-int4 is left out of affine4.g128.asym 64x256: needs sm_80"]


def test_the_command_on_small_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "kernels",
        "--shapes",
        "small",
        "--rows",
        "1,3",
        "--specs",
        "affine4.g128.asym,affine8.channel.sym",
    ]
    words += ["--against", "torch-int4", "--samples", "2", "--device", "cpu", "--json", "--results", str(tmp_path)]
    assert main(words) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["copy_gb_s"] > 0 and out["matmul_tflop_s"] > 0
    assert [(row["name"], row["against"]) for row in out["rows"]] == [
        ("affine4.g128.asym 256x512 m1", "linear"), ("affine4.g128.asym 256x512 m1", "torch-int4"),
        ("affine4.g128.asym 256x512 m3", "linear"), ("affine4.g128.asym 256x512 m3", "torch-int4"),
        ("affine8.channel.sym 256x512 m1", "linear"), ("affine8.channel.sym 256x512 m3", "linear"),
    ]  # fmt: skip
    for row in out["rows"]:
        assert row["ratio"] == pytest.approx(row["against_value"] / row["value"]) and row["unit"] == "us"
    recorded = read(tmp_path)
    assert [(r.model, r.spec, r.metric, r.n) for r in recorded] == [
        ("256x512", "affine4.g128.asym", "m1 us", 2), ("256x512", "affine8.channel.sym", "m1 us", 2)
    ]  # fmt: skip
    assert re.fullmatch(r"kernels/cpu/\d+ threads", recorded[0].task)
    detail = recorded[0].detail
    assert list(detail["rows"]) == ["1", "3"] and list(detail["rows"]["3"]["against"]) == ["linear", "torch-int4"]
    assert detail["copy_gb_s"] == pytest.approx(out["copy_gb_s"], rel=1e-3)
    assert recorded[0].value == pytest.approx(detail["rows"]["1"]["us"], rel=1e-3) == out["rows"][0]["value"]


def test_the_command_prints_a_line_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "kernels", "--shapes", "256x256", "--rows", "1", "--specs", "affine4.g128.asym", "--samples", "2"]
    words += ["--device", "cpu", "--no-record", "--against", "none", "--shapes", "small"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "copy" in lines[0] and "TFLOP/s" in lines[0]
    assert len(lines) == 2 and lines[1].startswith("affine4.g128.asym 256x512 m1") and " x linear (" in lines[1]


def test_specs_may_be_gguf_types() -> None:
    from bitsmith.cli._bench_kernels import _specs

    assert _specs("Q4_K,affine4.g32.sym") == ["affine4.g32.min.u6:f16:8", "affine4.g32.sym"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "1.1b"], "bench kernels takes no '1.1b': shapes go into --shapes"),
        (["kernels", "--shapes", "100x256"], "--shapes '100x256': accepted are OUTPUTSxINPUTS in multiples of 256"),
        (["kernels", "--rows", "1,x"], "--rows 'x': accepted are numbers from 1"),
        (["kernels", "--specs", "affine9"], "bits is 9"),
        (
            ["kernels", "--against", "vllm"],
            "--against 'vllm' is not known; accepted: torch-int4, gemlite, bitsandbytes, torchao, llama.cpp",
        ),
        (["kernels", "--samples", "0"], "--samples 0: accepted is 1 or more"),
        (["kernels", "--tune", "--device", "cpu"], "--tune measures launches on a GPU, and there is none here"),
        (["decode"], "bench decode needs a model directory or a shape: bitsmith bench decode 1.1b"),
    ],
)
def test_bad_commands_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
