"""Size targets: against brute force, on sizes of real models, and what is refused."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from bitsmith.calibrate.allocate import (
    Allocation,
    Choice,
    Measured,
    Table,
    allocate,
    check_target,
    hull,
    largest,
    parse_bpw,
    parse_size,
)
from bitsmith.errors import UserError
from bitsmith.quant_formats.gguf_mixture import tensor_bytes

FIXED = 100


def small(seed: int) -> Table:
    """Four tensors of four types, loss falling about fourfold a bit, with noise that makes some types useless."""
    r = random.Random(seed)
    return {
        f"t{t}": {
            f"q{bits}": Choice(bits * size + r.randrange(3), scale * 4.0**-bits * r.uniform(0.3, 3))
            for bits in (2, 3, 4, 6)
        }
        for t, (size, scale) in enumerate((r.randrange(5, 60), r.uniform(1, 100)) for _ in range(4))
    }


def totals(table: Table, kinds: tuple[str, ...]) -> tuple[int, float]:
    chosen = [table[t][k] for t, k in zip(table, kinds, strict=True)]
    return FIXED + sum(c.bytes for c in chosen), sum(c.loss for c in chosen)


@pytest.mark.parametrize("seed", range(40))
def test_no_worse_than_the_optimum_by_more_than_one_step(seed: int) -> None:
    table = small(seed)
    everything = [totals(table, kinds) for kinds in itertools.product(*table.values())]
    least, most = min(s for s, _ in everything), largest(table, FIXED)
    step = max(
        choices[a].loss - choices[b].loss for choices in table.values() for a, b in itertools.pairwise(hull(choices))
    )
    exact = 0
    for target in range(least, most + 1, 7):
        found = allocate(table, target, FIXED)
        assert totals(table, tuple(found.types[t] for t in table)) == (found.bytes, pytest.approx(found.loss))
        assert found.bytes <= target
        best = min(loss for size, loss in everything if size <= target)
        assert best <= found.loss * (1 + 1e-9) and found.loss <= best + step
        exact += found.loss <= best * (1 + 1e-9)
        # Nothing that would help fits any more.
        for tensor, kind in found.types.items():
            for other in table[tensor].values():
                grown = found.bytes - table[tensor][kind].bytes + other.bytes
                assert (
                    other.loss >= table[tensor][kind].loss or grown > target or other.bytes <= table[tensor][kind].bytes
                )
    assert exact > 0
    assert allocate(table, most, FIXED).loss == pytest.approx(min(loss for _, loss in everything))


def test_at_the_sizes_of_the_hull_it_is_the_optimum() -> None:
    """Every state of the walk is exact: sizes at which the relaxation needs no fraction."""
    table = small(7)
    everything = [totals(table, kinds) for kinds in itertools.product(*table.values())]
    state: dict[str, int] = dict.fromkeys(table, 0)
    hulls = {t: hull(c) for t, c in table.items()}
    while True:
        kinds = tuple(hulls[t][state[t]] for t in table)
        size, loss = totals(table, kinds)
        assert loss == pytest.approx(min(other for s, other in everything if s <= size))
        assert allocate(table, size, FIXED).loss == pytest.approx(loss)
        open_ = [t for t in table if state[t] + 1 < len(hulls[t])]
        if not open_:
            return

        def gain(t: str) -> float:
            a, b = (table[t][hulls[t][state[t] + i]] for i in (0, 1))
            return (b.loss - a.loss) / (b.bytes - a.bytes)

        state[min(open_, key=gain)] += 1


KINDS = {"IQ2_XS": 0.32, "Q3_K": 0.15, "IQ4_XS": 0.077, "Q5_K": 0.036, "Q6_K": 0.018, "Q8_0": 0.0054}


def eight_billion() -> tuple[Table, int, int]:
    """Llama-3-8B's weights, their bytes, and how many there are, with the relative errors of gguf types."""
    rows = {"attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096), "attn_output": (4096, 4096)}
    rows |= {"ffn_gate": (14336, 4096), "ffn_up": (14336, 4096), "ffn_down": (4096, 14336)}
    r = random.Random(0)
    table = {
        f"blk.{layer}.{name}.weight": {
            kind: Choice(tensor_bytes(kind, shape), error**2 * shape[0] * shape[1] * scale)
            for kind, error in KINDS.items()
        }
        for layer in range(32)
        for name, shape in rows.items()
        for scale in [r.lognormvariate(0, 1)]
    }
    weights = 32 * sum(a * b for a, b in rows.values())
    return table, tensor_bytes("Q6_K", (128256, 4096)) * 2, weights + 2 * 128256 * 4096


@pytest.mark.parametrize("bpw", ["2.9", "4.25", "5", "7.5"])
def test_a_real_model_lands_just_below_its_target(bpw: str) -> None:
    table, fixed, weights = eight_billion()
    target = parse_bpw(bpw, weights)
    found = allocate(table, target, fixed)
    assert 0 <= target - found.bytes < 1 << 20, (target - found.bytes) / 1e6
    # One type for all tensors is in the candidates: mixing must not lose to the largest that fits.
    uniform = {kind: fixed + sum(c[kind].bytes for c in table.values()) for kind in KINDS}
    fitting = [kind for kind, size in uniform.items() if size <= target]
    assert found.loss < min(sum(c[kind].loss for c in table.values()) for kind in fitting)


def test_the_order_of_the_tensors_decides_nothing() -> None:
    table = small(3) | {f"same{i}": {"a": Choice(10, 5.0), "b": Choice(20, 1.0)} for i in range(5)}
    target = largest(table) - 35
    reordered = {t: dict(reversed(table[t].items())) for t in reversed(table)}
    assert allocate(table, target).types == allocate(reordered, target).types


def test_useless_types_are_never_taken() -> None:
    choices = {"small": Choice(10, 4.0), "bad": Choice(12, 5.0), "off": Choice(19, 3.9), "big": Choice(20, 1.0), "same": Choice(20, 2.0)}  # fmt: skip
    assert hull(choices) == ["small", "big"]
    assert allocate({"t": choices}, 18) == Allocation({"t": "small"}, 10, 4.0)
    assert allocate({"t": choices}, 19) == Allocation({"t": "off"}, 19, 3.9)
    assert allocate({"t": choices}, 1000) == Allocation({"t": "big"}, 20, 1.0)


def test_targets_out_of_reach_are_refused() -> None:
    table = {"a": {"x": Choice(10, 1.0), "y": Choice(30, 0.1)}, "b": {"x": Choice(5, 1.0)}}
    with pytest.raises(UserError, match=r"14 bytes is below the smallest file possible, 22 bytes \(7 of them"):
        allocate(table, 14, 7)
    with pytest.raises(UserError, match="t: its loss as q is nan"):
        allocate({"t": {"q": Choice(1, float("nan"))}}, 5)
    check_target(table, 42, 7)
    with pytest.raises(UserError, match="43 bytes is above the largest file that the candidate types give, 42 bytes"):
        check_target(table, 43, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GiB", 5 << 30), ("4.7GB", 4_700_000_000), ("600M", 600 << 20), ("600 mib", 600 << 20), ("123", 123), ("1KB", 1000)],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "call",
    [*(lambda t=t: parse_size(t) for t in ("", "GiB", "5XB", "-1GB", "0", "5 G i B", "1e3", "9" * 400)),
     *(lambda t=t: parse_bpw(t, 8) for t in ("", "four", "0.2", "33", "nan", "-4"))],
)  # fmt: skip
def test_bad_targets_are_named(call: Callable[[], int]) -> None:
    with pytest.raises(UserError, match=r"--target-(size|bpw) .*expected"):
        call()


def test_bits_per_weight() -> None:
    assert parse_bpw("4.25", 8_000_000_000) == 4_250_000_000


def test_measurements_survive_a_restart(tmp_path: Path) -> None:
    file, plan = tmp_path / "m.json", {"source": "x", "types": ("Q4_K", "Q6_K")}
    table = small(1)
    first = Measured(file, plan)
    for tensor in ("t0", "t2"):
        first.put(tensor, table[tensor])
    second = Measured(file, plan)
    assert second.table == {t: table[t] for t in ("t0", "t2")}
    for tensor in table.keys() - second.table.keys():
        second.put(tensor, table[tensor])
    assert allocate(Measured(file, plan).table, 400) == allocate(table, 400)
    assert Measured(file, {**plan, "source": "y"}).table == {}
    file.write_text('{"plan": {}, "tensors": {"t": {"q": 3}}}')
    with pytest.raises(UserError, match=r"m\.json: t is .*expected type: \[bytes, loss\]"):
        Measured(file, {})
