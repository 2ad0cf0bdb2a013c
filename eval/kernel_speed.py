"""Microseconds of one quantized product beside the unquantized one and whatever peers are installed, on random weights.

Per weight spec, shape (outputs x inputs) and rows M: the time, the bytes a second that follow from the weights as held
(plus x and y), the multiply-adds a second, and both as a share of what this machine was measured to do in the same run:
copying (bytes read plus written) and F.linear on a large square. Everything runs in one process. Contenders are
interleaved, one call each a round, so that drift of the machine hits all alike; the figure is the median. Before each
call a buffer larger than any cache is written, since in a model every weight comes from memory. On a GPU a call is
captured in a CUDA graph where that works, so it is the kernels that are timed and not Python.

A peer is listed where it can take a weight of the same kind: torch's int4 operator (tinygemm; both devices), gemlite
and torchao for 4-bit groups, bitsandbytes for NF4. One that is not installed is absent; one that fails says so and is
left out. llama.cpp is compared in `bench decode`: its products cannot be called alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import bits
from ..kernels.codebook import FIXED
from ..kernels.dispatch import prepare
from ..kernels.families import family, one_level_parts, scale_dtype, scale_shape
from ..kernels.qtensor import QTensor, matrix_shape
from ..kernels.spec import Spec
from .kernel_peers import PEERS, Product

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
SMALL = ((256, 512),)
ROWS = (1, 2, 4, 8, 16, 64, 256, 2048)
SPECS = (
    "affine2.g64.asym", "affine3.g128.asym", "affine4.g128.asym", "affine8.channel.sym", "affine8.channel.sym.a8",
    "minifloat8.e4m3.channel.f32", "minifloat8.e4m3.g128x128.f32", "codebook4.nf4.g64.f32",
    "codebook16.v8.channel", "trellis4.mcg", "affine4.g32.min.u6:f16:8", "affine6.g16.sym.s8:f16:16",
    "codebook26.iq3s.v8.g32.u4:f16:8", "minifloat4.e2m1.g16.ue4m3",
)  # fmt: skip
OURS, DENSE = "bitsmith", "linear"
_SAMPLES = 7
# Larger than the caches of any machine met so far.
_FLUSH = 256 << 20


@dataclass(frozen=True)
class Ceiling:
    """What the machine was measured to do: bytes a second of a copy, floating-point operations a second of F.linear."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Case:
    """One product: a weight spec, (outputs, inputs) and rows of x."""

    spec: str
    shape: tuple[int, int]
    rows: int

    @property
    def name(self) -> str:
        return f"{self.spec} {self.shape[0]}x{self.shape[1]} m{self.rows}"


@dataclass(frozen=True)
class Timing:
    """Of one contender: seconds of every call, bytes of the weights it holds, and which of its paths it took."""

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
        self._buffer = torch.zeros(flush, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        self._buffer.add_(1)
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize(self.device)
        return float(events[0].elapsed_time(events[1])) / 1000

    def ready(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` after its warm-up, as a CUDA graph where it can be captured."""
        for _ in range(2):
            run()
        if self.device.type != "cuda":
            return run
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
        rows, inputs = kind.code_tile
        return QTensor(
            spec, shape, {"codes": words(shape[0] // rows, shape[1] // inputs, rows * inputs // 32 * spec.bits)}
        )
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


def contenders(
    spec: Spec, shape: tuple[int, int], device: torch.device, wanted: Sequence[str], told: Callable[[str], None]
) -> dict[str, Product]:
    """Ours, F.linear, and the peers of `wanted` that are installed and take such a weight."""
    dtype = half_dtype(device)
    ours = prepare(random_weight(spec, shape, device), dtype)
    dense = torch.randn(shape, device=device).to(dtype)
    found = {
        OURS: Product(ours, ours.nbytes, ours.name),
        DENSE: Product(lambda x: torch.nn.functional.linear(x, dense), dense.nbytes, str(dtype).removeprefix("torch.")),
    }
    for name in wanted:
        try:
            if (product := PEERS[name](spec, shape, device, dtype)) is not None:
                found[name] = product
        except ImportError:
            continue
        except RuntimeError as error:
            told(f"{name} is left out of {spec} {shape[0]}x{shape[1]}: {error}")
    return found


def measure(
    cases: Sequence[Case],
    clock: Clock,
    wanted: Sequence[str] = tuple(PEERS),
    samples: int = _SAMPLES,
    told: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Case, dict[str, Timing]]]:
    """Every case on every contender, as each is done. Weights are made once for neighbouring cases that share them."""
    held: tuple[tuple[str, tuple[int, int]], dict[str, Product]] | None = None
    for case in cases:
        if held is None or held[0] != (case.spec, case.shape):
            # The old ones go before the new ones come.
            held = None
            products = contenders(Spec.parse(case.spec), case.shape, clock.device, wanted, told)
            held = ((case.spec, case.shape), products)
        yield case, _interleaved(case, held[1], clock, samples, told)


def _interleaved(
    case: Case, products: Mapping[str, Product], clock: Clock, samples: int, told: Callable[[str], None]
) -> dict[str, Timing]:
    x = torch.randn(case.rows, case.shape[1], device=clock.device).to(half_dtype(clock.device))
    runs: dict[str, Callable[[], Any]] = {}
    for name, product in products.items():

        def call(product: Product = product) -> Any:
            return product.run(x)

        try:
            runs[name] = clock.ready(call)
        except RuntimeError as error:
            if name == OURS:
                raise
            told(f"{name} is left out of {case.name}: {error}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            seconds[name].append(clock.seconds(run))
    return {name: Timing(seconds[name], products[name].nbytes, products[name].path) for name in runs}


def rows(case: Case, timings: Mapping[str, Timing], most: Ceiling) -> list[dict[str, Any]]:
    """One row per contender other than ours: `ratio` is its time over ours, so above 1 ours is faster.

    Keys: name, value (microseconds of ours), unit, path, gb_s, tflop_s, of_copy, of_matmul (shares of the machine's),
    ratio, against, against_value.
    """
    ours = timings[OURS]
    (n, k), m = case.shape, case.rows
    each = ours.value / 1e6
    rate = (ours.nbytes + 2 * m * (n + k)) / each
    work = 2 * m * n * k / each
    row = {
        "name": case.name, "value": ours.value, "unit": "us", "path": ours.path,
        "gb_s": rate / 1e9, "tflop_s": work / 1e12, "of_copy": rate / most.copy, "of_matmul": work / most.matmul,
    }  # fmt: skip
    return [
        row | {"ratio": timing.value / ours.value, "against": name, "against_value": timing.value}
        for name, timing in timings.items()
        if name != OURS
    ]
