"""Strings of a request as tokens: each rule against its definition, over byte-level BPE and SentencePiece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.token_text import token_bytes_of
from bitsmith.serve.words import Vocabulary
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def text_of(tokenizer: Any, ids: tuple[int, ...]) -> bytes:
    return b"".join(map(token_bytes_of(tokenizer), ids))


@pytest.fixture(params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, bpe_tokenizer: Any) -> Any:
    if request.param == "bpe":
        return bpe_tokenizer
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared")("models/stories260k"))


def test_breakers_are_llama_cpps(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    texts = [token_bytes_of(tokenizer)(token) for token in range(len(tokenizer))]

    def words(*breakers: str, multiplier: float = 1.0) -> tuple[tuple[int, ...], ...]:
        params = SamplingParams(dry_multiplier=multiplier, dry_sequence_breakers=list(breakers))
        return vocabulary.words(params).breakers

    # A breaker of one character: every token that contains it, alone.
    assert words("e") == tuple((token,) for token, text in enumerate(texts) if b"e" in text)
    assert len(words("e")) > 3
    found = words("the")
    assert all(b"the" in text_of(tokenizer, ids) for ids in found)
    # Each way to begin it at the end of a token is there, and only the first token may hold more.
    begins = {token for token, text in enumerate(texts) if b"the" not in text and text.endswith((b"t", b"th"))}
    assert {ids[0] for ids in found if len(ids) > 1} == begins
    assert {ids[0] for ids in found if len(ids) == 1} == {token for token, text in enumerate(texts) if b"the" in text}
    assert all(text_of(tokenizer, ids).endswith(b"the") for ids in found if len(ids) > 1)
    assert words("the", multiplier=0.0) == ()


def test_bad_words_with_and_without_a_space(bpe_tokenizer: Any) -> None:
    vocabulary = Vocabulary(bpe_tokenizer, len(bpe_tokenizer))
    encode = bpe_tokenizer.encode

    def words(*given: str) -> tuple[tuple[int, ...], ...]:
        return vocabulary.words(SamplingParams(bad_words=list(given))).bad_words

    assert words("the") == (tuple(encode("the")), tuple(encode(" the"))) and len(encode(" the")) == 1
    # A space that is a token of its own leaves the last tokens as they are: one entry covers both.
    assert words("zq") == (tuple(encode("zq")),)
    assert words("  the", "the") == words("the")


def test_newlines_are_protected_from_xtc(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    protected = vocabulary.words(SamplingParams(xtc_probability=0.5)).protected
    assert protected and all(text_of(tokenizer, (token,)) == b"\n" for token in protected)
    assert vocabulary.words(SamplingParams()).protected == ()


def test_tags_around_a_thought(bpe_tokenizer: Any) -> None:
    def tags(**changes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer.backend_tokenizer, eos_token="<eos>")
        tokenizer.chat_template = changes.get("template")
        tokenizer.add_tokens(changes.get("tokens", []))
        return Vocabulary(tokenizer, 400).words(SamplingParams(thinking_token_budget=5)).thinking

    begin, end = tags(tokens=["[THINK]", "[/THINK]"])
    assert len(begin) == len(end) == 1 and begin != end
    begin, end = tags(template="{{ '<think>' }}{{ content.split('</think>') }}")
    assert len(begin) > 1 and text_of(bpe_tokenizer, begin) == b"<think>" and text_of(bpe_tokenizer, end) == b"</think>"
    with pytest.raises(UserError, match=r"thinking_token_budget: neither .* vocabulary nor its chat template has tags"):
        tags()


def test_tokens_that_may_begin_a_text(bpe_tokenizer: Any) -> None:
    vocabulary = Vocabulary(bpe_tokenizer, len(bpe_tokenizer) + 9)
    texts = [token_bytes_of(bpe_tokenizer)(token) for token in range(len(bpe_tokenizer))]
    want = {token for token, text in enumerate(texts) if text.startswith(b" t") or text == b" "}
    assert vocabulary.beginnings(b" t") == want and len(want) > 2
    # The name of a special token is not its text.
    assert bpe_tokenizer.eos_token_id not in vocabulary.beginnings(b"<")
    the, eos = bpe_tokenizer.encode(" the")[0], bpe_tokenizer.eos_token_id
    assert vocabulary.can_heal([5, the])
    assert not vocabulary.can_heal([the]) and not vocabulary.can_heal([the, eos])
    assert not vocabulary.can_heal([the, *bpe_tokenizer.encode("\N{EURO SIGN}")])


def test_found_once(shared: Callable[[str], Path], bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary(bpe_tokenizer, len(bpe_tokenizer))
    params = SamplingParams(dry_multiplier=1.0, xtc_probability=0.5)
    first = vocabulary.words(params)
    monkeypatch.setattr(vocabulary, "_find_breaker", None)
    monkeypatch.setattr(vocabulary, "_tokenizer", None)
    assert vocabulary.words(params) == first
