"""One request between its sampled tokens and the text its client sees.

Text goes through the detokenizer and the stop strings. Where strings are banned, tokens wait until their text cannot
become one of them any more; when one is complete, the request goes back to the token it begins in, which is banned at
that place, and everything that depends on later tokens is undone. Nothing handed out is ever taken back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..samplers.history import History
from ..samplers.pipeline import Sampled
from .detokenize import Detokenizer, StopMatcher, overlap
from .scheduler import Seq
from .words import Vocabulary

# Rewinds without one token handed out in between, after which a request is given up: its bans leave no way on.
MOST_REWINDS = 1000


@dataclass(frozen=True)
class _Held:
    """A token not handed out yet."""

    sampled: Sampled
    folded: str  # the text that became certain with it, folded as banned strings are
    text: str  # what the client gets of it
    before: tuple[tuple[int, int, int], StopMatcher, bytes, int]  # where the request was before it


class Request:
    """What the engine remembers of a sequence besides the scheduler's Seq.

    seq: its parameters, and its prompt (for token healing without the last token, which is `healed`).
    arrival: time.perf_counter() at arrival.
    """

    def __init__(self, seq: Seq, tokenizer: Any, vocabulary: Vocabulary, healed: int | None, arrival: float) -> None:
        params = seq.params
        self.seq = seq
        self.history = History(params, seq.prompt, vocabulary.words(params))
        self.detokenizer = Detokenizer.after(tokenizer, seq.ids, params.skip_special_tokens)
        self.stop = StopMatcher(params.stop, params.include_stop_str_in_output)
        self.last_event = arrival  # then the time of the latest token
        self.started = False  # whether a token was sampled
        self.released = 0  # tokens handed out
        self.rewinds = 0  # since the last of them
        self._held: list[_Held] = []
        self._banned = tuple({each.casefold() for each in params.banned_strings})
        self._vocabulary = vocabulary
        # Of the healed token's text: what is still to be said (bytes) and to be left out of the answer (characters).
        self._unsaid, self._repeated = b"", 0
        if healed is not None:
            self._unsaid = vocabulary.bytes_of(healed)
            self._repeated = len(Detokenizer.after(tokenizer, seq.ids, params.skip_special_tokens).add(healed))
            self.history.only[0] = vocabulary.beginnings(self._unsaid)

    def add(self, sampled: Sampled, more: bool = True) -> int | None:
        """Take in a token -> None, or the length of the output to rewind to: call `rewind` with it.

        more: whether others may follow; else the text held back for the stop strings comes out.
        """
        before = (self.detokenizer.mark(), replace(self.stop), self._unsaid, self._repeated)
        raw = self._without_repeated(self.detokenizer.add(sampled.token_id))
        text = self.stop.add(raw)
        self._held.append(_Held(sampled, raw.casefold(), text, before))
        self._heal(sampled.token_id)
        begin = self._match()
        if begin is None and not more:
            self._held[-1] = replace(self._held[-1], text=text + self.rest())
        return begin

    def end(self, sampled: Sampled) -> None:
        """Take in a token that ends the output and has no text."""
        before = (self.detokenizer.mark(), replace(self.stop), self._unsaid, self._repeated)
        self._held.append(_Held(sampled, "", self.rest(), before))

    def rest(self) -> str:
        """The text still held back by detokenizer and stop strings, now that no more can follow."""
        if self.stop.matched is not None:
            return ""
        return self.stop.add(self._without_repeated(self.detokenizer.finish())) + self.stop.finish()

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` of the output on, and ban the first of them there."""
        at = len(self._held) - (self.seq.num_output - position)
        first = self._held[at]
        mark, self.stop, self._unsaid, self._repeated = first.before
        self.detokenizer.rewind(mark)
        del self._held[at:]
        self.history.rewind(position)
        self.history.bans.setdefault(position, set()).add(first.sampled.token_id)
        self.rewinds += 1

    def release(self, everything: bool) -> tuple[list[Sampled], str]:
        """The tokens that can be handed out and their text; `everything`: whatever is held."""
        count = len(self._held) if everything else self._certain()
        ready, self._held = self._held[:count], self._held[count:]
        self.released += count
        self.rewinds = 0 if count else self.rewinds
        return [each.sampled for each in ready], "".join(each.text for each in ready)

    def _match(self) -> int | None:
        """Output position of the token in which the earliest banned string begins, if one is complete."""
        text = "".join(each.folded for each in self._held)
        begins = [at for banned in self._banned if (at := text.find(banned)) >= 0]
        if not begins or (self.stop.matched is not None and not self._shows_banned()):
            return None
        place, at = 0, min(begins)
        while at >= len(self._held[place].folded):
            at -= len(self._held[place].folded)
            place += 1
        # A character's first bytes are tokens without text.
        while at == 0 and place and not self._held[place - 1].folded and not self._is_special(place - 1):
            place -= 1
        return self.seq.num_output - len(self._held) + place

    def _shows_banned(self) -> bool:
        """Whether the client would see a banned string, after the stop string that matched has cut the text."""
        shown = "".join(each.text for each in self._held).casefold()
        return any(banned in shown for banned in self._banned)

    def _is_special(self, place: int) -> bool:
        return self._held[place].sampled.token_id in self._vocabulary.special

    def _certain(self) -> int:
        """How many of the held tokens cannot become part of a banned string, whatever is taken back after them."""
        if not self._banned:
            return len(self._held)
        count, before = len(self._held), -1
        # Again for what is left: if the end is taken back, the text before it may go on as another banned string.
        while count not in (0, before):
            before = count
            text = "".join(each.folded for each in self._held[:count])
            open_end = max(overlap(text, banned) for banned in self._banned)
            while count and (open_end > 0 or not self._held[count - 1].folded):
                count -= 1
                open_end -= len(self._held[count].folded)
        return count

    def _heal(self, token: int) -> None:
        """Note what of the healed text `token` said, and which tokens may say the rest."""
        if not self._unsaid:
            return
        self._unsaid = self._unsaid[len(self._vocabulary.bytes_of(token)) :]
        if self._unsaid:
            self.history.only[self.seq.num_output] = self._vocabulary.beginnings(self._unsaid)

    def _without_repeated(self, text: str) -> str:
        skipped = min(self._repeated, len(text))
        self._repeated -= skipped
        return text[skipped:]


def loops(ids: Sequence[int], num_prompt: int, detection: dict[str, int] | None) -> bool:
    """Whether the output `ids[num_prompt:]` ends with min_count copies of one pattern.

    Patterns of min_pattern_size to max_pattern_size tokens count: vLLM's `repetition_detection`.
    """
    if detection is None:
        return False
    copies = detection.get("min_count", 2)
    for size in range(detection.get("min_pattern_size", 1), detection["max_pattern_size"] + 1):
        span = size * copies
        if span > len(ids) - num_prompt:
            return False
        # Equal to itself shifted by one pattern: all of its patterns are equal.
        if ids[len(ids) - span + size :] == ids[len(ids) - span : len(ids) - size]:
            return True
    return False
