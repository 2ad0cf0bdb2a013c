"""A story world whose text has a known probability: what a language model's loss can be held against.

A story puts a few people, things and animals into places, then lets them act: people go, take, drop and give, animals
wander or find somebody. Turns of events end in a question with exactly one right answer. Every random decision is
drawn by a `pick` that knows its probability p and adds -log p to a sum; text follows from the decisions, and the
decisions can be read back from the text (`parse`), so the sum is the exact -log P(text), in nats. Answers follow from
the state and cost nothing. A model's loss minus these nats is its distance to the best loss any model can reach.

Layout: one line of sentences that ends in a question, one line with its answer, again, and an empty line at the end.
Left out: tense, plurals and paraphrase of questions; they would add vocabulary, not state to keep track of.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

SHE = ("Anna", "Clara", "Emma", "Greta", "Ida", "Lena")
HE = ("Ben", "David", "Felix", "Hugo", "Jonas", "Oscar")
PEOPLE = SHE + HE
THINGS = ("ball", "book", "lamp", "key", "cup", "hat", "coin", "rope", "drum", "kite", "map", "bell")
ANIMALS = ("cat", "dog", "hen", "goat", "fox", "duck")
PLACES = ("kitchen", "garden", "hall", "barn", "attic", "cellar", "mill", "tower")
COUNTS = ("None.", "One.", "Two.", "Three.", "Four.")

# How often: wordings, kinds of event, kinds of question. Only what is possible at the time takes part.
MOVE, TAKE, DROP = {"goes": 5, "walks": 3, "runs": 2}, {"takes": 3, "picks up": 2}, {"drops": 3, "puts down": 2}
GIVE, WANDER = {"gives": 3, "hands": 2}, {"runs": 1, "wanders": 1}
EVENTS = {"move": 4, "take": 4, "drop": 2, "give": 3, "wander": 1, "find": 1}
ASKED = {"person": 2, "animal": 2, "thing": 4, "holder": 3, "together": 2, "count": 2, "before": 2}
# A likely target (an occupied place, the last actor, a thing in somebody's hands) counts this many times.
LIKELY = 4
PRONOUN = 0.6

T = TypeVar("T")


class Pick(Protocol):
    """Chooses one option, each with probability proportional to its weight (equal when None)."""

    def __call__(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T: ...


@dataclass(frozen=True)
class Pace:
    """How large and how long a story is.

    people, things, animals: weight of each number of them. A turn has at least, and at most, so many events and goes
    on in between with the given chance, in the first turn and in later ones; another turn follows with chance `more`.
    """

    people: dict[int, int] = field(default_factory=lambda: {1: 1, 2: 2})
    things: dict[int, int] = field(default_factory=lambda: {1: 2, 2: 1})
    animals: dict[int, int] = field(default_factory=lambda: {0: 1, 1: 1})
    first: tuple[int, int, float] = (0, 4, 0.6)
    later: tuple[int, int, float] = (0, 3, 0.5)
    more: float = 0.9
    turns: int = 10


STORY = Pace()


@dataclass(frozen=True)
class Question:
    """The answer is text[start : start + len(answer)]; text[:start] is the prompt."""

    kind: str
    start: int
    answer: str


@dataclass(frozen=True)
class Story:
    """A text, its exact -log probability in nats, its questions, and the decisions it was made of."""

    text: str
    nats: float
    questions: tuple[Question, ...]
    decisions: tuple[object, ...]


@dataclass
class State:
    """Where everybody is (person, animal or loose thing -> place), who holds what, and who acted last in this line."""

    place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    people: list[str] = field(default_factory=list)
    things: list[str] = field(default_factory=list)
    animals: list[str] = field(default_factory=list)
    last: str = ""

    def where(self, name: str) -> str:
        return self.place[self.holder.get(name, name)]

    def near(self, person: str) -> list[str]:
        """Loose things within reach."""
        return [t for t in self.things if t not in self.holder and self.place[t] == self.place[person]]

    def held(self, person: str) -> list[str]:
        return [t for t in self.things if self.holder.get(t) == person]

    def others(self, person: str) -> list[str]:
        """People in the same place."""
        return [p for p in self.people if p != person and self.place[p] == self.place[person]]


class Sampler:
    """Draws at random and remembers what was drawn and what it cost."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.nats, self.decisions = rng, 0.0, list[object]()

    def __call__(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        weights = weights or [1.0] * len(options)
        index = self.rng.choices(range(len(options)), weights)[0]
        self.nats -= math.log(weights[index] / sum(weights))
        self.decisions.append(options[index])
        return options[index]


class Reader:
    """Takes the decisions that were read from a text, and sums what they would have cost the sampler."""

    def __init__(self, decisions: Iterator[object]) -> None:
        self.forced, self.nats, self.decisions = decisions, 0.0, list[object]()

    def __call__(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        wanted = next(self.forced, None)
        if wanted not in options:
            raise ValueError(f"not a story of this world: {wanted!r} where one of {list(options)} is possible")
        index = [*options].index(wanted)  # type: ignore[arg-type]
        weights = weights or [1.0] * len(options)
        self.nats -= math.log(weights[index] / sum(weights))
        self.decisions.append(wanted)
        return options[index]


def _by_weight(pick: Pick, table: dict[T, int], possible: Sequence[T] | None = None) -> T:
    options = [o for o in table if possible is None or o in possible]
    return pick(options, [table[o] for o in options])


def _likely(pick: Pick, options: Sequence[T], likely: Sequence[bool]) -> T:
    return pick(options, [LIKELY if yes else 1 for yes in likely])


def _setup(state: State, pick: Pick, pace: Pace) -> Iterator[str]:
    for table, names, members in (
        (pace.people, PEOPLE, state.people),
        (pace.things, THINGS, state.things),
        (pace.animals, ANIMALS, state.animals),
    ):
        for _ in range(_by_weight(pick, table)):
            name = pick([n for n in names if n not in members])
            members.append(name)
            state.place[name] = pick(PLACES)
            yield f"{name if name in PEOPLE else 'The ' + name} is in the {state.place[name]}."


def _event(state: State, pick: Pick) -> str:
    able = {
        "move": state.people,
        "take": [p for p in state.people if state.near(p)],
        "drop": [p for p in state.people if state.held(p)],
        "give": [p for p in state.people if state.held(p) and state.others(p)],
        "wander": state.animals,
        "find": [a for a in state.animals if any(state.place[a] != state.place[p] for p in state.people)],
    }
    kind = _by_weight(pick, EVENTS, [k for k in EVENTS if able[k]])
    actor = _likely(pick, able[kind], [a == state.last for a in able[kind]])
    if kind in ("wander", "find"):
        state.last = actor
        return _animal_event(state, pick, kind, actor)
    name = actor
    if actor == state.last and pick((True, False), (PRONOUN, 1 - PRONOUN)):
        name = "She" if actor in SHE else "He"
    state.last = actor
    return f"{name} {_person_event(state, pick, kind, actor)}."


def _animal_event(state: State, pick: Pick, kind: str, animal: str) -> str:
    if kind == "find":
        person = pick([p for p in state.people if state.place[p] != state.place[animal]])
        state.place[animal] = state.place[person]
        return f"The {animal} finds {person}."
    verb = _by_weight(pick, WANDER)
    state.place[animal] = pick([p for p in PLACES if p != state.place[animal]])
    return f"The {animal} {verb} to the {state.place[animal]}."


def _person_event(state: State, pick: Pick, kind: str, person: str) -> str:
    """The event without its subject; the state is brought up to date."""
    if kind == "move":
        verb = _by_weight(pick, MOVE)
        places = [p for p in PLACES if p != state.place[person]]
        busy = {state.place[n] for n in (*state.people, *state.things) if n not in state.holder}
        state.before[person] = state.place[person]
        state.place[person] = _likely(pick, places, [p in busy for p in places])
        return f"{verb} to the {state.place[person]}"
    if kind == "take":
        verb, thing = _by_weight(pick, TAKE), pick(state.near(person))
        state.holder[thing] = person
        return f"{verb} the {thing}"
    if kind == "drop":
        verb, thing = _by_weight(pick, DROP), pick(state.held(person))
        del state.holder[thing]
        state.place[thing] = state.place[person]
        return f"{verb} the {thing}"
    verb, thing, receiver = _by_weight(pick, GIVE), pick(state.held(person)), pick(state.others(person))
    state.holder[thing] = receiver
    return f"{verb} the {thing} to {receiver}"


def _question(state: State, pick: Pick) -> tuple[str, str, str]:
    """Kind, question and answer."""
    able = {
        "animal": state.animals,
        "thing": state.things,
        "holder": state.things,
        "together": state.people[1:],
        "before": [p for p in state.people if p in state.before],
    }
    kind = _by_weight(pick, ASKED, [k for k in ASKED if able.get(k, True)])
    if kind in ("person", "animal"):
        name = pick(state.people if kind == "person" else state.animals)
        return kind, f"Where is {'the ' * (kind == 'animal')}{name}?", f"In the {state.place[name]}."
    if kind in ("thing", "holder"):
        thing = _likely(pick, state.things, [t in state.holder for t in state.things])
        if kind == "thing":
            return kind, f"Where is the {thing}?", f"In the {state.where(thing)}."
        return kind, f"Who has the {thing}?", f"{state.holder.get(thing, 'Nobody')}."
    if kind == "together":
        pairs = [(a, b) for a in state.people for b in state.people if a != b]
        one, two = _likely(pick, pairs, [state.place[a] == state.place[b] for a, b in pairs])
        return kind, f"Is {one} with {two}?", "Yes." if state.place[one] == state.place[two] else "No."
    if kind == "count":
        person = _likely(pick, state.people, [bool(state.held(p)) for p in state.people])
        return kind, f"How many things does {person} have?", COUNTS[len(state.held(person))]
    person = pick(able["before"])
    return kind, f"Where was {person} before?", f"In the {state.before[person]}."


def _write(pick: Pick, pace: Pace) -> tuple[str, tuple[Question, ...]]:
    """Runs the process; `pick` alone decides. Returns the text and its questions."""
    state, questions = State(), list[Question]()
    text = " ".join(_setup(state, pick, pace)) + " "
    for turn in range(pace.turns):
        state.last = ""
        least, most, more = pace.later if turn else pace.first
        for n in range(most):
            if n >= least and not pick((True, False), (more, 1 - more)):
                break
            text += _event(state, pick) + " "
        kind, question, answer = _question(state, pick)
        text += question + "\n"
        questions.append(Question(kind, len(text), answer))
        text += answer + "\n"
        if turn + 1 < pace.turns and not pick((True, False), (pace.more, 1 - pace.more)):
            break
    return text + "\n", tuple(questions)


_VERBS = {"move": MOVE, "take": TAKE, "drop": DROP, "give": GIVE, "wander": WANDER}
_EVENT_FORMS = [
    ("give", r"(\w+) (gives|hands) the (\w+) to (\w+)\."),
    ("move", r"(\w+) (goes|walks|runs) to the (\w+)\."),
    ("take", r"(\w+) (takes|picks up) the (\w+)\."),
    ("drop", r"(\w+) (drops|puts down) the (\w+)\."),
    ("wander", r"The (\w+) (runs|wanders) to the (\w+)\."),
    ("find", r"The (\w+) (finds) (\w+)\."),
]
_QUESTION_FORMS = [
    ("person", r"Where is (\w+)\?"),
    ("before", r"Where was (\w+) before\?"),
    ("holder", r"Who has the (\w+)\?"),
    ("together", r"Is (\w+) with (\w+)\?"),
    ("count", r"How many things does (\w+) have\?"),
]


def _match(sentence: str, forms: list[tuple[str, str]]) -> tuple[str, tuple[str, ...]]:
    for kind, form in forms:
        if found := re.fullmatch(form, sentence):
            return kind, found.groups()
    raise ValueError(f"not a sentence of this world: {sentence!r}")


def _read_setup(sentences: list[str]) -> Iterator[object]:
    found = [re.fullmatch(r"(?:The )?(\w+) is in the (\w+)\.", s) for s in sentences]
    pairs = [m.groups() for m in found if m]
    for names in (PEOPLE, THINGS, ANIMALS):
        members = [pair for pair in pairs if pair[0] in names]
        yield len(members)
        for pair in members:
            yield from pair


def _read_event(sentence: str, last: str) -> tuple[list[object], str]:
    """The decisions behind one sentence, and who acted. `last` is who acted in the sentence before."""
    kind, (subject, verb, *rest) = _match(sentence, _EVENT_FORMS)
    pronoun = subject in ("She", "He")
    actor = last if pronoun else subject
    said = [pronoun] if actor == last and actor in PEOPLE else []
    return [kind, actor, *said, *([verb] if kind in _VERBS else []), *rest], actor


def _read_question(question: str) -> list[object]:
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return ["animal" if found[1] in ANIMALS else "thing", found[1]]
    kind, names = _match(question, _QUESTION_FORMS)
    return [kind, names if kind == "together" else names[0]]


def _read(text: str) -> Iterator[object]:
    """The decisions of a text, in the order in which the process makes them."""
    lines = text.split("\n")[:-2]
    for turn, line in enumerate(lines[::2]):
        *sentences, question = re.findall(r"[^.?]+[.?]", line) or [""]
        sentences, last = [s.strip() for s in sentences], ""
        if turn == 0:
            n_setup = sum(" is in the " in s for s in sentences)
            yield from _read_setup(sentences[:n_setup])
            sentences = sentences[n_setup:]
        least, most, _ = STORY.later if turn else STORY.first
        for n, sentence in enumerate(sentences):
            if n >= least:
                yield True
            decisions, last = _read_event(sentence, last)
            yield from decisions
        if len(sentences) < most:
            yield False
        yield from _read_question(question.strip())
        if turn + 1 < STORY.turns:
            yield 2 * turn + 2 < len(lines)


def sample(rng: random.Random, pace: Pace = STORY) -> Story:
    """One story drawn with `rng`."""
    sampler = Sampler(rng)
    text, questions = _write(sampler, pace)
    return Story(text, sampler.nats, questions, tuple(sampler.decisions))


def stories(seed: int | str, n: int) -> Iterator[Story]:
    """n stories; the same ones for the same seed, whatever n."""
    rng = random.Random(f"storyworld {seed}")
    for _ in range(n):
        yield sample(rng)


def parse(text: str) -> Story:
    """The story a text tells, with its -log P found from the text alone.

    Raises ValueError where the process cannot have written the text (a step that is not possible, a wrong answer).
    """
    reader = Reader(_read(text))
    written, questions = _write(reader, STORY)
    if written != text:
        at = next((i for i, (a, b) in enumerate(zip(written, text, strict=False)) if a != b), len(written))
        raise ValueError(
            f"not a story of this world: {text[at : at + 20]!r} where {written[at : at + 20]!r} must follow"
        )
    return Story(text, reader.nats, questions, tuple(reader.decisions))


def main() -> None:
    """Writes the committed samples: heldout.jsonl, heldout.txt (the same stories) and calib.txt."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    heldout = list(stories("heldout", 300))
    rows = [{"text": s.text, "nats": round(s.nats, 6), "questions": [vars(q) for q in s.questions]} for s in heldout]
    (out / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "heldout.txt").write_text("".join(s.text for s in heldout))
    (out / "calib.txt").write_text("".join(s.text for s in stories("calib", 290)))


if __name__ == "__main__":
    main()
