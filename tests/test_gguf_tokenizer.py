"""Tokenizers in GGUF files: what is rebuilt from the metadata, and what llama.cpp makes of it, on awkward strings."""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitsmith.models.load import load_tokenizer

from . import gguf_tiny as tiny

AWKWARD = (
    "Hello, world!",
    "  two spaces in front",
    "and behind   ",
    " ",
    "   ",
    "\n\n\tA line\r\nand\n\n\nmore",
    "it's we'll I'D don't",
    "1234567 3.14159 0x1F",
    "naïve café — “quotes” …",
    "日本語とかな한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
    "a\u00a0b\u200bc\u2581d",
    "snake_case CamelCase http://x.y/z?q=1&r=%20",
    "    def f(x):\n        return x  # comment",
    "\x00\x01\x7f",
    "\ufffd\U0010ffff",
    "ſtraße ǅ ﬁ",
)


@pytest.fixture(scope="module", params=["books-8m", "stories260k"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared: Any) -> tuple[Any, Path]:
    """A tokenizer (byte-level BPE; SentencePiece) and a file with it."""
    source = shared(f"models/{request.param}")
    tokenizer = load_tokenizer(source)
    return tokenizer, tiny.write(source, tmp_path_factory.mktemp(request.param) / "model.gguf", "F16", tokenizer)


@pytest.mark.parametrize("text", AWKWARD)
def test_the_rebuilt_tokenizer_gives_the_ids_of_the_first(text: str, both: tuple[Any, Path]) -> None:
    tokenizer, path = both
    rebuilt = load_tokenizer(path)
    ids = rebuilt.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert rebuilt.decode(ids) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def theirs(both: tuple[Any, Path]) -> Callable[[str], list[int]]:
    """llama.cpp's tokenizer of the file."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install it to compare")
    import llama_cpp as lib

    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(both[1]), params)
    vocabulary = lib.llama_model_get_vocab(model)

    def ids(text: str) -> list[int]:
        raw = text.encode()
        buffer = (lib.llama_token * (len(raw) + 16))()
        count = lib.llama_tokenize(vocabulary, raw, len(raw), buffer, len(buffer), False, False)
        assert count >= 0
        return list(ctypes.cast(buffer, ctypes.POINTER(ctypes.c_int32))[:count])

    return ids


@pytest.mark.parametrize("text", AWKWARD)
def test_llama_cpp_gives_the_same_ids(text: str, both: tuple[Any, Path], theirs: Callable[[str], list[int]]) -> None:
    assert load_tokenizer(both[1]).encode(text, add_special_tokens=False) == theirs(text)
