"""Damaged GGUF files: a clear error or a model, never a crash, a hang or memory beyond the file's own."""

import random
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from bitsmith.errors import UserError
from bitsmith.models.checkpoint import open_checkpoint
from bitsmith.models.gguf_file import read_gguf
from bitsmith.models.load import load_tokenizer
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
import gguf_tiny as tiny

_ABSURD = [0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
_SECONDS, _BYTES = 10.0, 64 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> bytes:
    """A model of one layer with experts, packed tensors, frequency factors and a tokenizer."""
    directory = tmp_path_factory.mktemp("fuzz")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **tiny._LLAMA3}
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    tiny.model("mixtral", **small, rope_parameters=rope).save_pretrained(directory)
    return tiny.write(directory, directory / "model.gguf", "Q8_0", byte_tokenizer).read_bytes()


def _header_size(path: Path) -> int:
    return min(tensor.offset for tensor in read_gguf(path).tensors.values())


def mutated(raw: bytes, header: int, chance: random.Random) -> bytes:
    """One damaged file: flipped bits, absurd numbers where counts, lengths and offsets are, a cut, bytes moved."""
    found = bytearray(raw)
    kind = chance.choice(["flip", "absurd", "absurd", "small", "cut", "insert", "copy"])
    for _ in range(chance.choice([1, 1, 1, 3, 20])):
        at = chance.randrange(4, header - 8)
        if kind == "flip":
            found[at] ^= 1 << chance.randrange(8)
        elif kind == "absurd":
            found[at : at + 8] = struct.pack("<Q", chance.choice(_ABSURD))
        elif kind == "small":
            found[at : at + 4] = struct.pack("<I", chance.choice(_ABSURD) % 2**32)
        elif kind == "copy":
            other, size = chance.randrange(4, header - 8), chance.randrange(1, 64)
            found[at : at + size] = found[other : other + size]
    if kind == "cut":
        del found[chance.randrange(len(found)) :]
    elif kind == "insert":
        at = chance.randrange(4, header)
        found[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 32)))
    return bytes(found)


def used(path: Path) -> int:
    """Everything a file is opened for; returns how many weights it gave."""
    ckpt = open_checkpoint(path)
    for name, packed in ckpt.weights.items():
        if not packed:
            ckpt(name)
    ckpt.generation_config()
    load_tokenizer(path)
    return len(ckpt.weights)


def survive(raw: bytes, count: int, seed: int, path: Path) -> dict[str, int]:
    """Open `count` mutations of a file; returns how many were loaded and how many refused."""
    path.write_bytes(raw)
    header, chance, ended = _header_size(path), random.Random(seed), {"loaded": 0, "refused": 0}
    assert used(path)
    tracemalloc.start()
    try:
        for number in range(count):
            path.write_bytes(mutated(raw, header, chance))
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.monotonic()
            try:
                used(path)
                ended["loaded"] += 1
            except UserError as error:
                assert str(path) in str(error) and "Fix: " in str(error), (number, error)
                ended["refused"] += 1
            except Exception as error:
                raise AssertionError(f"mutation {number} of seed {seed}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - started < _SECONDS, (number, seed)
            assert tracemalloc.get_traced_memory()[1] - before < _BYTES, (number, seed)
    finally:
        tracemalloc.stop()
    return ended


def test_damaged_files_are_refused_or_read(whole: bytes, tmp_path: Path) -> None:
    ended = survive(whole, 200, 0, tmp_path / "model.gguf")
    assert ended["refused"] > 80 and ended["loaded"] > 10, ended


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_two_thousand_damaged_files(seed: int, whole: bytes, tmp_path: Path) -> None:
    survive(whole, 200, seed, tmp_path / "model.gguf")
