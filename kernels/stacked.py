"""Weights stacked along their output rows, each where it was until somebody asks for all of a part.

Products of the native library never do: they pack every piece straight into its rows. A copy first is a third of all
bytes that loading a GPTQ checkpoint moves, on pages that the system must clear.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


class Stacked(Mapping[str, Tensor]):
    """The parts of stacked weights: those called `rows` along their first dimension, others those of the first weight.

    A part is held in pieces or whole, never both.
    """

    def __init__(self, weights: Sequence[Parts], rows: Collection[str]) -> None:
        self._pieces = {k: [w[k] for w in (weights if k in rows else weights[:1])] for k in weights[0]}

    def __getitem__(self, name: str) -> Tensor:
        found = self._pieces[name]
        if len(found) > 1:
            self._pieces[name] = found = [_stack(found)]
        return found[0]

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def pieces(self, name: str) -> list[Tensor]:
        """What makes up the part, in its order."""
        return self._pieces[name]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parts."""
        return {k: torch.Size((sum(t.shape[0] for t in p), *p[0].shape[1:])) for k, p in self._pieces.items()}


def pieces(parts: Parts, name: str) -> list[Tensor]:
    """What makes up the part: more than one tensor where weights are stacked."""
    return parts.pieces(name) if isinstance(parts, Stacked) else [parts[name]]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension, keeping the order in memory of matrices that lie transposed (GPTQ's)."""
    if parts[0].dim() == 2 and parts[0].stride(0) == 1 != parts[0].stride(1):
        return torch.cat([p.T for p in parts], 1).T
    return torch.cat(list(parts))
