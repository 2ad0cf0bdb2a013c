"""Microseconds of one layer's attention over a paged cache beside torch's on the same keys and values, contiguous.

What is timed is what the engine's attention function does once this step's keys and values are stored
(models.attention.attend): Triton on a GPU, the native library or torch on a CPU. The blocks of a sequence lie in random
order, as in an engine that has run for a while. What the layers of a step share (torch's gather indices) is made by the
first call and kept, as in a step of many layers. Clock, turns and shares of the machine are those of kernel_speed.py;
bytes are those of the keys and values in the cache, read once.

The peers are F.scaled_dot_product_attention in the dtype of the model, whatever the codec: `sdpa` with enable_gqa, and
`sdpa-grouped`, in decode, with the query heads of one KV head as its query rows, which reads no key twice. Prefill is
one whole prompt of the context's length. Left out: chunks behind a cached context, for which torch needs a mask that
keeps it off its fast path.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention, native_layer
from ..kernels.attention import KVShape
from ..kv_quant.base import KVCache, load_codec
from ..models.attention import attend
from ..models.batch import Batch, Step
from ..serve.engine import EngineConfig
from .kernel_speed import OURS, Clock, Timing, half_dtype, interleaved, recorded

SEQUENCES = (1, 8, 32)
CONTEXTS = (512, 2048, 8192)
# Tokens of the prompt, where a context is as long.
PREFILL = 2048
PEERS = ("sdpa", "sdpa-grouped")


class Heads(NamedTuple):
    """Of queries, of keys and values, and the numbers of each."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv}x{self.dim}"


# Llama 3 8B's.
HEADS = Heads(32, 8, 128)


@dataclass(frozen=True)
class Case:
    """One attention: a KV codec, heads, and `sequences` of `context` tokens with one query each, or all in prefill."""

    kv: str
    heads: Heads
    sequences: int
    context: int
    prefill: bool = False

    @property
    def name(self) -> str:
        return f"{self.kv} {self.heads} {self.label}"

    @property
    def label(self) -> str:
        return f"{'prefill' if self.prefill else 'decode'} {self.sequences}x{self.context}"

    @property
    def queries(self) -> int:
        """Of one sequence."""
        return self.context if self.prefill else 1

    @property
    def work(self) -> int:
        """Floating-point operations of both products, of visible keys alone."""
        pairs = self.context * (self.context + 1) // 2 if self.prefill else self.context
        return 4 * self.sequences * pairs * self.heads.query * self.heads.dim

    def moved(self, nbytes: int) -> int:
        """Bytes of the keys and values."""
        return nbytes


class Contender(NamedTuple):
    """What is called, bytes of the keys and values it reads, and which path it takes."""

    run: Callable[[], Tensor]
    nbytes: int
    path: str


def cases(kv: str, heads: Heads, sequences: Sequence[int], contexts: Sequence[int]) -> list[Case]:
    """Every decode, then one prompt of PREFILL tokens (or the longest context, if that is shorter)."""
    decode = [Case(kv, heads, count, context) for context in contexts for count in sequences]
    return [*decode, Case(kv, heads, 1, min(PREFILL, max(contexts)), prefill=True)]


def contenders(case: Case, device: torch.device, wanted: Sequence[str] = PEERS) -> dict[str, Contender]:
    """Ours and those of `wanted` that exist for the case; all give [T, H, D] in the same order of rows."""
    dtype, heads, many = half_dtype(device), case.heads, case.sequences
    # One sequence's numbers for all: each has them in memory of its own.
    k, v = (torch.randn(case.context, heads.kv, heads.dim, device=device).to(dtype) for _ in range(2))
    q = torch.randn(many * case.queries, heads.query, heads.dim, device=device).to(dtype)
    found = {OURS: _ours(case, q, k, v)}
    if not wanted:
        return found
    keys, values = (x.transpose(0, 1).repeat(many, 1, 1, 1) for x in (k, v))
    rows = q.view(many, case.queries, heads.query, heads.dim).transpose(1, 2).contiguous()
    group = heads.query // heads.kv
    calls: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(rows, keys, values, is_causal=case.prefill, enable_gqa=True)
    }
    if not case.prefill and group > 1:
        grouped = q.view(many, heads.kv, group, heads.dim)
        calls["sdpa-grouped"] = lambda: F.scaled_dot_product_attention(grouped, keys, values)
    size = keys.nbytes + values.nbytes
    return found | {
        n: Contender(call, size, str(dtype).removeprefix("torch.")) for n, call in calls.items() if n in wanted
    }


def _ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Over a paged cache that holds k and v [context, Hkv, D] for each sequence."""
    heads, device, size = case.heads, q.device, EngineConfig.block_size
    codec = load_codec(case.kv, q.dtype)
    pages = -(-case.context // size)
    cache = KVCache(codec, {0: KVShape(heads.kv, heads.dim, heads.dim)}, case.sequences * pages, size, device)
    table = torch.randperm(case.sequences * pages, device=device).view(case.sequences, pages)
    tokens = torch.arange(case.context, device=device)
    for blocks in table:
        cache.store(0, k, v, blocks[tokens // size] * size + tokens % size)
    starts = torch.arange(case.sequences + 1, dtype=torch.int32, device=device) * case.queries
    none = torch.empty(0, dtype=torch.int64, device=device)
    batch = Batch(
        ids=none, positions=none, slots=none, last=none, cu_q=starts, block_table=table.int(),
        context_len=torch.full((case.sequences,), case.context, dtype=torch.int32, device=device),
        num_decode=0 if case.prefill else case.sequences,
    )  # fmt: skip
    native = attention.native(q, *cache.parts(0)) and (
        not case.prefill or native_layer.takes_chunks(heads.dim, heads.dim)
    )
    path = "triton" if cache.kernels else "native" if native else "torch"
    nbytes = 2 * case.sequences * case.context * codec.bytes_per_token(heads.kv, heads.dim)
    return Contender(partial(attend, Step(batch, cache), 0, q, heads.dim, heads.dim**-0.5), nbytes, path)


@torch.inference_mode()
def measure(
    wanted: Sequence[Case], clock: Clock, peers: Sequence[str], samples: int, told: Callable[[str], None]
) -> Iterator[tuple[Case, dict[str, Timing]]]:
    """Every case on every contender, as each is done."""
    for case in wanted:
        yield case, _timings(case, clock, peers, samples, told)


def _timings(
    case: Case, clock: Clock, peers: Sequence[str], samples: int, told: Callable[[str], None]
) -> dict[str, Timing]:
    found = contenders(case, clock.device, peers)
    # As in the engine, whose decode steps are recorded on a CPU.
    made = recorded if clock.device.type == "cpu" and not case.prefill else _itself
    makers: dict[str, Callable[[], Callable[[], Any]]] = {n: partial(made, c.run) for n, c in found.items()}
    seconds = interleaved(case.name, makers, clock, samples, told)
    return {name: Timing(taken, found[name].nbytes, found[name].path) for name, taken in seconds.items()}


def _itself(run: Callable[[], Any]) -> Callable[[], Any]:
    return run
