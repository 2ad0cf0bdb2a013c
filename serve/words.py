"""What the strings of a request's parameters are as tokens, from the tokenizer's vocabulary.

Samplers know token ids only (`samplers.history.Words`): DRY's sequence breakers, bad words, the newlines XTC leaves
alone, the tags around a thought. Token healing asks here which tokens may begin a text.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from ..errors import UserError
from ..samplers.history import Ids, Words
from ..samplers.params import SamplingParams
from .token_text import token_bytes_of

# What opens and closes a thought: DeepSeek, Qwen and most others; Magistral; Seed-OSS; Kimi; EXAONE; Command A.
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


class Vocabulary:
    """The tokens of a model with `size` logits, as text. What is found is kept; any thread may ask.

    `special`: ids of the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size
        self.special = frozenset(tokenizer.all_special_ids)
        self._breakers = lru_cache(maxsize=256)(self._find_breaker)
        self._beginnings = lru_cache(maxsize=256)(self._find_beginnings)
        # A request is checked in one thread and added in another: each text is tokenized once.
        self._encode = lru_cache(maxsize=256)(lambda text, **how: list(tokenizer.encode(text, **how)))

    def words(self, params: SamplingParams) -> Words:
        """The tokens of what `params` names as text. UserError for a thinking budget where thoughts have no tags."""
        breakers = params.dry_sequence_breakers if params.dry_multiplier else ()
        return Words(
            breakers=tuple(dict.fromkeys(ids for breaker in breakers for ids in self._breakers(breaker))),
            bad_words=tuple(dict.fromkeys(ids for word in params.bad_words for ids in self._bad_word(word))),
            protected=self._newlines if params.xtc_probability else (),
            thinking=((), ()) if params.thinking_token_budget is None else self._tags(),
        )

    def beginnings(self, text: bytes) -> frozenset[int]:
        """Tokens that begin with `text` and those that `text` begins with: what may come where it must be said.

        No special ones: their text is a name.
        """
        return self._beginnings(text)

    def can_heal(self, prompt: Sequence[int]) -> bool:
        """Whether other tokens may take the place of the prompt's last one.

        Not of a special token or a part of a character, nor where the prompt would be empty without it.
        """
        if len(prompt) < 2 or prompt[-1] in self.special:
            return False
        try:
            return bool(self.bytes_of(prompt[-1]).decode())
        except UnicodeDecodeError:
            return False

    def bytes_of(self, token: int) -> bytes:
        """The text of one token."""
        return self._texts[token]

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer adds."""
        return list(self._encode(text))

    @cached_property
    def _texts(self) -> list[bytes]:
        return list(map(token_bytes_of(self._tokenizer), range(self._size)))

    @cached_property
    def _newlines(self) -> Ids:
        return tuple(token for token, text in enumerate(self._texts) if text == b"\n")

    def _find_beginnings(self, text: bytes) -> frozenset[int]:
        shorter = {text[:n] for n in range(1, len(text))}
        found = {token for token, each in enumerate(self._texts) if each.startswith(text) or each in shorter}
        return frozenset(found - self.special)

    def _find_breaker(self, breaker: str) -> tuple[Ids, ...]:
        """Token sequences whose text has the breaker in it, as llama.cpp finds them.

        Every token that contains it, and every token that ends with its beginning together with the tokens of the rest
        (https://github.com/ggml-org/llama.cpp, get_overlapping_token_sequences).
        """
        whole = breaker.encode()
        found: list[Ids] = [(token,) for token, text in enumerate(self._texts) if whole in text]
        for cut in range(1, len(breaker)):
            beginning, rest = breaker[:cut].encode(), self._inside(breaker[cut:])
            found += [
                (token, *rest)
                for token, text in enumerate(self._texts)
                if text.endswith(beginning) and whole not in text
            ]
        return tuple(found)

    def _bad_word(self, word: str) -> list[Ids]:
        """The word's tokens, and those with a space before it where that changes only the first (vLLM's rule)."""
        plain, spaced = (tuple(self._plain(space + word.lstrip())) for space in ("", " "))
        found = [plain] if plain else []
        if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
        return found

    def _tags(self) -> tuple[Ids, Ids]:
        vocabulary = self._tokenizer.get_vocab()
        template = str(self._tokenizer.chat_template or "")
        for begin, end in THOUGHTS:
            if (begin in vocabulary and end in vocabulary) or end in template:
                return self._inside(begin), self._inside(end)
        known = ", ".join(f"{begin}...{end}" for begin, end in THOUGHTS)
        raise UserError(
            "thinking_token_budget: neither this model's vocabulary nor its chat template has tags around a thought "
            f"(known are {known}): remove it"
        )

    def _inside(self, text: str) -> Ids:
        """Tokens of a text that does not begin a prompt, where SentencePiece would put a space."""
        anchor, ids = self._plain("\n"), self._plain("\n" + text)
        return tuple(ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._plain(text))

    def _plain(self, text: str) -> list[int]:
        return list(self._encode(text, add_special_tokens=False))
