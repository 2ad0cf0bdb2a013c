"""Token ids to text while they arrive: whole UTF-8 characters only, and nothing that may still become a stop string.

Text is decoded in a window that begins a few tokens back, because tokenizers treat the start of a sequence specially
(SentencePiece drops a leading space there); what is new is the difference between two decodes of the same window.
Stop strings are found where they *end* first, so the result does not depend on how the tokenizer cut the text.
"""

from dataclasses import dataclass
from typing import Any

# Prompt tokens that give the first window its context; enough for any character and any leading-space rule.
_CONTEXT_TOKENS = 6


@dataclass
class Detokenizer:
    """Incremental decode of one sequence's output. `tokenizer` is a transformers tokenizer."""

    tokenizer: Any
    skip_special_tokens: bool
    ids: list[int]  # prompt tail, then every token added
    start: int = 0  # window start
    read: int = 0  # ids[:read] are already in the text

    @classmethod
    def after(cls, tokenizer: Any, prompt_ids: list[int], skip_special_tokens: bool) -> "Detokenizer":
        """A detokenizer whose output continues the prompt."""
        tail = prompt_ids[-_CONTEXT_TOKENS:]
        return cls(tokenizer, skip_special_tokens, list(tail), 0, len(tail))

    def add(self, token_id: int) -> str:
        """The text that became certain with this token, possibly empty."""
        self.ids.append(token_id)
        return self._advance(flush=False)

    def mark(self) -> tuple[int, int, int]:
        """Where it is now, for `rewind`."""
        return len(self.ids), self.start, self.read

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Back to where it was at `mark`."""
        count, self.start, self.read = mark
        del self.ids[count:]

    def finish(self) -> str:
        """What is left: an incomplete character as the tokenizer shows it (U+FFFD)."""
        return self._advance(flush=True) if self.read < len(self.ids) else ""

    def _advance(self, flush: bool) -> str:
        before = self._decode(self.ids[self.start : self.read])
        text = self._decode(self.ids[self.start :])
        # A window that ends in U+FFFD ends inside a character, unless the model really wrote U+FFFD: then the next
        # token settles it.
        if not flush and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False)
        )


@dataclass
class StopMatcher:
    """Watches a stream of text for stop strings and holds back what may still become one."""

    stop: tuple[str, ...]
    include: bool = False  # send the stop string too
    held: str = ""  # a proper prefix of some stop string, or empty
    matched: str | None = None

    def add(self, text: str) -> str:
        """Text that is safe to send. After a match: the text up to the stop string, and `matched` names it."""
        if not self.stop:
            return text
        text = self.held + text
        ends = [(at + len(stop), at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            end, at, self.matched = min(ends)
            self.held = ""
            return text[: end if self.include else at]
        keep = max(overlap(text, stop) for stop in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The held text, once no more can follow."""
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
