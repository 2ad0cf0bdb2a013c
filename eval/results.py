"""Measured rows: one `Result` is one JSON line of results/*.jsonl, and every table or plot is generated from them.

A row says what was measured (model, spec, method, kv, task, metric), the figure (value, stderr, n, seconds) and where
it was measured (when, git, machine, versions), so that two rows can be compared years later. Rows are only ever
appended: a newer row with the same `key` wins. The noun of the design has one more field here, `method`: rtn and gptq
write the same spec.

`append` is one O_APPEND write and one fsync, so rows of several processes never interleave, and it begins with a
newline where the last writer died in the middle of a line, so that a torn row is reported by `read` and swallows no
other.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FILE_NAME = "runs.jsonl"
_VERSIONED = ("torch", "transformers", "bitsmith")
# First words of tasks whose figures are speeds.
TIMED = ("bench", "kernels", "attention", "gguf-speed", "samplers", "load")


@dataclass(frozen=True)
class Result:
    """One measured figure. `here()` gives the first four fields; the command that measures sets the rest."""

    # ISO 8601, UTC, seconds.
    when: str
    # Commit of the checkout, with "-dirty" if tracked files outside results/ differ from it; "none" outside a checkout.
    git: str
    # cpu, cores and, where there is one, gpu.
    machine: dict[str, Any]
    versions: dict[str, str]
    # Name of the unquantized model, so that all its quantized forms share a table.
    model: str
    # Spec of the weights as it prints ("affine4.g128.asym"), or their dtype ("f16") where they are not quantized.
    spec: str
    # Codec of the KV cache; "none" in a plain forward.
    kv: str
    # What was run, slash-separated, all that makes figures comparable: "kld/wikitext2-test/llamacpp/512".
    task: str
    metric: str
    value: float
    # Standard error of `value`; None where the metric has none.
    stderr: float | None
    # Samples behind `value`: tokens, questions, runs.
    n: int
    # Wall time of the whole measurement that gave this row.
    seconds: float
    # How the codes were chosen: rtn, gptq, awq, hqq ...; "" where nothing was quantized or nobody knows.
    method: str = ""
    # More that was measured of the same thing at once; what its task says ("kernels": kernel_speed.detail).
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def processor(self) -> str:
        """The CPU, and the GPU where there is one: "AMD EPYC + NVIDIA H100"."""
        return " + ".join(str(self.machine[name]) for name in ("cpu", "gpu") if self.machine.get(name))

    @property
    def key(self) -> tuple[str, ...]:
        """Rows with equal keys measure the same thing; the newest is the one to show. Speed is of one processor."""
        where = (self.processor,) if self.task.split("/")[0] in TIMED else ()
        return (self.model, self.spec, self.method, self.kv, self.task, self.metric, *where)


def default_dir() -> Path:
    """results/ of the checkout bitsmith runs from, or ./results for an installed package."""
    return (ROOT if (ROOT / ".git").exists() else Path.cwd()) / "results"


def append(path: str | Path, results: Sequence[Result]) -> None:
    """Add rows to the JSON-lines file `path`, made with its folder if absent, so that they survive a crash right after.

    Raises UserError where a value is NaN or infinite (JSON has neither) or the file cannot be written.
    """
    path = Path(path)
    lines = "".join(_line(result) for result in results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{path}: cannot append results ({error.strerror}); choose another folder with --results DIR"
        ) from None
    try:
        data = (_newline_if_torn(descriptor) + lines).encode()
        written = os.write(descriptor, data)
        if written != len(data):
            raise UserError(
                f"{path}: only {written} of {len(data)} bytes were written; free disk space, then run again"
            )
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(result: Result) -> str:
    try:
        row = asdict(result)
        if not row["detail"]:
            del row["detail"]
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(
            f"result {result.task} {result.metric} of {result.model} ({result.spec}) is {result.value} "
            f"± {result.stderr}: only finite figures are recorded; check the model's logits"
        ) from None


def _newline_if_torn(descriptor: int) -> str:
    """A newline where the file ends within a line. Losing a race here costs an empty line, which `read` skips."""
    size = os.fstat(descriptor).st_size
    return "\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else ""


def read(path: str | Path) -> list[Result]:
    """The rows of one .jsonl file, or of every .jsonl file of a folder in name order, oldest line first.

    Raises UserError naming file and line for a row that is torn, not JSON or not a Result.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such results file or folder; run `bitsmith eval ppl` or `eval kld` first")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [row for file in files for row in _rows(file)]


def _rows(file: Path) -> Iterable[Result]:
    names = {each.name for each in fields(Result)}
    required = names - {"method", "detail"}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not a whole JSON row ({error.msg}); delete that line") from None
        if not isinstance(row, dict) or not required <= set(row) <= names:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{file}, line {number}: fields {found}; accepted: {sorted(names)}; correct or delete that line"
            )
        yield Result(**row)


def latest(rows: Iterable[Result]) -> list[Result]:
    """One row per key: the newest by `when`, and of equal times the one read last. Order of first appearance."""
    newest: dict[tuple[str, ...], Result] = {}
    for row in rows:
        if row.key not in newest or row.when >= newest[row.key].when:
            newest[row.key] = row
    return list(newest.values())


def here() -> dict[str, Any]:
    """The fields of a Result that say when, from which commit, where and with what it was measured."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"when": when, "git": _git(), "machine": _machine(), "versions": _versions()}


@lru_cache
def _git() -> str:
    if not (ROOT / ".git").exists():
        return "none"
    commit = _git_output("rev-parse", "HEAD")
    # results/ is what the measurement itself changes.
    dirty = _git_output("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return (commit + ("-dirty" if dirty else "")) if commit else "none"


def _git_output(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


@lru_cache
def _machine() -> dict[str, Any]:
    import torch

    # Virtual machines of one name differ in what they let through.
    cpu = f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"
    machine: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count() or 1}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@lru_cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
