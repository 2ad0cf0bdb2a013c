"""What the engine counts about itself, for /metrics.

`Stats.snapshot` returns plain numbers: counters `prompt_tokens`, `generation_tokens`, `finished` (by reason) and two
histograms, `time_to_first_token_seconds` (from arrival, queueing included) and `inter_token_seconds` (between two
tokens of one request). A histogram is `{"buckets": [(upper bound, cumulative count), ...], "sum": seconds, "count":
n}`; the +Inf bucket is `count`.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

_TTFT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """Counts of observed seconds per bucket, Prometheus style."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def snapshot(self) -> dict[str, Any]:
        """See the module docstring."""
        buckets, cumulative = [], 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            cumulative += count
            buckets.append((bound, cumulative))
        return {"buckets": buckets, "sum": self.total, "count": cumulative + self.counts[-1]}


@dataclass
class Stats:
    """Counted by the engine; read by anyone."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "repetition": 0, "abort": 0})
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_TTFT_BOUNDS))
    inter_token: Histogram = field(default_factory=lambda: Histogram(_INTER_TOKEN_BOUNDS))

    def snapshot(self) -> dict[str, Any]:
        """See the module docstring."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "finished": dict(self.finished),
            "time_to_first_token_seconds": self.time_to_first_token.snapshot(),
            "inter_token_seconds": self.inter_token.snapshot(),
        }
