"""Microseconds of one quantized product beside the unquantized one and whatever peers are installed, on random weights.

Per weight spec, shape (outputs x inputs) and rows M: the time, the bytes a second that follow from the weights as held
(plus x and y), the multiply-adds a second, and both as a share of what this machine was measured to do in the same run:
copying (bytes read plus written) and F.linear on a large square. Everything runs in one process. Contenders are
interleaved, one call each a round, so that drift of the machine hits all alike; the figure is the median. Before each
call a buffer larger than any cache is written, since in a model every weight comes from memory. On a GPU a call is
captured in a CUDA graph where that works, so it is the kernels that are timed and not Python. On the CPU ours and
torch's are recorded (kernels/recording.py), as a decode step is and as llama.cpp's graph is built: where Python
dispatches one, whose code has left the caches with all else, a product takes 0.27 ms more.

A peer is listed where it can take a weight of the same kind (kernel_peers.py): torch's int4 operator (tinygemm; both
devices), gemlite and torchao for 4-bit groups, bitsandbytes for NF4, llama.cpp for GGUF's types on the CPU. One that is
not installed is absent; one that fails says so and is left out.

Slow cases are cut short: a product whose first call takes over a fifth of a second is timed for one second in all or
once, and F.linear or a peer of which 64 rows or more say that it would take over a second is left out, and said.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from ..kernels import bits
from ..kernels.codebook import FIXED
from ..kernels.dispatch import prepare
from ..kernels.families import family, one_level_parts, scale_dtype, scale_shape
from ..kernels.qtensor import QTensor, matrix_shape
from ..kernels.recording import Unrecordable, record
from ..kernels.spec import Spec
from ..quant_formats import gguf_blocks
from .kernel_peers import PEERS, Product

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
SMALL = ((256, 512),)
ROWS = (1, 2, 4, 8, 16, 64, 256, 2048)
# As GPTQ, AWQ and HQQ files hold them, W8A8, FP8, NF4, AQLM 2x8, EXL3, then what GGUF calls by these names.
SPECS = (
    "affine2.g64.asym", "affine3.g128.asym", "affine4.g128.asym", "affine8.g128.asym", "affine8.channel.sym.a8",
    "minifloat8.e4m3.g128x128.f32", "codebook4.nf4.g64.f32", "codebook8.v8.x2.channel",
    "trellis3.mcg.inscale.had128.outhad128.outscale",
    *(str(gguf_blocks.spec(name)) for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XS", "NVFP4")),
)  # fmt: skip
OURS, DENSE = "bitsmith", "linear"
_SAMPLES = 7
# Larger than the caches of any machine met so far.
_FLUSH = 256 << 20
# Seconds of a call: of what needs no warm-up, and of what is called once, or not at all if it is not ours.
_SLOW, _TOO_SLOW = 0.2, 1.0
# Rows from which on a product takes as many times longer as it has more of them.
_BUSY = 64


@dataclass(frozen=True)
class Ceiling:
    """What the machine was measured to do: bytes a second of a copy, floating-point operations a second of F.linear."""

    copy: float
    matmul: float


class Measured(Protocol):
    """What rows and details say of anything that was timed."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str:
        """What tells it from the others of one row of results."""
        ...

    @property
    def work(self) -> int:
        """Floating-point operations: two a multiply-add."""
        ...

    def moved(self, nbytes: int) -> int:
        """Bytes read and written by a contender that holds `nbytes`."""
        ...


@dataclass(frozen=True)
class Case:
    """One product: a weight spec, (outputs, inputs) and rows of x."""

    spec: str
    shape: tuple[int, int]
    rows: int

    @property
    def name(self) -> str:
        return f"{self.spec} {self.shape[0]}x{self.shape[1]} m{self.rows}"

    @property
    def label(self) -> str:
        return str(self.rows)

    @property
    def work(self) -> int:
        return 2 * self.rows * self.shape[0] * self.shape[1]

    def moved(self, nbytes: int) -> int:
        return nbytes + 2 * self.rows * sum(self.shape)


@dataclass(frozen=True)
class Timing:
    """Of one contender: seconds of every call, bytes of the weights (the cache) it reads, and the path it took."""

    seconds: list[float]
    nbytes: int
    path: str

    @property
    def value(self) -> float:
        """Median microseconds."""
        return 1e6 * statistics.median(self.seconds)

    @property
    def stderr(self) -> float:
        """Standard error of the mean, microseconds."""
        return 1e6 * statistics.stdev(self.seconds) / len(self.seconds) ** 0.5


Table = dict[Case, dict[str, Timing]]


