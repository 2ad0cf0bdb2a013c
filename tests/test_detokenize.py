"""Incremental text equals whole decoding, character by character, and stop strings never leak."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bitsmith.serve.detokenize import Detokenizer, StopMatcher
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def stream(tokenizer: object, prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer.after(tokenizer, prompt, skip)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@given(st.text(max_size=30), st.text(max_size=8))
def test_bytes_become_whole_characters(byte_tokenizer: PreTrainedTokenizerFast, text: str, prompt: str) -> None:
    pieces = stream(byte_tokenizer, byte_tokenizer.encode(prompt), byte_tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_is_shown_only_at_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert stream(byte_tokenizer, [], byte_tokenizer.encode("a€")[:3]) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_skipped_or_shown(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    a, b, c = byte_tokenizer.encode("abc")
    ids = [a, b, byte_tokenizer.eos_token_id, c]
    assert "".join(stream(byte_tokenizer, [a], ids)) == "abc"
    assert "".join(stream(byte_tokenizer, [a], ids, skip=False)) == "ab<eos>c"


@pytest.mark.parametrize("model", ["models/books-8m", "models/stories260k"])
def test_real_tokenizers_stream_what_they_decode(model: str, shared: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared(model))
    text = 'Once upon a time, "Lily" said:  naïve — 日本 😀!\nThe end. '
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = str(tokenizer.decode(ids))
    for cut in range(1, len(ids)):
        head = str(tokenizer.decode(ids[:cut]))
        if not head.endswith("\ufffd"):
            assert "".join(stream(tokenizer, ids[:cut], ids[cut:])) == whole[len(head) :]


def match(pieces: list[str], *stop: str) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stop)
    sent = []
    for piece in pieces:
        sent.append(matcher.add(piece))
        if matcher.matched is not None:
            return sent, matcher.matched
    return [*sent, matcher.finish()], None


def test_a_stop_string_across_pieces_is_held_back() -> None:
    assert match(["one ", "ST", "OP", " two"], "STOP") == (["one ", "", ""], "STOP")
    assert match(["one ", "ST", "ART"], "STOP") == (["one ", "", "START", ""], None)
    assert match(["aST"], "STOP") == (["a", "ST"], None)


def test_the_stop_string_that_ends_first_wins() -> None:
    assert match(["xabc"], "abc", "b") == (["xa"], "b")
    assert match(["xab"], "b", "ab") == (["x"], "ab")
    assert match(["aab"], "ab") == (["a"], "ab")
    assert match(list("aaab"), "aab") == (["", "", "a", ""], "aab")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_matching_does_not_depend_on_the_pieces(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    want = text[: min(ends)[1]] if ends else text
    for cut in (pieces, list(text)):
        sent, matched = match(cut, *stop)
        assert "".join(sent) == want
        assert (matched is not None) == bool(ends)
