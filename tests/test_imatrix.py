"""Importance matrices: what is measured, both forms on disk, and llama.cpp's own files (tests/golden)."""

import importlib.util
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from bitsmith.calibrate.imatrix import Entry, Imatrix, from_stats, read, with_prior, write
from bitsmith.calibrate.importance import measure
from bitsmith.calibrate.stats import Squares, Stats
from bitsmith.cli.main import main
from bitsmith.errors import UserError
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from gguf_models import CASES, llama_quantize, tensors  # noqa: E402
from gguf_models import write as write_model  # noqa: E402

GOLDEN = HERE / "golden" / "imatrix-stories260k.gguf"
KEYS = {"blk.0.ffn_down_exps.weight": [f"e/{i}" for i in range(4)], "blk.0.attn_q.weight": ["q"], "lost.weight": ["l"]}


def inputs() -> dict[str, Tensor]:
    return {"q": torch.randn(50, 6), "e/0": torch.randn(7, 8), "e/3": 3 * torch.randn(20, 8)}


def gathered(kind: Callable[[int], Any]) -> dict[str, Any]:
    found = {}
    torch.manual_seed(1)
    for key, x in inputs().items():
        found[key] = kind(x.shape[1])
        for part in x.split(16):
            found[key].add(part)
    return found


def test_squares_are_those_of_stats() -> None:
    for key, squares in gathered(Squares).items():
        stats = gathered(Stats)[key]
        assert stats.n == squares.n
        torch.testing.assert_close(stats.squares, squares.squares, rtol=1e-5, atol=0)


def test_experts_never_routed_get_the_mean_of_the_others_and_it_is_said() -> None:
    imatrix, said = from_stats(gathered(Squares), KEYS, "text.txt", 3, 512)
    torch.manual_seed(1)
    x = inputs()
    entry = imatrix.entries["blk.0.ffn_down_exps.weight"]
    assert entry.counts.tolist() == [7, 1, 1, 20]
    both = torch.cat([x["e/0"], x["e/3"]]).square().mean(0)
    found = imatrix.importance("blk.0.ffn_down_exps.weight", (4, 5, 8))
    expected = torch.stack([x["e/0"].square().mean(0), both, both, x["e/3"].square().mean(0)])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(imatrix.importance("blk.0.attn_q.weight", (9, 6)), x["q"].square().mean(0)[None])
    assert said == [
        "blk.0.ffn_down_exps.weight: no token was routed to 2 of 4 experts (1, 2); they get the mean of the others",
        "lost.weight: no token reached it; left out of the importance matrix",
    ]
    assert imatrix.importance("lost.weight", (2, 2)) is None
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight has 6 values, the weight has 1 x 8 inputs"):
        imatrix.importance("blk.0.attn_q.weight", (9, 8))


def test_nothing_seen_at_all_weighs_all_columns_alike() -> None:
    assert torch.equal(with_prior(Entry(torch.zeros(2, 3), torch.zeros(2))).sums, torch.ones(2, 3))
    with pytest.raises(UserError, match="reached none of the 1 weights"):
        from_stats({}, {"a.weight": ["a"]}, "text", 1, 8)
    broken = Squares(2)
    broken.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match=r"a\.weight: its inputs on text are not finite"):
        from_stats({"a": broken}, {"a.weight": ["a"]}, "text", 1, 8)


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    made, _ = from_stats(gathered(Squares), KEYS, "text.txt", 3, 512)
    write(made, tmp_path / f"i{suffix}")
    found = read(tmp_path / f"i{suffix}")
    assert (found.datasets, found.chunk_count) == (("text.txt",), 3)
    assert found.entries.keys() == made.entries.keys() == {"blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"}
    for name, shape in (("blk.0.ffn_down_exps.weight", (4, 5, 8)), ("blk.0.attn_q.weight", (9, 6))):
        torch.testing.assert_close(found.importance(name, shape), made.importance(name, shape), rtol=1e-6, atol=0)
    if suffix == ".gguf":
        assert found.chunk_size == 512
        for name, entry in made.entries.items():
            assert torch.equal(found.entries[name].sums, entry.sums)
            assert torch.equal(found.entries[name].counts, entry.counts)
    assert [p.name for p in tmp_path.iterdir()] == [f"i{suffix}"]


