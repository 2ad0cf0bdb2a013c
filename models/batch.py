"""The nouns between the engine and the attention function: one `Batch` per step, and the `Step` in progress.

transformers calls an attention function with tensors only, and some models drop extra keyword arguments on the way,
so the batch travels beside the forward in a context variable. The forward itself sees one packed row `[1, T]`: every
token of every sequence, decode rows first, and only the attention function knows where sequences begin.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..kernels.attention import KVShape, Memo, Parts


@dataclass(frozen=True)
class Batch:
    """T tokens of B sequences; the runner sets every field from the scheduler's choice.

    Decode rows (one token each) come first.
    """

    ids: Tensor  # [T] int64: token ids
    positions: Tensor  # [T] int64: position of each token in its sequence
    cu_q: Tensor  # [B + 1] int32: sequence b owns rows cu_q[b] to cu_q[b + 1]
    context_len: Tensor  # [B] int32: tokens of the sequence in the cache once this step has stored its own
    block_table: Tensor  # [B, P] int32: cache blocks in order; entries past the context are never read
    slots: Tensor  # [T] int64: where each token's key and value go, block * block_size + offset
    last: Tensor  # [B] int64: row of each sequence's last token, the one whose logits are wanted
    num_decode: int  # the first num_decode sequences have exactly one row


class PagedCache(Protocol):
    """What the attention function needs of a KV cache (kv_quant.base.KVCache has it)."""

    block_size: int
    # The module of the codec's device functions (kernels.paged); "" where torch runs the attention
    kernels: str

    def store(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write key `[T, heads, key_dim]` and value `[T, heads, value_dim]` to `slots[T]`."""

    def parts(self, layer: int) -> tuple[Parts, Parts]:
        """The layer's K parts and V parts."""

    def decode(self, parts: Parts) -> Tensor:
        """Gathered parts -> `[N, heads, dim]` in the model's dtype."""


@dataclass(frozen=True)
class Step:
    """One forward in progress. `memo` is filled by torch's paged attention: what layers of the same window share."""

    batch: Batch
    cache: PagedCache
    memo: Memo = field(default_factory=dict)


@dataclass(frozen=True)
class WarmUp:
    """A forward that only records which layers call the attention function, and with which shapes."""

    calls: list[tuple[int, KVShape]] = field(default_factory=list)


_CURRENT: ContextVar[Step | WarmUp] = ContextVar("bitsmith_step")


def current_step() -> Step | WarmUp:
    """The step in progress. RuntimeError outside of one: a paged model cannot be called like a plain one."""
    try:
        return _CURRENT.get()
    except LookupError:
        raise RuntimeError(
            "paged attention was called outside an engine step; for a plain forward, first call "
            "model.set_attn_implementation('sdpa')"
        ) from None


def paged_step() -> Step | None:
    """The step in progress; None in a warm-up and in a plain forward."""
    step = _CURRENT.get(None)
    return step if isinstance(step, Step) else None


@contextmanager
def running(step: Step | WarmUp) -> Iterator[None]:
    """Make `step` the current one for the forward inside the `with`."""
    token = _CURRENT.set(step)
    try:
        yield
    finally:
        _CURRENT.reset(token)
