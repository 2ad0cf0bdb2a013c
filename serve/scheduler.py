"""Which tokens of which requests run in the next forward pass: continuous batching with chunked prefill.

A step packs the next token of every decoding sequence and, in what is left of the token budget, chunks of prompts
(Orca, https://www.usenix.org/conference/osdi22/presentation/yu; Sarathi-Serve, https://arxiv.org/abs/2403.02310).
There is one policy, first come first served: a request is admitted when the KV blocks of everything it already knows
are free, in order of arrival, and nothing overtakes it. When decoding runs out of blocks the youngest sequence gives
all of its own back and waits at the head of the queue to be recomputed. The oldest one thus advances in every step,
which is why the loop can neither livelock nor starve anyone.

A sequence may have a guide, a second sequence with another prompt and the same output (classifier-free guidance). The
two are one request: admitted, sampled, preempted and freed together, and counted as two in a step.

Left out: priorities, swapping KV to host memory (recomputing a chunk is cheaper at these sizes) and letting a smaller
request overtake one that does not fit (throughput for some, starvation for others).

Pure Python on ints: no torch, so that thousands of random traces are tested in seconds.
"""

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from ..samplers.params import SamplingParams
from .blocks import BlockManager

Status = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Seq:
    """One request: the tokens it knows and how many of them are in the KV cache."""

    request_id: str  # set by the caller
    ids: list[int]  # prompt by the caller; `Scheduler.update` appends one token per sampled row
    params: SamplingParams  # set by the caller
    num_prompt: int = field(init=False)  # set here: length of the prompt
    seed: int = field(init=False)  # set here: params.seed, or drawn; see samplers.pipeline.sample
    cached: int = 0  # tokens whose KV is stored; set by `Scheduler.update`, 0 again after a preemption
    blocks: list[int] = field(default_factory=list)  # block table; grown and emptied by the scheduler
    status: Status = "waiting"  # set by the scheduler
    limit: int = 0  # length at which the engine must finish it; set by `Scheduler.add`
    guide: "Seq | None" = None  # set by the caller: the negative prompt; gets every token this one gets
    is_guide: bool = field(default=False, init=False)  # set here

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)
        if self.guide:
            self.guide.is_guide = True
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.ids[: self.num_prompt]

    @property
    def output(self) -> list[int]:
        """Token ids sampled so far."""
        return self.ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """How many tokens were sampled."""
        return len(self.ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is not stored yet: 1 while decoding, more while prefilling."""
        return len(self.ids) - self.cached

    @property
    def members(self) -> "tuple[Seq, ...]":
        """The sequences that run as one: itself and its guide."""
        return (self, self.guide) if self.guide else (self,)

    @property
    def decoding(self) -> bool:
        """Whether one token of each member is left to run before the next is sampled."""
        return all(each.remaining == 1 for each in self.members)

    @property
    def at_limit(self) -> bool:
        """Whether max_tokens, the context or the whole KV pool is used up: the engine finishes it with "length"."""
        return len(self.ids) >= self.limit


class Scheduler:
    """Owns the queues and, through `blocks`, every block table. One step of the engine is

        batch = scheduler.schedule()            # [(seq, n)]: run ids[cached : cached + n] of each; blocks are in place
        ...forward; sample the rows with n == seq.remaining...
        scheduler.update(batch, tokens)         # one token per sampled row, None for the others
        ...scheduler.finish(seq) for those that met eos, a stop string or `seq.at_limit`

    UserError unless 1 <= max_num_seqs <= max_num_batched_tokens (every decoding sequence must fit into one step).
    """

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, blocks: BlockManager, max_model_len: int
    ) -> None:
        if max_num_seqs < 1:
            raise UserError(f"max_num_seqs is {max_num_seqs}: at least 1 sequence must run")
        if max_num_batched_tokens < max_num_seqs:
            raise UserError(
                f"max_num_batched_tokens is {max_num_batched_tokens}, below max_num_seqs ({max_num_seqs}): a step "
                "holds one token of every running sequence; raise the first or lower the second"
            )
        if max_model_len < 2:
            raise UserError(f"max_model_len is {max_model_len}: a prompt token and a sampled one need at least 2")
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.blocks = blocks
        self.waiting: deque[Seq] = deque()  # in order of arrival; preempted ones are older than all others
        self.running: list[Seq] = []  # in order of arrival
        self.preemptions = 0  # since the start

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return something."""
        return bool(self.waiting or self.running)

    def check(self, num_prompt: int, num_negative: int = 0) -> None:
        """UserError if a prompt of `num_prompt` tokens, and a guide's of `num_negative`, could never run."""
        if num_prompt < 1:
            raise UserError("the prompt is empty: at least one token is needed to predict the next one; send some text")
        if num_prompt >= self.max_model_len:
            raise UserError(
                f"the prompt has {num_prompt} tokens and the context holds {self.max_model_len}, completion included: "
                f"shorten the prompt to at most {self.max_model_len - 1} tokens or serve with a larger --max-model-len"
            )
        if num_negative:
            self._check_guide(num_prompt, num_negative)
        if num_prompt > self.blocks.capacity:
            raise UserError(
                f"the prompt has {num_prompt} tokens and the whole KV cache holds {self.blocks.capacity} "
                f"({self.blocks.num_blocks} blocks of {self.blocks.block_size}): shorten the prompt or give the KV "
                "cache more memory"
            )

    def _check_guide(self, num_prompt: int, num_negative: int) -> None:
        if self.max_num_seqs < 2:
            raise UserError("guidance_scale runs two sequences: serve with --max-num-seqs 2 or more, or leave it at 1")
        if num_negative >= self.max_model_len:
            raise UserError(
                f"negative_prompt has {num_negative} tokens and the context holds {self.max_model_len}, completion "
                f"included: shorten it to at most {self.max_model_len - 1} tokens"
            )
        if self.blocks.blocks_for(num_prompt) + self.blocks.blocks_for(num_negative) > self.blocks.num_blocks:
            raise UserError(
                f"the prompt has {num_prompt} tokens, negative_prompt {num_negative}, and the whole KV cache holds "
                f"{self.blocks.capacity}: shorten them or give the KV cache more memory"
            )

    def add(self, seq: Seq) -> None:
        """Queue a new sequence. UserError if its prompt can never run or its request_id is already in use."""
        self.check(seq.num_prompt, seq.guide.num_prompt if seq.guide else 0)
        if any(other.request_id == seq.request_id for other in (*self.running, *self.waiting)):
            raise UserError(f"request_id {seq.request_id!r} is already in use: give each request its own")
        # The KV of the last sampled token is never needed, hence one more token than the pool has slots.
        seq.limit = min(self.max_model_len, self.blocks.capacity + 1)
        if seq.guide:
            longer = seq.guide.num_prompt - seq.num_prompt
            seq.limit = min(seq.limit, self.max_model_len - longer)
            needed = self.blocks.blocks_for
            while needed(seq.limit - 1) + needed(seq.limit - 1 + longer) > self.blocks.num_blocks:
                seq.limit -= 1
        if seq.params.max_tokens is not None:
            seq.limit = min(seq.limit, seq.num_prompt + seq.params.max_tokens)
        self.waiting.append(seq)

    def schedule(self) -> list[tuple[Seq, int]]:
        """The next step: (sequence, number of new tokens), decoding ones first. Empty only when there is no work."""
        batch: list[tuple[Seq, int]] = []
        # A preemption shortens `running` while we walk it, but only from its end.
        for seq in self.running:
            if seq.decoding and self._secure(seq):
                batch += [(each, 1) for each in seq.members]
        budget = self.max_num_batched_tokens - len(batch)
        prefilling = [seq for seq in self.running if not seq.decoding]
        while budget:
            next_seq = prefilling.pop(0) if prefilling else self._admit()
            if next_seq is None:
                break
            chunks = _chunks(next_seq, budget)
            batch += chunks
            budget -= sum(count for _, count in chunks)
        assert batch or not self.has_work, "work is left and nothing was scheduled"
        return batch

    def update(self, batch: Sequence[tuple[Seq, int]], tokens: Sequence[int | None]) -> None:
        """Record that `batch` (of the last `schedule`) ran.

        tokens[i] is what row i sampled, None where its prompt is unfinished and for a guide, which gets its
        sequence's token. Rows aborted meanwhile are skipped.
        """
        for (seq, count), token in zip(batch, tokens, strict=True):
            if seq.status != "running":
                continue
            complete = count == seq.remaining and not seq.is_guide
            assert (token is not None) == complete, f"{seq.request_id}: only a complete row is sampled"
            seq.cached += count
            if token is not None:
                for each in seq.members:
                    each.ids.append(token)

    def rewind(self, seq: Seq, num_output: int) -> None:
        """Forget all but the first `num_output` sampled tokens of a sequence, and their KV."""
        for each in seq.members:
            del each.ids[each.num_prompt + num_output :]
            # The last token runs again: its logits are gone.
            each.cached = min(each.cached, len(each.ids) - 1)
            self.blocks.shrink(each.blocks, len(each.ids))

    def finish(self, seq: Seq) -> None:
        """Take a running or waiting sequence out and free its blocks at once. No effect on a finished one."""
        if seq.status == "finished":
            return
        (self.running if seq.status == "running" else self.waiting).remove(seq)
        for each in seq.members:
            each.status = "finished"
            self.blocks.free(each.blocks)

    def abort(self, request_id: str) -> Seq | None:
        """Finish the sequence of that name wherever it is, between two steps; None if there is none."""
        for seq in (*self.running, *self.waiting):
            if seq.request_id == request_id:
                self.finish(seq)
                return seq
        return None

    def check_integrity(self) -> None:
        """AssertionError unless the block tables of the queued sequences account for every block."""
        assert not any(each.blocks for seq in self.waiting for each in seq.members), "a waiting sequence holds blocks"
        self.blocks.check_integrity(each.blocks for seq in self.running for each in seq.members)

    def _secure(self, seq: Seq) -> bool:
        """Make room for the next token of `seq`, preempting the youngest as long as needed.

        False if that was `seq` itself.
        """
        while not all(self.blocks.grow(each.blocks, len(each.ids)) for each in seq.members):
            victim = self.running.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Seq) -> None:
        """Back to the head of the queue, to be recomputed from its tokens."""
        for each in seq.members:
            self.blocks.free(each.blocks)
            each.cached = 0
            each.status = "waiting"
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _admit(self) -> Seq | None:
        """Start the oldest waiting sequence, with the blocks of all its known tokens; None if it has to wait."""
        rows = sum(len(seq.members) for seq in self.running)
        if not self.waiting or rows + len(self.waiting[0].members) > self.max_num_seqs:
            return None
        seq = self.waiting[0]
        assert not seq.at_limit, f"{seq.request_id} is at its limit and was not finished"
        # One block of headroom per running sequence: else a newcomer is soon preempted and its prefill wasted.
        if sum(self.blocks.missing(each.blocks, len(each.ids)) for each in seq.members) + rows > self.blocks.num_free:
            return None
        for each in seq.members:
            self.blocks.grow(each.blocks, len(each.ids))
            each.status = "running"
        self.waiting.popleft()
        self.running.append(seq)
        return seq


def _chunks(seq: Seq, budget: int) -> list[tuple[Seq, int]]:
    """What of an unfinished prompt runs within `budget` tokens.

    Where not everything fits, each of a sequence and its guide keeps its last token: the two are sampled together.
    """
    if sum(each.remaining for each in seq.members) <= budget:
        return [(each, each.remaining) for each in seq.members]
    chunks = []
    for each in seq.members:
        count = min(each.remaining - (seq.guide is not None), budget)
        budget -= count
        chunks += [(each, count)] if count else []
    return chunks
