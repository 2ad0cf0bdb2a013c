"""From the scheduler's choice to logits: one packed forward per step.

Every token of every scheduled sequence goes through the model in one row `[1, T]`, decode rows first; only the last
row of each sequence reaches the output head. Decode rows are ordered by context length, because the attention pads
rows of similar length together.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.batch import Batch, PagedCache, Step, running
from .recorded import Recorded
from .scheduler import Seq

Work = tuple[Seq, int]  # a sequence and how many of its tokens to run


def order_work(work: Sequence[Work]) -> list[Work]:
    """Decode rows by context length, then the prefill chunks as they come."""
    return sorted(work, key=lambda item: item[0].cached if item[1] == 1 else 1 << 62)


def make_batch(work: Sequence[Work], block_size: int, device: torch.device) -> Batch:
    """The batch of `work`, in the order of `order_work`. A sequence has run `cached` of its `ids` and owns `blocks`."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for seq, count in work:
        span = range(seq.cached, seq.cached + count)
        ids += seq.ids[span.start : span.stop]
        positions += span
        slots += [seq.blocks[at // block_size] * block_size + at % block_size for at in span]
    starts = list(itertools.accumulate((count for _, count in work), initial=0))
    width = max(len(seq.blocks) for seq, _ in work)
    table = [seq.blocks + [0] * (width - len(seq.blocks)) for seq, _ in work]
    return Batch(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        cu_q=torch.tensor(starts, dtype=torch.int32, device=device),
        context_len=torch.tensor([seq.cached + count for seq, count in work], dtype=torch.int32, device=device),
        block_table=torch.tensor(table, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, device=device),
        last=torch.tensor([start - 1 for start in starts[1:]], device=device),
        num_decode=sum(count == 1 for _, count in work),
    )


class Runner:
    """A paged model and its cache.

    max_model_len: tokens of the longest sequence. eager: never repeat a recorded step.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache, max_model_len: int, eager: bool = False) -> None:
        # transformers looks through all parameters for it: 0.1 ms.
        self.model, self.cache, self.device = model, cache, model.device
        records = not eager and self.device.type == "cpu"
        self._recorded = Recorded(self._forward, -(-max_model_len // cache.block_size)) if records else None

    def run(self, work: Sequence[Work]) -> Tensor:
        """Run `work` (ordered by `order_work`) -> float32 logits `[len(work), vocab]` of each sequence's last token.

        The next call may overwrite them.
        """
        return self.forward(make_batch(work, self.cache.block_size, self.device))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """float32 logits of the rows `batch.last`; the next call may overwrite them."""
        found = self._recorded.run(batch) if self._recorded else None
        return self._forward(batch) if found is None else found

    def _forward(self, batch: Batch) -> Tensor:
        with running(Step(batch, self.cache)):
            logits: Tensor = self.model(
                input_ids=batch.ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=batch.last,
            ).logits
        return logits[0].float()
