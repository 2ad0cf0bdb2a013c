"""Engine statistics as Prometheus text, under vLLM's metric names with our prefix.

A dashboard made for vLLM needs one search-and-replace. The format (lines of `name{labels} value`) is written out here
rather than through the Prometheus client: the engine already counts.
"""

from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# (metric, engine statistic, help)
GAUGES = (
    ("num_requests_running", "running", "Requests in the running batch."),
    ("num_requests_waiting", "waiting", "Requests waiting for a place in the batch."),
    ("kv_cache_usage_perc", "kv_usage", "Share of the KV-cache blocks in use, 0 to 1."),
    ("kv_cache_blocks", "blocks_total", "KV-cache blocks."),
    ("kv_cache_free_blocks", "blocks_free", "KV-cache blocks that no request holds."),
)
COUNTERS = (
    ("prompt_tokens_total", "prompt_tokens", "Prompt tokens processed."),
    ("generation_tokens_total", "generation_tokens", "Tokens generated."),
    ("num_preemptions_total", "preemptions", "Times a request gave up its blocks to another and was queued again."),
)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "time_to_first_token_seconds", "From arrival to the first token."),
    ("inter_token_latency_seconds", "inter_token_seconds", "From one token of a request to its next."),
)


def _labels(**labels: str) -> str:
    escaped = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in labels.values())
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(labels, escaped, strict=True)) + "}"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def prometheus(stats: dict[str, Any], model: str) -> str:
    """The body of /metrics for `AsyncEngine.stats()`; every sample carries the label model_name."""
    lines: list[str] = []
    label = _labels(model_name=model)
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS)):
        for metric, key, text in table:
            name = f"bitsmith:{metric}"
            lines += [*_head(name, kind, text), f"{name}{label} {stats[key]}"]
    name = "bitsmith:request_success_total"
    lines += _head(name, "counter", "Requests ended, by reason.")
    lines += [
        f"{name}{_labels(model_name=model, finished_reason=why)} {n}" for why, n in sorted(stats["finished"].items())
    ]
    for metric, key, text in HISTOGRAMS:
        name, histogram = f"bitsmith:{metric}", stats[key]
        lines += _head(name, "histogram", text)
        for bound, count in histogram["buckets"]:
            lines.append(f"{name}_bucket{_labels(model_name=model, le=str(bound))} {count}")
        lines.append(f"{name}_bucket{_labels(model_name=model, le='+Inf')} {histogram['count']}")
        lines += [f"{name}_sum{label} {histogram['sum']}", f"{name}_count{label} {histogram['count']}"]
    return "\n".join(lines) + "\n"