class Clock:
    """Times calls on one device, caches emptied before each."""

    def __init__(self, device: torch.device, flush: int = _FLUSH) -> None:
        self.device = device
        buffer = torch.zeros(flush, dtype=torch.uint8, device=device)
        self._buffer: Any = buffer if device.type == "cuda" else buffer.numpy()

    def seconds(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            # By one thread: OpenMP's others would watch for work for milliseconds, on cores that the call needs
            # (ours took 3.0 ms instead of 2.0 on two of them).
            numpy.add(self._buffer, 1, out=self._buffer)
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._buffer.add_(1)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize(self.device)
        return float(events[0].elapsed_time(events[1])) / 1000

    def ready(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, on a GPU after its warm-up and as a CUDA graph where it can be captured."""
        if self.device.type != "cuda":
            return run
        for _ in range(2):
            run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return run
        return graph.replay


def half_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float16 on a GPU that has none."""
    old = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def ceiling(clock: Clock, size: int) -> Ceiling:
    """Measured: a copy of `size`**2 * 32 bytes, and F.linear of `size` x `size` on as many rows. Best of five."""
    x = torch.zeros(16 * size * size, dtype=torch.uint8, device=clock.device)
    y = torch.empty_like(x)
    copy = min(clock.seconds(lambda: y.copy_(x)) for _ in range(5))
    dtype = half_dtype(clock.device)
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    product = min(clock.seconds(lambda: torch.nn.functional.linear(a, b)) for _ in range(5))
    return Ceiling(2 * x.nbytes / copy, 2 * size**3 / product)


def random_weight(spec: Spec, shape: tuple[int, int], device: torch.device) -> QTensor:
    """Random codes, and scales that keep products small: what a kernel reads, not what a quantizer would write. `shape`
    must be whole groups, vectors and tiles."""
    matrix, kind = matrix_shape(spec, shape), family(spec)

    def words(*size: int) -> Tensor:
        drawn = torch.randint(-(1 << 31), (1 << 31) - 1, size, dtype=torch.int32, device=device)
        # No exponent of all ones: NaN in E4M3, infinity in E5M2.
        return drawn & 0x3F3F3F3F if spec.family == "minifloat" else drawn

    if kind.code_tile is not None:
        tile_rows, tile_inputs = kind.code_tile
        counts = (shape[0] // tile_rows, shape[1] // tile_inputs, tile_rows * tile_inputs // 32 * spec.bits)
        parts = {"codes": words(*counts)}
        for name, step, count in (("in_scale", "inscale", shape[1]), ("out_scale", "outscale", shape[0])):
            if step in spec.pre + spec.post:
                parts[name] = torch.rand(count, device=device) + 0.5
        return QTensor(spec, shape, parts)
    parts = {"codes": words(matrix[0], -(-(matrix[1] // spec.vec) * spec.width // 32))}
    grid = scale_shape(spec, matrix)
    for name in ("scales", "mins") if spec.zero == "min" else ("scales",):
        drawn = torch.rand(grid, device=device) / 64 + 1e-3
        if spec.two_level is None:
            parts[name] = one_level_parts(spec, drawn)
            continue
        width, (dtype, per) = spec.scale_code[0], spec.two_level
        codes = words(grid[0], bits.words(grid[1], width))
        parts[name] = codes.view(torch.uint8)[:, : grid[1]].contiguous() if width == 8 else codes
        parts[f"super_{name}"] = (drawn.flatten()[: -(-drawn.numel() // per)] / (1 << width)).to(scale_dtype(dtype))
    if spec.zero == "asym":
        parts["zeros"] = torch.randint(0, 1 << spec.bits, grid, dtype=torch.uint8, device=device)
    if spec.family == "codebook" and spec.table not in FIXED:
        if spec.two_level:
            parts |= {"scale_table": torch.rand(256, device=device), "scale_offset": torch.zeros((), device=device)}
        size = (1 << spec.bits,) if spec.vec == 1 else (spec.books, 1 << spec.bits, spec.vec)
        parts["table"] = torch.randn(size, device=device)
    return QTensor(spec, shape, parts)


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` of torch's operators or ours on a CPU, recorded where that works, as in serve/recorded.py."""
    with torch.inference_mode():
        try:
            return torch.inference_mode()(record(call))
        except Unrecordable:
            return torch.inference_mode()(call)


def _recorded(product: Product) -> Product:
    return replace(product, run=lambda call: call(), bind=lambda x: recorded(product.call(x)))


def contenders(
    spec: Spec, shape: tuple[int, int], device: torch.device, wanted: Sequence[str], told: Callable[[str], None]
) -> dict[str, Product]:
    """Ours, F.linear, and the peers of `wanted` that are installed and take such a weight."""
    dtype = half_dtype(device)
    q = random_weight(spec, shape, device)
    ours = prepare(q, dtype)
    # What its values are matters to no clock.
    dense = torch.randn(1, shape[1], device=device).to(dtype).repeat(shape[0], 1)
    found = {
        OURS: Product(ours, ours.nbytes, ours.name),
        DENSE: Product(lambda x: torch.nn.functional.linear(x, dense), dense.nbytes, str(dtype).removeprefix("torch.")),
    }
    for name in wanted:
        try:
            found |= PEERS[name](q, dtype)
        except ImportError:
            continue
        except RuntimeError as error:
            told(f"{name} is left out of {spec} {shape[0]}x{shape[1]}: {error}")
    if device.type != "cpu":
        return found
    return {name: product if product.bind else _recorded(product) for name, product in found.items()}


def measure(
    cases: Sequence[Case],
    clock: Clock,
    wanted: Sequence[str] = tuple(PEERS),
    samples: int = _SAMPLES,
    told: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Case, dict[str, Timing]]]:
    """Every case on every contender, as each is done. Weights are made once for neighbouring cases that share them."""
    held: tuple[tuple[str, tuple[int, int]], dict[str, Product]] | None = None
    # Seconds a row, by contender.
    pace: dict[str, float] = {}
    for case in cases:
        if held is None or held[0] != (case.spec, case.shape):
            # The old ones go before the new ones come.
            held, pace = None, {}
            products = contenders(Spec.parse(case.spec), case.shape, clock.device, wanted, told)
            held = ((case.spec, case.shape), products)
        quick = {}
        for name, product in held[1].items():
            seconds = pace.get(name, 0.0) * case.rows
            if name == OURS or seconds <= _TOO_SLOW:
                quick[name] = product
            else:
                told(f"{name} is left out of {case.name}: it would take {seconds:.1f} s")
        timings = _interleaved(case, quick, clock, samples, told)
        if case.rows >= _BUSY:
            pace |= {name: timing.value / 1e6 / case.rows for name, timing in timings.items()}
        yield case, timings


def _interleaved(
    case: Case, products: Mapping[str, Product], clock: Clock, samples: int, told: Callable[[str], None]
) -> dict[str, Timing]:
    """Timings by contender."""
    x = torch.randn(case.rows, case.shape[1], device=clock.device).to(half_dtype(clock.device))
    seconds = interleaved(case.name, {n: partial(p.call, x) for n, p in products.items()}, clock, samples, told)
    return {name: Timing(taken, products[name].nbytes, products[name].path) for name, taken in seconds.items()}


def interleaved(
    what: str,
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    clock: Clock,
    samples: int,
    told: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of the calls of what each maker makes; the first call warms up, or counts if it is slow. One other than
    ours that cannot run is told and left out."""
    runs: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for name, make in makers.items():
        try:
            run = clock.ready(make())
            first = clock.seconds(run)
        except RuntimeError as error:
            if name == OURS:
                raise
            told(f"{name} is left out of {what}: {error}")
            continue
        slow, runs[name] = first > _SLOW, run
        seconds[name] = [first] if slow else []
        calls[name] = max(1, min(samples, int(_TOO_SLOW / first))) if slow else samples
    for _ in range(samples):
        for name, run in runs.items():
            if len(seconds[name]) < calls[name]:
                seconds[name].append(clock.seconds(run))
    return seconds


def rows(case: Measured, timings: Mapping[str, Timing], most: Ceiling) -> list[dict[str, Any]]:
    """One row per contender other than ours, or one without: `ratio` is its time over ours, so above 1 ours is faster.

    Keys: name, value (microseconds of ours), unit, path, gb_s, tflop_s, of_copy, of_matmul (shares of the machine's),
    ratio, against, against_value.
    """
    ours = timings[OURS]
    row = {"name": case.name, "value": ours.value, "unit": "us", "path": ours.path, **_rates(case, ours, most)}
    return [
        row | {"ratio": timing.value / ours.value, "against": name, "against_value": timing.value}
        for name, timing in timings.items()
        if name != OURS
    ] or [row | {"ratio": None, "against": None, "against_value": None}]


def _rates(case: Measured, timing: Timing, most: Ceiling) -> dict[str, float]:
    each = timing.value / 1e6
    rate, work = case.moved(timing.nbytes) / each, case.work / each
    return {"gb_s": rate / 1e9, "tflop_s": work / 1e12, "of_copy": rate / most.copy, "of_matmul": work / most.matmul}


def detail(table: Mapping[Any, Mapping[str, Timing]], most: Ceiling) -> dict[str, Any]:
    """All that was measured of one weight and shape (one cache and heads), as its row of results keeps it, in four
    digits:

    copy_gb_s, matmul_tflop_s of the machine, and under `rows`, by the label of the case (rows of x): us, gb_s,
    tflop_s, of_copy, of_matmul, path and n (calls) of ours, and `against`: microseconds of the others.
    """
    found: dict[str, Any] = {}
    for case, timings in table.items():
        ours = timings[OURS]
        numbers = {"us": ours.value, **_rates(case, ours, most)}
        found[case.label] = {
            **{name: _short(number) for name, number in numbers.items()},
            "path": ours.path,
            "n": len(ours.seconds),
            "against": {name: _short(timing.value) for name, timing in timings.items() if name != OURS},
        }
    return {"copy_gb_s": _short(most.copy / 1e9), "matmul_tflop_s": _short(most.matmul / 1e12), "rows": found}


def _short(number: float) -> float:
    return float(f"{number:.4g}")
