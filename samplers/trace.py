"""What each sampler did to one row: tokens removed, the probability they had, the best tokens before and after."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SHOWN = 5

Best = tuple[tuple[int, float], ...]  # (token id, probability), best first


@dataclass(frozen=True)
class StepTrace:
    """One sampler's effect on one row; probabilities are those of a softmax over what is left."""

    step: str
    removed: int  # tokens
    removed_mass: float  # probability they had
    kept: int  # tokens left
    before: Best
    after: Best


def compare(step: str, before: Tensor, after: Tensor, ids: Tensor | None) -> StepTrace:
    """What `step` did, from the row's logits [W] before and after it."""
    was, now = before.softmax(-1), after.softmax(-1)
    gone = (after == -torch.inf) & (before != -torch.inf)
    return StepTrace(
        step=step,
        removed=int(gone.sum()),
        removed_mass=float(was[gone].sum()),
        kept=int((after != -torch.inf).sum()),
        before=_best(was, ids),
        after=_best(now, ids),
    )


def _best(probs: Tensor, ids: Tensor | None) -> Best:
    values, index = probs.topk(min(_SHOWN, len(probs)))
    tokens = index if ids is None else ids[index]
    return tuple((token, value) for token, value in zip(tokens.tolist(), values.tolist(), strict=True) if value > 0)
