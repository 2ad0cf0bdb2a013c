"""`bench decode`: what is measured, which samples count, how figures are compared; the engines on a tiny shape."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bitsmith.cli import bench
from bitsmith.errors import UserError
from bitsmith.eval.engines import BitsmithEngine, LlamaCppEngine, TransformersEngine
from bitsmith.eval.random_models import MIXTURES, SHAPES, shape_of, write_checkpoint, write_gguf
from bitsmith.eval.speed import CASES, Case, Cell, EngineDied, Worker, measure, rows, sample
from bitsmith.models.load import load_model, load_tokenizer

TINY = SHAPES["tiny"]


class Fake:
    """Gives prepared (rate, lost) samples in turn, then dies."""

    def __init__(self, *samples: tuple[float, float]) -> None:
        self.left = list(samples)

    def sample(self, case: Case) -> tuple[float, float]:
        if not self.left:
            raise EngineDied("out of samples")
        return self.left.pop(0)


ONE = [Case("decode-b1", 1, 1, 4)]


def test_disturbed_samples_are_measured_again() -> None:
    fake = Fake((10.0, 0.0), (1.0, 0.5), (12.0, 0.07), (11.0, 0.01))
    cell = measure({"ours": fake}, samples=3, cases=ONE)["decode-b1", "ours"]
    assert cell.value == 11.0
    assert cell.clean == [10.0, 12.0, 11.0]
    assert cell.stderr == pytest.approx(1 / 3**0.5)
    assert not fake.left


def test_time_limit_leaves_what_there_is() -> None:
    fake = Fake((10.0, 0.5), (20.0, 0.5))
    cell = measure({"ours": fake}, samples=3, minutes=0.0, cases=ONE)["decode-b1", "ours"]
    assert (cell.value, cell.clean, cell.stderr) == (10.0, [], None)


def test_engines_take_turns_and_a_dead_one_is_left_out() -> None:
    order = []

    class Noted(Fake):
        def sample(self, case: Case) -> tuple[float, float]:
            order.append((case.name, id(self)))
            return super().sample(case)

    ours, peer = Noted(*[(10.0, 0.0)] * 8), Noted(*[(5.0, 0.0)] * 5)
    told: list[tuple[str, str]] = []
    table = measure({"ours": ours, "peer": peer}, samples=2, died=lambda name, why: told.append((name, why)))
    assert order[:4] == [(name, id(each)) for name in ("decode-b1", "prefill-512") for each in (ours, peer)]
    assert told == [("peer", "out of samples")]
    assert {name for _, name in table} == {"ours"}
    assert all(len(cell.clean) == 2 for cell in table.values())


def test_rows_compare_with_the_better_configuration() -> None:
    table = {
        ("a", "ours"): Cell([(30.0, 0.0), (30.0, 0.0)]),
        ("a", "plain"): Cell([(10.0, 0.0), (11.0, 0.0), (12.0, 0.0)]),
        ("a", "tuned"): Cell([(20.0, 0.0)]),
        ("a", "other"): Cell([(60.0, 0.9)]),
    }
    found = rows(table, "ours", {"peer": ("plain", "tuned"), "other": ("other",), "dead": ("dead",)})
    assert found == [
        {
            "name": "a",
            "value": 30.0,
            "unit": "tok/s",
            "ratio": 1.5,
            "against": "peer",
            "against_value": 20.0,
            "clean": 1,
        },
        {
            "name": "a",
            "value": 30.0,
            "unit": "tok/s",
            "ratio": 0.5,
            "against": "other",
            "against_value": 60.0,
            "clean": 0,
        },
    ]
    assert rows(table, "ours", {})[0] == {
        "name": "a", "value": 30.0, "unit": "tok/s", "ratio": None, "against": None, "against_value": None, "clean": 2,
    }  # fmt: skip


class Counting:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def prefill(self, tokens: int) -> None:
        self.calls.append(("prefill", 1, tokens))

    def start(self, sequences: int, prompt: int) -> None:
        self.calls.append(("start", sequences, prompt))

    def step(self) -> None:
        self.calls.append(("step", 0, 0))


def test_a_case_times_what_its_name_says() -> None:
    engine = Counting()
    sample(engine, CASES[2], threads=1)
    assert engine.calls == [("start", 8, 16), *[("step", 0, 0)] * 17]
    engine.calls.clear()
    sample(engine, CASES[1], threads=1)
    assert engine.calls == [("prefill", 1, 16), ("prefill", 1, 512)]
    assert [case.name for case in CASES] == ["decode-b1", "prefill-512", "decode-b8", "decode-b32"]


def test_worker_measures_in_its_own_process() -> None:
    # A mock accepts every call; that the engines do is tested below.
    worker = Worker(Mock, (), threads=1)
    try:
        rate, lost = worker.sample(Case("decode", 2, 3, 2))
    finally:
        worker.close()
    assert rate > 0
    assert lost >= 0


def test_worker_that_dies_says_how() -> None:
    with pytest.raises(EngineDied, match=r"its process ended with exit code 11"):
        Worker(os._exit, (11,), threads=1)


def test_worker_passes_on_what_the_user_can_put_right(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a model directory nor a shape"):
        Worker(shape_of, (str(tmp_path),), threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model"
    spec = write_checkpoint(TINY, path, bits=4, group_size=64, head_bits=8)
    assert str(spec) == "affine4.g64.sym"
    return path


def test_random_checkpoint_loads_and_its_layers_are_the_same(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    layers = model.model.layers
    assert torch.equal(layers[0].mlp.down_proj.weight, layers[1].mlp.down_proj.weight)
    assert float(layers[0].mlp.down_proj.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.qtensor().spec.bits == 8
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    assert load_tokenizer(checkpoint)("w3 w511")["input_ids"] == [3, 511]


def engines(checkpoint: Path) -> Iterator[Any]:
    yield BitsmithEngine(checkpoint, 8, 600, int8_copy=False)
    yield TransformersEngine(TINY)


def test_engines_run_every_kind_of_case(checkpoint: Path) -> None:
    for engine in engines(checkpoint):
        for case in (Case("decode", 3, 5, 4), Case("prefill", 1, 40, 0), Case("decode", 1, 1, 2)):
            rate, lost = sample(engine, case, torch.get_num_threads())
            assert rate > 0
            assert lost >= 0


@pytest.mark.interop
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("kind", MIXTURES)
def test_llama_cpp_runs_the_file_we_write(tmp_path: Path, kind: str, repack: bool) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    write_gguf(TINY, tmp_path / "m.gguf", kind)
    worker = Worker(LlamaCppEngine, (tmp_path / "m.gguf", 1, 4, 256, repack), threads=1)
    try:
        assert worker.sample(Case("decode", 4, 5, 4))[0] > 0
    finally:
        worker.close()


def test_shapes_are_named_or_read(tmp_path: Path) -> None:
    assert shape_of("1.1b").config().num_key_value_heads == 4
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"model_type is 'gpt2'; peers are built for llama only: pass --against none"):
        shape_of(str(tmp_path))
    with pytest.raises(
        UserError, match=r"'7c' is neither a model directory nor a shape; the shapes are: tiny, 1.1b, 8b"
    ):
        shape_of("7c")
    with pytest.raises(
        UserError, match=r"self_attn.q_proj of this shape: group_size 96 does not divide in_features 256"
    ):
        write_checkpoint(TINY, tmp_path, bits=4, group_size=96, head_bits=8)


def command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


def test_bad_commands_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"bench 'serve' does not exist; those that do are: decode, kernels"):
        bench.run(command("serve", "tiny"))
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"not installed: `pip install bitsmith\[bench\]`, or leave it out of --against"
    ):
        bench.run(command("decode", "tiny", "--against", "llama.cpp"))
    with pytest.raises(UserError, match=r"--against 'vllm' is not known; accepted: transformers, llama.cpp, or none"):
        bench.run(command("decode", "tiny", "--against", "vllm"))
    monkeypatch.setenv("BITSMITH_ACT", "bf16")
    with pytest.raises(UserError, match=r"\(--int8-copy\) has no use here: .*\. Fix: "):
        bench.run(command("decode", "tiny", "--against", "none", "--int8-copy"))


@pytest.mark.interop
@pytest.mark.parametrize("words", [("tiny", "--gguf-type", "Q4_K_M"), ("m.gguf",)])
def test_both_engines_run_one_gguf_file(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    write_gguf(TINY, tmp_path / "m.gguf", "Q8_0")
    started: list[tuple[Any, Path]] = []

    class Noted:
        def __init__(self, build: Any, arguments: tuple[Any, ...], threads: int) -> None:
            started.append((build, arguments[0]))
            self.engine = build(*arguments)

        def sample(self, case: Case) -> tuple[float, float]:
            return sample(self.engine, Case("decode", 2, 3, 2), 1)[0], 0.0

        def close(self) -> None:
            pass

    monkeypatch.setattr("bitsmith.eval.speed.Worker", Noted)
    bench.run(command("decode", *words, "--against", "llama.cpp", "--samples", "1", "--no-record"))
    assert [build for build, _ in started] == [BitsmithEngine, LlamaCppEngine, LlamaCppEngine]
    assert len({path for _, path in started}) == 1 and started[0][1].suffix == ".gguf"
    with pytest.raises(UserError, match=r"is run by llama\.cpp only"):
        bench.run(command("decode", "m.gguf", "--against", "transformers", "--no-record"))
