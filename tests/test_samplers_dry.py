"""DRY with sequence breakers against llama.cpp's, whose breakers are texts of a vocabulary."""

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.samplers.history import History, Words
from bitsmith.samplers.params import SamplingParams

from .test_samplers_peers import theirs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install it to compare"
)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of single characters: tokens 3 to 10 are the letters a to h."""
    import gguf
    import llama_cpp.llama_cpp as L

    path: Path = tmp_path_factory.mktemp("vocab") / "vocab.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * 8]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    params = L.llama_model_default_params()
    params.vocab_only = True
    quiet = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    model = L.llama_model_load_from_file(str(path).encode(), params)
    assert model
    yield L.llama_model_get_vocab(model)
    L.llama_model_free(model)


@pytest.mark.parametrize("breakers", [("a",), ("a", "bc"), ("bcb",)])
@pytest.mark.parametrize("last_n", [10_000, 14])
def test_breakers_hold_where_llama_cpp_holds_them(vocab: Any, breakers: tuple[str, ...], last_n: int) -> None:
    """Tokens are the characters of a breaker; no token of this vocabulary holds more than one."""
    params = SamplingParams(dry_multiplier=1.0, dry_base=1.5, dry_allowed_length=1, dry_range=last_n)
    words = Words(breakers=tuple(tuple(3 + ord(char) - ord("a") for char in each) for each in breakers))
    strings = (ctypes.c_char_p * len(breakers))(*(each.encode() for each in breakers))
    rng, penalised, differs = np.random.default_rng(0), 0, 0
    for _ in range(150):
        text = rng.integers(3, 6, size=rng.integers(1, 40)).tolist()
        found = theirs(
            lambda L: L.llama_sampler_init_dry(vocab, 1.0, 1.5, 1, last_n, strings, len(breakers)),
            torch.zeros(11),
            text,
        )
        wanted = torch.zeros(11)
        repeats, free = History(params, text, words).repeats, History(params, text).repeats
        assert repeats and free
        for token, length in repeats.lengths().items():
            wanted[token] = -(1.5 ** (length - 1))
        torch.testing.assert_close(found, wanted, msg=str(text))
        penalised += bool(repeats.lengths())
        differs += repeats.lengths() != free.lengths()
    assert penalised > 30 and differs > 5
