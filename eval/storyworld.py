"""The story world as an evaluation task: distance to the entropy floor, and questions answered right.

The held-out file holds stories drawn from a process whose -log probability is known (examples/storyworld/world.py), so
a loss has an absolute meaning: `gap_nats_per_token` is how far the model is from the best that any model can do. A
model scores token sequences while the floor is of texts; a text has many token sequences, so the loss of the one that
the tokenizer gives is an upper bound on -log P(text), and so is the gap.

Every question has one right answer, and it follows from the story. Left out: sampling answers; greedy decoding writes
exactly the answer if and only if each of its tokens is the most likely one after those before it, so one plain forward
over the story scores its text and all its questions at once.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError

BATCH = 16


@dataclass(frozen=True)
class Item:
    """One story. ids: BOS and its tokens; answers: [start, end) of each answer in ids; nats: the true -log P(text)."""

    ids: list[int]
    answers: list[tuple[int, int]]
    nats: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path_jsonl: Path | str,
    limit: int | None = None,
) -> dict[str, float | int]:
    """Scores the first `limit` stories (all when None) by plain forwards of `model`.

    Returns `nats_per_token` (every token of the text, BOS given), `floor_nats_per_token`, `gap_nats_per_token` and its
    standard error `gap_stderr` over stories, `accuracy` (share of answers whose every token is the argmax), its
    binomial standard error `stderr`, `n_questions`, `n_tokens`, `n_stories`.
    Raises UserError for a missing or malformed file, and for a tokenizer that cannot score answers on their own.
    """
    items = _read(Path(path_jsonl), tokenizer, limit)
    losses, right = list[float](), list[bool]()
    # Neighbours in length share a batch, so that little is padding.
    items.sort(key=lambda item: len(item.ids))
    for at in range(0, len(items), BATCH):
        batch_losses, batch_right = _score(model, items[at : at + BATCH])
        losses += batch_losses
        right += batch_right
    tokens = sum(len(item.ids) - 1 for item in items)
    excess = [loss - item.nats for loss, item in zip(losses, items, strict=True)]
    accuracy = sum(right) / len(right)
    return {
        "nats_per_token": sum(losses) / tokens,
        "floor_nats_per_token": sum(item.nats for item in items) / tokens,
        "gap_nats_per_token": sum(excess) / tokens,
        "gap_stderr": _stderr_of_sum(excess) / tokens,
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "n_questions": len(right),
        "n_tokens": tokens,
        "n_stories": len(items),
    }


def _stderr_of_sum(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(len(values) / max(1, len(values) - 1) * sum((v - mean) ** 2 for v in values))


@torch.no_grad()
def _score(model: PreTrainedModel, items: Sequence[Item]) -> tuple[list[float], list[bool]]:
    """Per story the loss in nats, and per question whether it was answered right."""
    # Padding on the right: a causal model's earlier positions cannot see it.
    ids = torch.zeros(len(items), max(len(item.ids) for item in items), dtype=torch.long)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
    logits = model(input_ids=ids.to(model.device)).logits[:, :-1].float().cpu()
    loss = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
    hit = logits.argmax(-1) == ids[:, 1:]
    losses = [loss[row, : len(item.ids) - 1].sum().item() for row, item in enumerate(items)]
    # Position t of `hit` speaks of token t + 1.
    right = [bool(hit[row, a - 1 : b - 1].all()) for row, item in enumerate(items) for a, b in item.answers]
    return losses, right


def _read(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[Item]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; the story world's task needs its held-out stories: "
            "examples/storyworld/heldout.jsonl, written by examples/storyworld/world.py"
        )
    if tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no bos_token, and a story starts with one: use the story world's tokenizer")
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    items = [_item(f"{path}, line {n}", line, tokenizer) for n, line in enumerate(lines, 1)]
    if not any(item.answers for item in items):
        raise UserError(f"{path}: no story with a question in the {len(items)} read; at least one is needed")
    return items


def _item(where: str, line: str, tokenizer: PreTrainedTokenizerBase) -> Item:
    try:
        row = json.loads(line)
        text, nats = str(row["text"]), float(row["nats"])
        spans = [(int(q["start"]), str(q["answer"])) for q in row["questions"]]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{where}: {type(e).__name__} {e}; a line is one JSON object with text, nats and questions "
            "[{start, answer}]: write it with examples/storyworld/world.py"
        ) from e
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answers = []
    for start, answer in spans:
        if text[start : start + len(answer)] != answer:
            found = text[start : start + len(answer)]
            raise UserError(
                f"{where}: the text has {found!r} at {start}, not the answer {answer!r}; write the file anew"
            )
        before = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
        upto = tokenizer(text[: start + len(answer)], add_special_tokens=False)["input_ids"]
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise UserError(
                f"{where}: this tokenizer joins the answer {answer!r} to what surrounds it, so it cannot be scored "
                "alone; use a tokenizer that splits at line ends, such as the story world's"
            )
        answers.append((len(before) + 1, len(upto) + 1))
    return Item([tokenizer.bos_token_id, *ids], answers, nats)