def test_both_of_llama_cpps_files_are_read() -> None:
    one, two = read(GOLDEN), read(GOLDEN.with_suffix(".dat"))
    assert (one.datasets, one.chunk_count, one.chunk_size) == (("stories.txt",), 3, 64)
    assert (two.datasets, two.chunk_count) == (("stories.txt",), 3)
    assert len(one.entries) == 35 and one.entries.keys() == two.entries.keys()
    for name, entry in one.entries.items():
        shape = (1, entry.sums.shape[1])
        assert entry.counts.tolist() == [192]
        torch.testing.assert_close(one.importance(name, shape), two.importance(name, shape), rtol=1e-6, atol=0)


def test_written_again_they_are_llama_cpps_own_bytes(tmp_path: Path) -> None:
    """The .dat wholly; of the GGUF, whose dimensions of one ggml leaves out, names, metadata and numbers."""
    ours = read(GOLDEN)
    write(ours, tmp_path / "i.dat")
    assert (tmp_path / "i.dat").read_bytes() == GOLDEN.with_suffix(".dat").read_bytes()
    write(ours, tmp_path / "i.gguf")
    a, b = gguf.GGUFReader(GOLDEN), gguf.GGUFReader(tmp_path / "i.gguf")
    fields = [{k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.")} for r in (a, b)]
    assert fields[0] == fields[1] and list(fields[0]) == list(fields[1])
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    for one, two in zip(a.tensors, b.tensors, strict=True):
        assert one.data.tobytes() == two.data.tobytes(), one.name


def test_a_run_measures_what_llama_imatrix_does(shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(3, 512, (3, 64))
    ids[:, 0] = 1
    monkeypatch.setattr("bitsmith.calibrate.importance.calibration_rows", lambda *_: torch.from_numpy(ids))
    found, said = measure(shared("models/stories260k"), calib="stories.txt", progress=False)
    theirs = read(GOLDEN)
    assert not said and found.entries.keys() == theirs.entries.keys()
    assert (found.datasets, found.chunk_count, found.chunk_size) == (theirs.datasets, 3, 64)
    for name, entry in theirs.entries.items():
        torch.testing.assert_close(found.entries[name].sums, entry.sums, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.entries[name].counts, entry.counts)


def saved(model: transformers.PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["Mixtral", "Phi3", "GptOss"])
def test_experts_and_fused_weights(
    tmp_path: Path,
    tiny_model: Callable[..., transformers.PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    model = tiny_model(name)
    ids = torch.randint(2, 250, (2, 20))
    monkeypatch.setattr("bitsmith.calibrate.importance.calibration_rows", lambda *_: ids)
    found, said = measure(saved(model, tmp_path / "m"), calib="t", progress=False, process_output=True)
    assert not said
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention = model.model.layers[1].self_attn
    (attention.qkv_proj if name == "Phi3" else attention.q_proj).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(ids)
    first = found.importance(f"blk.1.attn_{'qkv' if name == 'Phi3' else 'q'}.weight", (1, 64))
    torch.testing.assert_close(first, seen[0].square().mean((0, 1))[None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.importance("output.weight", (257, 64)), seen[1].square().mean((0, 1))[None], rtol=1e-4, atol=1e-6
    )
    if name != "Phi3":
        gate, up, down = (found.entries[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        assert gate.sums.shape == (4, 64) and down.sums.shape == (4, 96)
        assert torch.equal(gate.sums, up.sums) and gate.counts.sum() == down.counts.sum() == 2 * ids.numel()


@pytest.mark.slow
def test_llama_quantize_takes_ours(tmp_path: Path) -> None:
    """With a matrix of these values; quantization with ones must give other bytes, or it was not looked at."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install it to compare")
    case = "mixtral"
    write_model(case, tmp_path / "m.gguf")
    shapes = {n: s for n, s in tensors(case) if len(s) > 1 and n != "token_embd.weight"}
    entries = {
        n: Entry(
            torch.rand(s[0] if len(s) > 2 else 1, s[-1]).square() * 50, torch.full((s[0] if len(s) > 2 else 1,), 9.0)
        )
        for n, s in shapes.items()
    }
    write(Imatrix(entries, ("t",), 1, 9), tmp_path / "i.gguf")
    again = read(tmp_path / "i.gguf")
    for file, values in (
        ("ours", {n: again.importance(n, s).numpy() for n, s in shapes.items()}),  # type: ignore[union-attr]
        ("ones", {n: np.ones((e.sums.shape), np.float32) for n, e in entries.items()}),
    ):
        np.savez(tmp_path / f"{file}.npz", **values)
    assert CASES[case]["experts"] == 8
    jobs = [
        {
            "src": str(tmp_path / "m.gguf"),
            "dst": str(tmp_path / f"{file}.gguf"),
            "ftype": 20,
            "imatrix": str(tmp_path / f"{file}.npz"),
        }
        for file in ("ours", "ones")
    ]
    assert all(llama_quantize(jobs))
    assert (tmp_path / "ours.gguf").read_bytes() != (tmp_path / "ones.gguf").read_bytes()


def damaged(change: Callable[[bytes], bytes], source: Path, to: Path) -> Path:
    to.write_bytes(change(source.read_bytes()))
    return to


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".dat", lambda b: b[:3], "ends in the number of entries"),
        (".dat", lambda b: struct.pack("<i", 2**31 - 1) + b[4:], "the number of entries is 2147483647"),
        (".dat", lambda b: struct.pack("<i", 0) + b[4:], "the number of entries is 0"),
        (".dat", lambda b: b[:4] + struct.pack("<i", 10**9) + b[8:], "the length of the name of entry 0 is 1000000000"),
        (".dat", lambda b: b[:8] + b"\xff" + b[9:], "the name of entry 0 is not valid UTF-8"),
        (".dat", lambda b: b[:40] + b"\x00\x00\xc0\xff" + b[44:], r"blk\.0\.attn_k\.weight has values that are negative"),
        (".dat", lambda b: b[:-1], "the length of the name of the text is 11"),
        (".dat", lambda b: b + b"x", "1 bytes follow the end"),
        (".gguf", lambda b: b.replace(b"imatrix.chunk_size", b"imatrix.chunk_xxxx"), "imatrix.chunk_size is None"),
        (".gguf", lambda b: b.replace(b"blk.0.attn_k.weight.counts", b"blk.0.attn_k.weight.xounts"), "counts is missing"),
        (".gguf", lambda b: b.replace(b"\x07\0\0\0\0\0\0\0imatrix", b"\x07\0\0\0\0\0\0\0adapter"), "general.type is 'adapter'"),
        (".gguf", lambda b: b[:-40], "truncated or damaged"),
        (".gguf", lambda b: b[:-32] + struct.pack("<f", -1) + b[-28:], "has values that are negative, inf or NaN"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], message: str) -> None:
    file = damaged(change, GOLDEN.with_suffix(suffix), tmp_path / f"i{suffix}")
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert str(file) in str(error.value) and "Fix:" in str(error.value)


def test_the_command(shared: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.txt"
    text.write_text("Once upon a time there was a little dog. " * 60)
    line = ["imatrix", str(shared("models/stories260k")), "--calib", str(text), "--calib-seqlen", "32"]
    for file in ("i.gguf", "i.dat"):
        assert main([*line, "--calib-samples", "3", "-o", str(tmp_path / file)]) == 0
        found = read(tmp_path / file)
        assert found.chunk_count == 3 and len(found.entries) == 35 and found.datasets == ("t.txt",)
    assert "35 weights, 3 blocks of 32 tokens" in capsys.readouterr().err
    for wrong in ("i.bin", "no/i.gguf"):
        assert main([*line, "-o", str(tmp_path / wrong)]) == 2
    assert main([*line, "--process-output", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "--process-output, but the output is the embeddings' weight" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_random_damage_is_a_message_or_other_numbers(tmp_path: Path, suffix: str) -> None:
    whole, random = GOLDEN.with_suffix(suffix).read_bytes(), np.random.default_rng(5)
    file, refused = tmp_path / f"i{suffix}", 0
    for _ in range(300):
        raw = bytearray(whole[: random.integers(1, len(whole) + 1)] if random.random() < 0.3 else whole)
        for place in random.integers(0, min(len(raw), 4000), random.integers(1, 4)):
            raw[place] = random.integers(0, 256)
        file.write_bytes(raw)
        try:
            read(file)
        except UserError as error:
            refused += 1
            assert str(file) in str(error)
    assert refused > 100
