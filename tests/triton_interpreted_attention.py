"""The paged-attention and KV-store kernels against their torch twins, in Triton's interpreter on CPU tensors.

Run by test_triton.py, as triton_interpreted.py is. By hand: TRITON_INTERPRET=1 pytest tests/triton_interpreted_attention.py

Slots that no sequence owns, and outputs before they are written, hold NaN (integers: the largest).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.kernels import attention, paged
from bitsmith.kernels.attention import KVShape
from bitsmith.kernels.lang import jit, tl
from bitsmith.kernels.paged_tiles import pieces, splits
from bitsmith.kernels.pages import large_pages
from bitsmith.kv_quant import int8, none
from bitsmith.kv_quant.base import KVCache, load_codec
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.engine import Engine, EngineConfig
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Relative RMS error. Both sides round the probabilities to the dtype, at different places of an online softmax.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
CPU = torch.device("cpu")
MIXED = [(7, 1), (37, 1), (1, 1), (30, 30), (19, 5), (2, 2), (1, 1)]


def poison(t: Tensor) -> Tensor:
    return t.fill_(math.nan if t.dtype.is_floating_point else torch.iinfo(t.dtype).max)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: poison(real(*size, **options)))
    for codec in (int8, none):
        monkeypatch.setattr(codec, "large_pages", lambda *what: poison(large_pages(*what)))
    monkeypatch.setenv("BITSMITH_KERNELS", "triton")


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter truncates where a GPU rounds, and its dot multiplies the bits (triton-lang/triton#11584)."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return (
                wide(source)
                if source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32
                else cast(self, source, kind)
            )
        data = torch.from_numpy(np.atleast_1d(source.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(data.reshape(np.shape(source.data)), tl.bfloat16)

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))


@dataclass(frozen=True)
class Case:
    """Packed queries over shuffled blocks of a cache, decode rows first, and the arguments that go with them."""

    q: Tensor
    cache: KVCache
    cu_q: Tensor
    context_len: Tensor
    block_table: Tensor
    num_decode: int
    options: dict[str, Any]

    def run(self, **options: Any) -> Tensor:
        options = {**self.options, **options}
        (k, v), cache = self.cache.parts(0), self.cache
        dim = int(options.pop("value_dim"))
        features = [options.get(name) for name in ("window", "softcap", "sinks")]
        found: Tensor = paged.paged_attention(
            self.q, k, v, self.cu_q, self.context_len, self.block_table, self.num_decode, cache.block_size, dim,
            cache.kernels, 0.3, *features,
        )  # fmt: skip
        return found

    def twin(self) -> Tensor:
        options = {name: value for name, value in self.options.items() if name != "value_dim"}
        k, v = self.cache.parts(0)
        fields = {name: getattr(self, name) for name in ("cu_q", "context_len", "block_table", "num_decode")}
        return attention.paged_attention(
            self.q, k, v, **fields, block_size=self.cache.block_size, decode=self.cache.decode, scale=0.3, **options
        )

    def check(self) -> None:
        found, wanted = self.run(), self.twin()
        assert found.dtype == self.q.dtype and found.shape == wanted.shape and found.is_contiguous()
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < TOLERANCE[self.q.dtype], error


def make_case(
    lengths: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (6, 2),
    dims: tuple[int, int] = (16, 16),
    block: int = 4,
    codec: str = "none",
    **options: Any,
) -> Case:
    """lengths: (tokens cached, queries) a sequence; heads: of queries and of keys; `sinks=True` makes random ones."""
    lengths = sorted(lengths, key=lambda item: item[1] > 1)
    owned = [-(-total // block) for total, _ in lengths]
    cache = KVCache(load_codec(codec, dtype), {0: KVShape(heads[1], *dims)}, sum(owned) + 3, block, CPU)
    assert cache.kernels == f"bitsmith.kv_quant.{codec}"
    free = torch.randperm(cache.num_blocks).tolist()
    # Entries past a sequence's blocks are never read, so they may be anything.
    table = torch.full((len(lengths), max(owned) + 1), 10**6, dtype=torch.int32)
    for row, (total, _) in enumerate(lengths):
        blocks = torch.tensor([free.pop() for _ in range(owned[row])])
        table[row, : len(blocks)] = blocks
        slots = (blocks[:, None] * block + torch.arange(block)).flatten()[:total]
        for part, dim in zip(cache.parts(0), dims, strict=True):
            attention.store(part, torch.randn(total, heads[1], dim).to(dtype), slots, cache.codec.encode)
    counts = [queries for _, queries in lengths]
    q = torch.randn(sum(counts), heads[0], dims[0]).to(dtype)
    cu_q = torch.tensor([0, *counts]).cumsum(0).int()
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads[0]).to(dtype)
    context = torch.tensor([n for n, _ in lengths]).int()
    return Case(q, cache, cu_q, context, table, sum(n == 1 for n in counts), {**options, "value_dim": dims[1]})


ALL: dict[str, Any] = {"window": 5, "softcap": 2.0, "sinks": True}
FEATURES: dict[str, dict[str, Any]] = {"plain": {}, **{name: {name: value} for name, value in ALL.items()}, "all": ALL}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_features(dtype: torch.dtype, features: dict[str, Any]) -> None:
    make_case(MIXED, dtype, **features).check()


@pytest.mark.parametrize("features", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_int8_cache(dtype: torch.dtype, features: dict[str, Any]) -> None:
    make_case(MIXED, dtype, codec="int8", **features).check()


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((4, 4), (80, 80)),
        ((5, 1), (96, 96)),
        ((3, 1), (24, 10)),
        ((2, 2), (192, 128)),
        ((16, 1), (576, 512)),
        ((71, 1), (64, 64)),
        ((12, 2), (128, 128)),
        ((2, 1), (256, 256)),
    ],
    ids=str,
)
def test_heads_and_dims(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    make_case([(5, 1), (33, 1), (9, 6)], torch.float16, heads, dims, sinks=True).check()


@pytest.mark.parametrize("block", [1, 4, 7, 16, 32])
def test_block_sizes(block: int) -> None:
    make_case(MIXED, block=block, window=3).check()
    make_case(MIXED, block=block, codec="int8").check()


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 1)] * 3, [(13, 13)], [(65, 2)], [(129, 1), (128, 1)]], ids=str)
def test_lengths(lengths: list[tuple[int, int]]) -> None:
    make_case(lengths, torch.float16).check()


def test_any_batch() -> None:
    """Random shapes and features; a failure prints its case."""
    pick = random.Random(7)
    for _ in range(12):
        group, kv_heads = pick.choice([1, 2, 3, 8]), pick.choice([1, 2])
        given: dict[str, Any] = {
            "lengths": [(n + pick.randrange(40), n) for n in pick.choices([1, 1, 2, 9], k=4)],
            "dtype": pick.choice(list(TOLERANCE)),
            "heads": (group * kv_heads, kv_heads),
            "dims": (pick.choice([16, 20, 48]), pick.choice([16, 20, 48])),
            "block": pick.choice([4, 16]),
            "codec": pick.choice(["none", "int8"]),
            "window": pick.choice([None, 1, 6, 50]),
            "softcap": pick.choice([None, 3.0]),
            "sinks": pick.choice([None, True]),
        }
        print(given)
        make_case(**given).check()


@pytest.mark.parametrize("features", [{}, {**ALL, "window": 70}], ids=["plain", "all"])
def test_a_split_changes_nothing(features: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Context 150 has three or more tiles of keys, so some shares of some splits are empty."""
    case = make_case([(150, 1), (3, 1), (90, 20), (2, 2)], heads=(4, 2), **features)
    found = []
    for n in (1, 2, 3, 4):
        monkeypatch.setattr(paged, "splits", lambda *_, n=n: n)
        found.append(case.run())
        assert torch.equal(case.run(), found[-1]), "a second run gives the same bits"
    wanted = case.twin()
    assert all((y - wanted).norm() / wanted.norm() < TOLERANCE[torch.float32] for y in found)


