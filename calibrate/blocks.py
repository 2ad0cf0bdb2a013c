"""The decoder blocks of a model, run one at a time.

Only the block being quantized has memory behind it. What a block is called with beside the hidden states (rotary
embeddings, masks) does not depend on them, so one pass of the whole model over one sample, every block stubbed out,
records it for all of them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.load import assign, owner
from ..models.names import Placement, placements

# Calibration rows run through a block at once.
_BATCH = 8


def find_blocks(model: PreTrainedModel) -> str:
    """Path of the ModuleList that holds the decoder blocks: the longest one of a single class."""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    if not lists:
        raise UserError(
            f"model_type {model.config.model_type!r} has no list of equal decoder blocks, which the "
            "block-by-block driver needs. "
            f"Fix: quantize another architecture"
        )
    return max(lists, key=lambda item: len(item[1]))[0]


def by_block(model: PreTrainedModel, path: str, weights: Iterable[str]) -> list[list[Placement]]:
    """The placements of every block of the list at `path`, and last those of everything outside it."""
    count = len(model.get_submodule(path))  # type: ignore[arg-type]
    found: list[list[Placement]] = [[] for _ in range(count + 1)]
    for placement in placements(model, weights):
        rest = placement.target.removeprefix(path + ".")
        found[int(rest.split(".")[0]) if rest != placement.target else count].append(placement)
    return found


def load_weights(
    model: PreTrainedModel,
    places: Iterable[Placement],
    dense: Callable[[str], Tensor],
    device: torch.device,
    where: object,
) -> None:
    """Give the model the weights of `places`, `dense` being checkpoint name -> numbers. UserError naming `where` they
    come from.
    """
    for placement in places:
        # A copy: what comes from the file may be its mapped pages, and quantized weights are written over it.
        tensors = [dense(source).to(device, copy=True) for source in placement.sources]
        for name, tensor in placement.convert(tensors, model).items():
            if not assign(model, name, tensor):
                raise UserError(f"{where}: tensor {placement.sources[0]} has no place in the model (as {name})")


def unload_weights(model: PreTrainedModel, places: Iterable[Placement]) -> None:
    """Put the weights of `places` back on the meta device."""
    for placement in places:
        module, leaf = owner(model, placement.target)
        if module is not None and module._parameters.get(leaf) is not None:
            old: Tensor = module._parameters[leaf]  # type: ignore[assignment]
            module._parameters[leaf] = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=False)


class Blocks:
    """Runs of a model's blocks on fixed calibration rows `ids` int64 [samples, seqlen]."""

    def __init__(self, model: PreTrainedModel, path: str, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.list: nn.ModuleList = model.get_submodule(path)  # type: ignore[assignment]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.as_tuple = False
        self.hidden: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Embed every row and record how each block is called. Everything outside the blocks must be loaded."""
        self._record()
        self.hidden = [self.embed(rows) for rows in self.ids.split(_BATCH)]

    def embed(self, rows: Tensor) -> Tensor:
        """What the first block is given for `rows` int64 [samples, seqlen]."""
        with self._stub(None) as seen:
            self._forward(rows)
        found: Tensor = seen[0][0][0]
        return found

    def block(self, index: int, hidden: Tensor) -> Tensor:
        """Output of block `index` for its input, [samples, seqlen, H]."""
        args, kwargs = self.calls[index]
        out = self.list[index](hidden, *args, **kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def head(self, rows: Tensor, hidden: Tensor) -> Any:
        """What the model returns for `rows` where the last block has given `hidden`."""
        with self._stub(hidden):
            return self._forward(rows)

    def _record(self) -> None:
        try:
            with self._stub(None) as seen:
                self._forward(self.ids[:1])
        except (IndexError, ValueError, RuntimeError):
            # Blocks of this model return (hidden, ...): a bare tensor was indexed as if it were that tuple.
            self.as_tuple = True
            with self._stub(None) as seen:
                self._forward(self.ids[:1])
        if seen[-1][0][0].dim() != 3:
            self.as_tuple = True
            with self._stub(None) as seen:
                self._forward(self.ids[:1])
        if len(seen) != len(self.list):
            raise UserError(
                f"{len(seen)} of {len(self.list)} blocks were called in one forward; this architecture is not supported"
            )
        self.calls = [(args[1:], kwargs) for args, kwargs in seen]

    @contextmanager
    def _stub(self, replacement: Tensor | None) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Blocks pass their input on; the first gives `replacement` instead where there is one. Yields the calls
        made.
        """
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop("hidden_states"),)
            seen.append((args, kwargs))
            hidden = replacement if replacement is not None and len(seen) == 1 else args[0]
            return (hidden,) if self.as_tuple else hidden

        for block in self.list:
            block.__dict__["forward"] = stub
        try:
            yield seen
        finally:
            for block in self.list:
                del block.__dict__["forward"]

    def _forward(self, rows: Tensor) -> Any:
        return self.model(input_ids=rows, use_cache=False)

    @torch.no_grad()
    def run(self, index: int, keep: bool) -> None:
        """Run block `index` on the hidden states; with `keep` its outputs become the next block's inputs."""
        for i, hidden in enumerate(self.hidden):
            out = self.block(index, hidden)
            if keep:
                self.hidden[i] = out

    @torch.no_grad()
    def sample(self, index: int) -> Tensor:
        """Output of block `index` on the first batch, for before-and-after comparisons."""
        return self.block(index, self.hidden[0])

    @torch.no_grad()
    def finish(self) -> None:
        """Run what follows the last block (final norm, head) on the hidden states."""
        for rows, hidden in zip(self.ids.split(_BATCH), self.hidden, strict=True):
            self.head(rows, hidden)
