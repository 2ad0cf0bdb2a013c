"""The scheduler and the block manager on thousands of random traces, with a model whose KV cache is a dictionary.

The model checks, at every row it runs, that each earlier token of the sequence is where the block table says: a block
with two owners, a chunk out of order or a preemption that forgets something cannot go unseen.
"""

import random
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from bitsmith.errors import UserError
from bitsmith.samplers.params import SamplingParams
from bitsmith.serve.blocks import BlockManager
from bitsmith.serve.scheduler import Scheduler, Seq
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(frozen=True)
class Arrival:
    step: int  # when it is added
    prompt: int  # tokens
    max_tokens: int
    abort: int | None  # steps after its arrival, if the client leaves
    eos: int | None  # the output length at which the model ends it, if it does
    negative: int = 0  # tokens of its guide's prompt, if it has one
    rewind: tuple[int, int] | None = None  # at this output length, back to that one, once


@dataclass(frozen=True)
class Trace:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    max_model_len: int
    arrivals: list[Arrival]


def next_token(name: str, ids: list[int]) -> int:
    """What the model says after `ids`: depends on the request, every token and their order."""
    value = int(name)
    for token in ids:
        value = (value * 31 + token + 7) & 0xFFFFFF
    return value


class Model:
    """Runs rows against a KV cache of slots, each of which remembers what was written there last."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.slots: dict[int, tuple[str, int, int]] = {}

    def run(self, batch: list[tuple[Seq, int]]) -> list[int | None]:
        for seq, count in batch:
            for at in range(seq.cached, seq.cached + count):
                self.slots[self.blocks.slot(seq.blocks, at)] = (seq.request_id, at, seq.ids[at])
        # Every row is written before any is read, as in a real step.
        tokens: list[int | None] = []
        for seq, count in batch:
            end = seq.cached + count
            for at in range(end):
                assert self.slots[self.blocks.slot(seq.blocks, at)] == (seq.request_id, at, seq.ids[at])
            complete = end == len(seq.ids) and not seq.is_guide
            if complete and seq.guide:
                assert (seq.guide, seq.guide.remaining) in batch, "a sequence is sampled without its guide"
            tokens.append(next_token(seq.request_id, seq.ids) if complete else None)
        return tokens


def check_step(scheduler: Scheduler, batch: list[tuple[Seq, int]], decoding: set[str], live: list[Seq]) -> None:
    """What must hold after every `schedule`."""
    assert sum(count for _, count in batch) <= scheduler.max_num_batched_tokens
    assert len(batch) == len({seq.request_id for seq, _ in batch}) <= scheduler.max_num_seqs
    assert all(seq.status == "running" and 1 <= count <= seq.remaining for seq, count in batch)
    assert all(seq.guide.status == seq.status and seq.guide.output == seq.output for seq in live if seq.guide)
    # Decoding rows come first, and nothing is starved: the oldest request advances in every step.
    kinds = [seq.request_id in decoding for seq, _ in batch]
    assert kinds == sorted(kinds, reverse=True)
    assert any(each in [seq for seq, _ in batch] for each in live[0].members)
    assert [seq.request_id for seq in (*scheduler.running, *scheduler.waiting)] == [seq.request_id for seq in live]
    scheduler.check_integrity()


def run_trace(trace: Trace) -> Scheduler:
    """Serve the whole trace, checking every step; fails if anything leaks, stalls or is served out of order."""
    blocks = BlockManager(trace.num_blocks, trace.block_size)
    scheduler = Scheduler(trace.max_num_seqs, trace.budget, blocks, trace.max_model_len)
    model = Model(blocks)
    pending = sorted(enumerate(trace.arrivals), key=lambda each: each[1].step)
    arrivals: dict[str, Arrival] = {}
    live: list[Seq] = []
    started: list[str] = []
    step = 0
    while pending or scheduler.has_work:
        while pending and pending[0][1].step <= step:
            number, arrival = pending.pop(0)
            guide = Seq(f"{number}000", [7] * arrival.negative, SamplingParams()) if arrival.negative else None
            params = SamplingParams(max_tokens=arrival.max_tokens)
            seq = Seq(str(number), [number + 1] * arrival.prompt, params, guide=guide)
            scheduler.add(seq)
            arrivals[seq.request_id] = arrival
            live.append(seq)
        for seq in live[:]:
            leaves = arrivals[seq.request_id].abort
            if leaves is not None and step >= arrivals[seq.request_id].step + leaves:
                assert scheduler.abort(seq.request_id) is seq and not seq.blocks and seq.status == "finished"
                live.remove(seq)
        decoding = {each.request_id for seq in scheduler.running if seq.decoding for each in seq.members}
        batch = scheduler.schedule()
        assert bool(batch) == bool(live)
        if batch:
            check_step(scheduler, batch, decoding, live)
            ran = [seq.request_id.removesuffix("000") for seq, _ in batch]
            started += [name for name in dict.fromkeys(ran) if name not in started]
            scheduler.update(batch, model.run(batch))
        for seq in [seq for seq, _ in batch if not seq.is_guide]:
            back = arrivals[seq.request_id].rewind
            if back and back[0] == seq.num_output:
                arrivals[seq.request_id] = replace(arrivals[seq.request_id], rewind=None)
                scheduler.rewind(seq, back[1])
                scheduler.check_integrity()
            if seq.at_limit or seq.num_output == arrivals[seq.request_id].eos:
                assert len(seq.ids) <= min(seq.num_prompt + seq.params.max_tokens, trace.max_model_len)  # type: ignore[operator]
                expected = seq.prompt
                while len(expected) < len(seq.ids):
                    expected.append(next_token(seq.request_id, expected))
                assert seq.ids == expected
                scheduler.finish(seq)
                live.remove(seq)
        step += 1
        # The oldest advances by a token in every step and is never set back.
        work = sum(each.prompt + each.negative + 2 * each.max_tokens + 1 for each in trace.arrivals)
        assert step <= trace.arrivals[-1].step + work
    order = [name for name in arrivals if name in started]
    assert started == order, "a request started before an older one"
    blocks.check_integrity()
    assert blocks.num_free == trace.num_blocks and not scheduler.waiting and not scheduler.running
    return scheduler


def random_trace(rng: random.Random) -> Trace:
    block_size, num_blocks = rng.choice((1, 2, 3, 4, 16)), rng.randint(1, 12)
    max_model_len = rng.randint(2, 40)
    longest = min(max_model_len - 1, num_blocks * block_size)
    max_num_seqs = rng.randint(1, 6)
    paired = max_num_seqs > 1 and num_blocks > 1
    half = min(max_model_len - 1, num_blocks // 2 * block_size)

    def arrival() -> Arrival:
        negative = rng.randint(1, min(5, half)) if paired and rng.random() < 0.3 else 0
        most = half if negative else longest
        rewind = (rng.randint(1, 8), 0) if rng.random() < 0.3 else None
        return Arrival(
            step=rng.randint(0, 8),
            # Mostly short: many sequences at once and long outputs are what empties a pool.
            prompt=rng.randint(1, rng.choice((min(3, most), min(3, most), most))),
            max_tokens=rng.randint(1, 20),
            abort=rng.randint(0, 20) if rng.random() < 0.2 else None,
            eos=rng.randint(1, 20) if rng.random() < 0.3 else None,
            negative=negative,
            rewind=rewind and (rewind[0], rng.randint(0, rewind[0] - 1)),
        )

    arrivals = [arrival() for _ in range(rng.randint(1, 9))]
    budget = max_num_seqs + rng.choice((0, 1, 3, 30))
    arrivals.sort(key=lambda each: each.step)
    return Trace(num_blocks, block_size, max_num_seqs, budget, max_model_len, arrivals)


def test_three_thousand_random_traces() -> None:
    rng = random.Random(0)
    preemptions = [run_trace(random_trace(rng)).preemptions for _ in range(3000)]
    # The traces are worth something only if pools run dry often (in 719 of them here).
    assert sum(map(bool, preemptions)) > 600


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_traces_found_by_hypothesis(rng: random.Random) -> None:
    run_trace(random_trace(rng))


def make(
    num_blocks: int = 8, block_size: int = 2, max_num_seqs: int = 4, budget: int = 8, max_model_len: int = 64
) -> Scheduler:
    return Scheduler(max_num_seqs, budget, BlockManager(num_blocks, block_size), max_model_len)


def add(scheduler: Scheduler, name: str, prompt: int, max_tokens: int | None = 16) -> Seq:
    seq = Seq(name, list(range(prompt)), SamplingParams(max_tokens=max_tokens))
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """One step in which every complete row samples token 0 -> (request_id, number of tokens) as scheduled."""
    batch = scheduler.schedule()
    shown = [(seq.request_id, count) for seq, count in batch]
    scheduler.update(batch, [0 if count == seq.remaining and not seq.is_guide else None for seq, count in batch])
    return shown


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding() -> None:
    scheduler = make(num_blocks=32, budget=5)
    add(scheduler, "a", 3)
    assert step(scheduler) == [("a", 3)]
    add(scheduler, "b", 11)
    add(scheduler, "c", 2)
    assert step(scheduler) == [("a", 1), ("b", 4)]
    assert step(scheduler) == [("a", 1), ("b", 4)]
    # The last chunk leaves room for the next request.
    assert step(scheduler) == [("a", 1), ("b", 3), ("c", 1)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1)]


def test_the_youngest_is_preempted_and_recomputed_with_its_output() -> None:
    scheduler = make(num_blocks=4, budget=8)
    old, young = add(scheduler, "old", 2), add(scheduler, "young", 2)
    assert step(scheduler) == [("old", 2), ("young", 2)]
    assert step(scheduler) == [("old", 1), ("young", 1)]
    assert step(scheduler) == [("old", 1), ("young", 1)]
    # Both know 5 tokens and hold 2 blocks of 2: the pool of 4 is empty.
    assert scheduler.blocks.num_free == 0
    assert step(scheduler) == [("old", 1)]
    assert (young.status, young.cached, young.blocks, len(young.ids)) == ("waiting", 0, [], 5)
    assert scheduler.preemptions == 1
    scheduler.finish(old)
    # Prompt and output are computed again in one chunk, and the next token follows.
    assert step(scheduler) == [("young", 5)]
    assert young.num_output == 4


def test_admission_leaves_a_block_for_every_running_sequence() -> None:
    scheduler = make(num_blocks=4)
    add(scheduler, "a", 3)
    assert step(scheduler) == [("a", 3)]
    add(scheduler, "b", 3)
    # 2 blocks are free and b needs both, but a would take one of them back in the next step.
    assert step(scheduler) == [("a", 1)] and scheduler.blocks.num_free == 2
    assert [seq.request_id for seq in scheduler.waiting] == ["b"] and scheduler.preemptions == 0


def test_nothing_overtakes_a_request_that_does_not_fit() -> None:
    scheduler = make(num_blocks=4)
    first = add(scheduler, "first", 4)
    step(scheduler)
    add(scheduler, "large", 8)
    add(scheduler, "small", 1)
    assert step(scheduler) == [("first", 1)]
    scheduler.finish(first)
    assert step(scheduler) == [("large", 8)]


def test_abort_frees_the_blocks_at_once_wherever_the_request_is() -> None:
    scheduler = make(num_blocks=4, max_num_seqs=1)
    running, waiting = add(scheduler, "running", 4), add(scheduler, "waiting", 4)
    step(scheduler)
    batch = scheduler.schedule()
    assert scheduler.abort("waiting") is waiting and waiting.status == "finished"
    assert scheduler.abort("running") is running and scheduler.blocks.num_free == 4
    # A row whose request left during the step is skipped.
    scheduler.update(batch, [0])
    assert running.num_output == 1 and not scheduler.has_work
    assert scheduler.abort("running") is None and scheduler.abort("nobody") is None
    scheduler.finish(running)
    scheduler.check_integrity()


def test_limits() -> None:
    scheduler = make(num_blocks=4, block_size=2, max_model_len=20)
    assert add(scheduler, "by max_tokens", 3, 2).limit == 5
    # 8 slots, and the last sampled token needs none.
    assert add(scheduler, "by the pool", 3, None).limit == 9
    assert make(max_model_len=6).blocks.capacity == 16
    assert add(make(max_model_len=6), "by the context", 3, 100).limit == 6


def test_a_guide_runs_with_its_sequence_and_leaves_with_it() -> None:
    scheduler = make(num_blocks=20, budget=6)
    guide = Seq("g", [9] * 7, SamplingParams())
    seq = Seq("a", [1] * 3, SamplingParams(), guide=guide)
    scheduler.add(seq)
    add(scheduler, "b", 1)
    # Neither runs its last token before the other can.
    assert step(scheduler) == [("a", 2), ("g", 4)]
    assert step(scheduler) == [("a", 1), ("g", 3), ("b", 1)]
    assert seq.output == guide.output == [0]
    assert step(scheduler) == [("a", 1), ("g", 1), ("b", 1)]
    scheduler.rewind(seq, 0)
    assert (seq.cached, guide.cached, seq.output, guide.output) == (2, 6, [], [])
    assert (len(seq.blocks), len(guide.blocks)) == (2, 4)
    assert step(scheduler) == [("a", 1), ("g", 1), ("b", 1)]
    scheduler.finish(seq)
    assert guide.status == "finished" and guide.blocks == [] == seq.blocks
    scheduler.check_integrity()


def test_guides_that_can_never_run_are_refused() -> None:
    for scheduler, sizes, message in (
        (make(max_num_seqs=1), (3, 3), "guidance_scale runs two sequences: serve with --max-num-seqs 2 or more"),
        (make(max_model_len=8), (3, 8), "negative_prompt has 8 tokens and the context holds 8, completion included"),
        (make(), (8, 9), "the prompt has 8 tokens, negative_prompt 9, and the whole KV cache holds 16"),
    ):
        with pytest.raises(UserError) as error:
            scheduler.check(*sizes)
        assert str(error.value).startswith(message)
    make().check(8, 8)


def test_seeds_come_from_the_parameters_or_are_drawn() -> None:
    assert Seq("a", [1], SamplingParams(seed=7)).seed == 7
    assert len({Seq("a", [1], SamplingParams()).seed for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (0, "the prompt is empty: at least one token is needed"),
        (
            20,
            "the prompt has 20 tokens and the context holds 20, completion included: shorten the prompt to at most 19",
        ),
        (17, "the prompt has 17 tokens and the whole KV cache holds 16 (8 blocks of 2): shorten the prompt or give"),
    ],
)
def test_prompts_that_can_never_run_are_refused(prompt: int, message: str) -> None:
    scheduler = make(max_model_len=20)
    with pytest.raises(UserError) as error:
        add(scheduler, "a", prompt)
    assert str(error.value).startswith(message)
    assert not scheduler.has_work
    add(scheduler, "longest", 16)
    assert step(scheduler) == [("longest", 8)]


def test_a_request_id_in_use_is_refused() -> None:
    scheduler = make()
    first = add(scheduler, "a", 1)
    with pytest.raises(UserError, match="request_id 'a' is already in use: give each request its own"):
        add(scheduler, "a", 1)
    scheduler.finish(first)
    add(scheduler, "a", 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 8, 64), "max_num_seqs is 0: at least 1 sequence must run"),
        ((9, 8, 64), "max_num_batched_tokens is 8, below max_num_seqs (9): a step holds one token of every running"),
        ((1, 8, 1), "max_model_len is 1: a prompt token and a sampled one need at least 2"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    max_num_seqs, budget, max_model_len = sizes
    with pytest.raises(UserError) as error:
        make(max_num_seqs=max_num_seqs, budget=budget, max_model_len=max_model_len)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "message"),
    [
        (0, 16, "num_blocks is 0: the KV cache needs at least 1; give the KV cache more memory"),
        (4, 0, "block_size is 0: the KV cache needs at least 1; 16 is the usual value"),
    ],
)
def test_pools_that_cannot_work_are_refused(num_blocks: int, block_size: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        BlockManager(num_blocks, block_size)
    assert str(error.value) == message


def test_grow_takes_all_it_needs_or_nothing() -> None:
    blocks = BlockManager(4, 3)
    table: list[int] = []
    assert blocks.grow(table, 7) and len(table) == 3 and blocks.num_free == 1
    assert blocks.grow(table, 9) and len(table) == 3
    assert not blocks.grow(table, 13) and len(table) == 3 and blocks.num_free == 1
    assert [blocks.slot(table, at) for at in (0, 2, 3, 8)] == [
        table[0] * 3,
        table[0] * 3 + 2,
        table[1] * 3,
        table[2] * 3 + 2,
    ]


def test_a_shared_block_lives_as_long_as_any_table() -> None:
    blocks = BlockManager(4, 2)
    first: list[int] = []
    second: list[int] = []
    blocks.grow(first, 6)
    blocks.share(second, first[:2])
    blocks.grow(second, 6)
    assert second[:2] == first[:2] and blocks.num_free == 0
    blocks.check_integrity([first, second])
    blocks.free(first)
    assert blocks.num_free == 1 and first == []
    blocks.check_integrity([second])
    blocks.free(second)
    assert blocks.num_free == 4
    with pytest.raises(AssertionError, match="is free and cannot be shared"):
        blocks.share(second, [0])


def test_check_integrity_sees_leaks_and_double_owners() -> None:
    blocks = BlockManager(4, 2)
    table: list[int] = []
    blocks.grow(table, 4)
    blocks.check_integrity([table])
    with pytest.raises(AssertionError, match="block 0: 1 references counted, 0 tables hold it"):
        blocks.check_integrity()
    with pytest.raises(AssertionError, match="block 0: 1 references counted, 2 tables hold it"):
        blocks.check_integrity([table, table])
    with pytest.raises(AssertionError, match="is freed twice"):
        blocks.free([3])


def test_no_torch() -> None:
    code = "import sys, bitsmith.serve.scheduler, bitsmith.serve.blocks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