@pytest.mark.parametrize(("window", "shares"), [(None, 6), (300, 2), (100, 1)])
def test_a_long_context_is_split_by_itself(window: int | None, shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(*numbers: int) -> int:
        asked.append(splits(*numbers))
        return asked[-1]

    monkeypatch.setattr(paged, "splits", counted)
    make_case([(800, 1)], torch.float16, heads=(2, 1), window=window).check()
    assert asked == [shares]


@pytest.mark.parametrize(
    "view",
    [
        lambda q: q.transpose(0, 1).contiguous().transpose(0, 1),
        lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
        lambda q: torch.cat([q, q], 1)[:, : q.shape[1]],
    ],
    ids=["head-major", "last-stride", "slice"],
)
def test_strided_queries(view: Callable[[Tensor], Tensor]) -> None:
    case = make_case(MIXED)
    strided = replace(case, q=view(case.q))
    assert not strided.q.is_contiguous()
    assert torch.equal(strided.run(), case.run())


def test_a_table_that_is_a_slice() -> None:
    case = make_case(MIXED)
    wide = torch.full((len(MIXED), 40), 10**6, dtype=torch.int32)
    wide[:, : case.block_table.shape[1]] = case.block_table
    strided = replace(case, block_table=wide[:, : case.block_table.shape[1]])
    assert torch.equal(strided.run(), case.run())


def test_more_prefilled_sequences_than_one_search() -> None:
    make_case([(2, 2)] * 131 + [(3, 1)] * 2, heads=(1, 1)).check()


def test_a_padded_row_gives_zeros() -> None:
    """Of a captured batch larger than the one at hand: no context."""
    case = make_case([(5, 1), (6, 1)])
    padded = replace(case, context_len=torch.tensor([5, 0], dtype=torch.int32))
    found = padded.run()
    assert torch.equal(found[0], case.run()[0]) and not found[1].any()


@jit
def _decode_all(parts: Any, out: Any, N: Any, CODEC: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr) -> None:  # fmt: skip
    at = tl.arange(0, 64)
    tile = CODEC[0](parts, at.to(tl.int64), at < N, START, WIDTH, DIM)
    tl.store(out + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], tile.to(out.dtype.element_ty))


def same_bits(a: Tensor, b: Tensor) -> bool:
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))


def vectors(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random magnitudes, zeros, ties of rounding, subnormal scales."""
    x = torch.randn(tokens, heads, dim) * 10.0 ** torch.randint(-6, 4, (tokens, heads, 1))
    x[0] = 0
    x[1, 0] = torch.arange(dim) / 2 % 10 + 0.5
    x[1, 0, 0] = 127
    x[2, -1] *= 1e-38 / x[2, -1].abs().max()
    return x.to(dtype)


@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["none", "int8"])
def test_codecs_are_their_twins(name: str, dtype: torch.dtype, dim: int) -> None:
    """Stored parts and decoded numbers, bit for bit, and nothing of slots that are not asked for."""
    shape = KVShape(3, dim, 24)
    cache = KVCache(load_codec(name, dtype), {0: shape}, 4, 4, CPU)
    key, value = vectors(7, 3, dim, dtype), vectors(7, 3, 24, dtype)
    slots = torch.randperm(16)[:7]
    # As a model hands them over: heads first.
    cache.store(0, *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value)), slots)
    for parts, x, width in zip(cache.parts(0), (key, value), (dim, 24), strict=True):
        wanted = poisoned_alloc(cache, width)
        attention.store(wanted, x, slots, cache.codec.encode)
        assert all(same_bits(a, b) for a, b in zip(parts, wanted, strict=True))
        decoded = cache.decode(tuple(part.index_select(0, slots) for part in parts)).flatten(0, 1)
        gathered = tuple(part.index_select(0, slots).contiguous() for part in parts)
        for start, piece in zip((0, pieces(width)[0]), pieces(width), strict=True):
            if piece:
                out = torch.empty(64, piece, dtype=dtype)
                _decode_all[(1,)](gathered, out, 21, paged.device_functions(cache.kernels), start, piece, width)
                inside = decoded[:, start : start + piece]
                assert same_bits(out[:21, : inside.shape[1]], inside)
                assert not out[21:].any() and not out[:, inside.shape[1] :].any()


def poisoned_alloc(cache: KVCache, width: int) -> tuple[Tensor, ...]:
    return tuple(poison(part) for part in cache.codec.alloc(16, 3, width, CPU))


def test_a_broken_vector_stays_broken() -> None:
    cache = KVCache(load_codec("int8", torch.float32), {0: KVShape(1, 16, 16)}, 1, 4, CPU)
    x = torch.ones(2, 1, 16)
    x[1, 0, 3] = math.nan
    cache.store(0, x, x, torch.tensor([0, 1]))
    decoded = cache.decode(tuple(part[:2] for part in cache.parts(0)[0]))
    assert decoded[0].isfinite().all() and decoded[1].isnan().all()


def test_storing_no_token_is_nothing() -> None:
    cache = KVCache(load_codec("none", torch.float32), {0: KVShape(1, 16, 16)}, 1, 4, CPU)
    cache.store(0, torch.empty(0, 1, 16), torch.empty(0, 1, 16), torch.zeros(0, dtype=torch.int64))
    assert all(part.isnan().all() for parts in cache.parts(0) for part in parts)


def test_operators_keep_their_schemas_and_fakes() -> None:
    case = make_case([(5, 1), (6, 3)])
    (k, v), cache = case.cache.parts(0), case.cache
    for part in (*k, *v):
        # opcheck compares what an operator must not touch by ==, which NaN is not.
        part.nan_to_num_()
    arguments = (
        case.q, [*k], [*v], case.cu_q, case.context_len, case.block_table, 1, 4, 16, cache.kernels, 0.3, 3, 2.0, None,
    )  # fmt: skip
    torch.library.opcheck(paged.paged_attention, arguments, test_utils=("test_schema", "test_faketensor"))
    x = torch.randn(2, 2, 16)
    arguments = (x, x + 1, torch.tensor([3, 1]), [*k], [*v], cache.kernels)
    torch.library.opcheck(paged.kv_store, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "kv"), [("Llama", "none"), ("Llama", "int8"), ("Gemma2", "none"), ("GptOss", "none")])
def test_an_engine_says_the_same(
    name: str, kv: str, tiny_model: Callable[..., Any], byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts arriving one step apart, chunked prefill beside decode rows: the tokens of the torch path."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 256, (n,), generator=generator).tolist() for n in (19, 1, 5)]
    config = EngineConfig(
        max_model_len=40, max_num_seqs=4, max_num_batched_tokens=12, block_size=4, num_blocks=30, kv_cache_dtype=kv
    )
    said = {}
    for path in ("triton", "reference"):
        monkeypatch.setenv("BITSMITH_KERNELS", path)
        engine = Engine(tiny_model(name), byte_tokenizer, config)
        cache: Any = engine.runner.cache
        assert bool(cache.kernels) == (path == "triton")
        said[path] = generate(engine, prompts)
    assert said["triton"] == said["reference"]
    assert len({token for tokens in said["triton"].values() for token in tokens}) > 6


def generate(engine: Engine, prompts: list[list[int]]) -> dict[str, list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    said: dict[str, list[int]] = {}
    while engine.has_work() or len(said) < len(prompts):
        if len(said) < len(prompts):
            name = str(len(said))
            engine.add_request(name, prompts[len(said)], params)
            said[name] = []
        for name, chunk in engine.step():
            said[name] += chunk.token_ids
    return said
