"""Tables and plots generated from results/*.jsonl, so that no figure in a document is typed by hand.

One quality table per model and evaluation, one row per (method, spec): bits per weight, perplexity, KLD against the
unquantized model, top-1 agreement, seconds the quantization took. The plot puts bits per weight against mean KLD on a
log scale, one line per method. GGUF files of a model have a table of their own, "MODEL-gguf": one row per file type,
methods side by side. Other rows (speed, question accuracy) get one table per task. Of rows with the same key
the newest counts.

A document holds a table between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a model ("books-8m"), or a task's
first word ("bench"). `update_tables` rewrites what lies between, and a test compares the README with that, so it cannot
drift.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..kernels.spec import Spec
from .kernel_table import kernels_table
from .results import Result, latest, read

# Order of rows and of the plot's legend; methods not listed follow by name.
METHODS = ("", "rtn", "hqq", "awq", "gguf", "gptq", "size", "llama-quantize")
_GGUF = "gguf:"
_MARKED = re.compile(r"(<!-- table:([^\s>]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
# Stands in a document where no row belongs to a table: visible there, so a misspelt name is too.
UNMEASURED = "*not measured yet*\n"
_DENSE = ("f32", "f16", "bf16")
Table = list[list[str]]


@dataclass(frozen=True)
class Quality:
    """One quantized form of a model under one evaluation. Metrics that no row gives are None."""

    model: str
    task: str
    method: str
    spec: str
    bpw: float | None
    ppl: float | None
    kld: float | None
    top1: float | None
    seconds: float | None


def qualities(rows: Iterable[Result]) -> list[Quality]:
    """The KLD evaluations among `rows`, the unquantized model first, then by method, falling bits and group size."""
    newest = latest(rows)
    by_key = {row.key: row.value for row in newest}
    found = []
    for model, spec, method, kv, task in dict.fromkeys(row.key[:5] for row in newest):
        if not task.startswith("kld/"):
            continue

        def metric(name: str, task: str = task, identity: tuple[str, ...] = (model, spec, method, kv)) -> float | None:
            return by_key.get((*identity, task, name))

        quality = Quality(
            model=f"{model}-gguf" if spec.startswith(_GGUF) else model,
            task=task,
            method=method,
            spec=spec,
            bpw=metric("bpw"),
            ppl=metric("ppl"),
            kld=metric("kld_mean"),
            top1=metric("top1_agreement"),
            seconds=metric("seconds", "quantize"),
        )
        found.append(quality)
    return sorted(found, key=_order)


def _order(quality: Quality) -> tuple[object, ...]:
    rank = METHODS.index(quality.method) if quality.method in METHODS else len(METHODS)
    if quality.spec in _DENSE:
        return (quality.model, quality.task, -1, "", 0, 0, quality.spec)
    if quality.spec.startswith(_GGUF):
        return (quality.model, quality.task, rank, quality.method, -(quality.bpw or 0), 0, quality.spec)
    spec = Spec.parse(quality.spec)
    return (quality.model, quality.task, rank, quality.method, -spec.bits, spec.group, quality.spec)


def quality_table(rows: Sequence[Quality]) -> Table:
    """Header and cells. A metric nobody measured is a dash."""
    if all(q.spec.startswith(_GGUF) for q in rows):
        return _gguf_table(rows)
    header = ["method", "spec", "bits/weight", "PPL", "KLD", "top-1 agreement", "seconds"]
    return [
        header,
        *(
            [
                q.method or "–",
                f"`{q.spec}`",
                _cell(q.bpw, ".2f"),
                _cell(q.ppl, ".2f"),
                _cell(q.kld, ".3g"),
                _cell(None if q.top1 is None else 100 * q.top1, ".2f", " %"),
                _cell(q.seconds, ".1f"),
            ]
            for q in rows
        ),
    ]


def _gguf_table(rows: Sequence[Quality]) -> Table:
    """One line per file type: its bits and perplexity as the first method made it, and KLD of each."""
    methods = list(dict.fromkeys(q.method for q in rows))
    found = {(q.spec, q.method): q for q in rows}
    firsts = {q.spec: q for q in reversed(rows)}
    cells = [
        [
            f"`{spec.removeprefix(_GGUF)}`",
            _cell(first.bpw, ".2f"),
            _cell(first.ppl, ".2f"),
            *(_cell(q.kld if (q := found.get((spec, method))) else None, ".3g") for method in methods),
        ]
        for spec, first in sorted(firsts.items(), key=lambda item: (-(item[1].bpw or 0), item[0]))
    ]
    return [["file type", "bits/weight", "PPL", *(f"KLD, {method}" for method in methods)], *cells]


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def task_table(rows: Iterable[Result]) -> Table:
    """One line per form and task, one column per metric, for what is not a KLD evaluation."""
    newest = latest(rows)
    metrics = list(dict.fromkeys(row.metric for row in newest))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in newest:
        error = f" ± {row.stderr:.2g}" if row.stderr else ""
        lines.setdefault((row.model, row.method, row.spec, row.task), {})[row.metric] = f"{row.value:.5g}{error}"
    cells = [
        [model, method or "–", f"`{spec}`", task, *(found.get(metric, "–") for metric in metrics)]
        for (model, method, spec, task), found in lines.items()
    ]
    return [["model", "method", "spec", "task", *metrics], *cells]


def bench_table(rows: Iterable[Result]) -> Table:
    """One line per engine and run, tokens per second per case; beside a peer's figure ours as a multiple of it."""
    newest = [row for row in latest(rows) if row.task.startswith("bench/")]
    cases = list(dict.fromkeys(row.metric for row in newest))
    ours = {(*_conditions(row), row.metric): row.value for row in newest if _engine(row) == "bitsmith"}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in newest:
        own = ours.get((*_conditions(row), row.metric))
        versus = f" (ours {own / row.value:.2f}x)" if own and _engine(row) != "bitsmith" else ""
        # n counts undisturbed samples.
        doubt = "" if row.n else " (disturbed)"
        cell = f"{row.value:.1f}{versus}{doubt}"
        lines.setdefault((*_conditions(row), _engine(row), row.spec), {})[row.metric] = cell
    cells = [
        [model, engine, f"`{spec}`", f"{processor}, {threads}", *(found.get(c, "–") for c in cases)]
        for (model, processor, threads, _, engine, spec), found in lines.items()
    ]
    return [["model", "engine", "weights", "on", *(f"{case}, tok/s" for case in cases)], *cells]


def samplers_table(rows: Iterable[Result]) -> Table:
    """One line per sampler and batch: microseconds a row of ours, and the peers' time over it."""
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in latest(rows):
        where = ", ".join([row.processor, row.task.split("/")[2]])
        lines.setdefault((row.metric, row.model, where), {})[_contender(row)] = row.value
    peers = list(dict.fromkeys(name for found in lines.values() for name in found if name != "bitsmith"))
    cells = []
    for (metric, size, where), found in lines.items():
        ours = found["bitsmith"]
        others = [f"{found[peer]:.0f} ({found[peer] / ours:.1f}x)" if peer in found else "–" for peer in peers]
        cells.append([metric, size, where, f"{ours:.0f}", *others])
    return [["sampler", "rows x vocabulary", "on", "us a row", *peers], *cells]


def _contender(row: Result) -> str:
    return row.task.split("/")[1]


def support_table(rows: Iterable[Result]) -> Table:
    """What works, by area: the claims whose tests passed, with how many there were (tests/support.yaml)."""
    cells = [[row.task.split("/")[1], row.metric, str(row.n)] for row in latest(rows)]
    return [["area", "what works", "tests"], *cells]


def _engine(row: Result) -> str:
    return row.task.split("/")[2]


def _conditions(row: Result) -> tuple[str, str, str, str]:
    """Model, processor, threads and our form in that run: what the engines of one run have in common."""
    threads, form = row.task.split("/")[3:5]
    return (row.model, row.processor, threads, form)


def markdown(table: Table) -> str:
    """A Markdown table; the first column left-aligned, the others as they are."""
    rule = ["---"] * len(table[0])
    return "".join("| " + " | ".join(row) + " |\n" for row in (table[0], rule, *table[1:]))


def plot(rows: Sequence[Quality], path: Path) -> None:
    """Bits per weight against mean KLD (log), one labelled line per method, as a PNG.

    Forms without both are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method in dict.fromkeys(q.method for q in rows):
        points = sorted((q.bpw, q.kld) for q in rows if q.method == method and q.bpw is not None and q.kld)
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.2, label=method or "as published")
    axes.set_yscale("log")
    axes.set(xlabel="bits per weight", ylabel="mean KLD from the unquantized model (nats)")
    axes.set_title(f"{rows[0].model}: {rows[0].task}")
    axes.grid(True, which="both", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path)


def by_task(rows: Sequence[Quality], model: str) -> dict[str, list[Quality]]:
    """The evaluations of one model, the one that covers most forms first."""
    tasks: dict[str, list[Quality]] = {}
    for quality in rows:
        if quality.model == model:
            tasks.setdefault(quality.task, []).append(quality)
    return dict(sorted(tasks.items(), key=lambda item: -len(item[1])))


def report(results_dir: str | Path, out_dir: str | Path) -> list[Path]:
    """Write report.md, and per model and evaluation one PNG, into `out_dir`; returns their paths.

    MODEL.png is of the evaluation that covers most of the model's forms. Raises UserError where there are no rows.
    """
    rows = read(results_dir)
    if not rows:
        raise UserError(f"{results_dir}: no rows in any .jsonl file; run `bitsmith eval kld` or `eval ppl` first")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    text, written = ["# Results\n"], []
    found = qualities(rows)
    for model in dict.fromkeys(q.model for q in found):
        for index, (task, group) in enumerate(by_task(found, model).items()):
            picture = out / (re.sub(r"[^\w.-]+", "-", f"{model}-{task}" if index else model) + ".png")
            plot(group, picture)
            written.append(picture)
            text.append(f"## {model}, {task}\n\n{markdown(quality_table(group))}\n![{model}]({picture.name})\n")
    heads = dict.fromkeys(row.task.split("/")[0] for row in rows)
    text += [f"## {head}\n\n{table_for(head, rows)}" for head in heads if head != "kld"]
    page = out / "report.md"
    page.write_text("\n".join(text), encoding="utf-8")
    return [page, *written]


def table_for(name: str, rows: Sequence[Result]) -> str:
    """The Markdown between the markers of table `name`: a model's main evaluation, a task's rows, or UNMEASURED."""
    quality = qualities(rows)
    tasks = by_task(quality, name)
    if tasks:
        return markdown(quality_table(next(iter(tasks.values()))))
    others = [row for row in rows if row.task.split("/")[0] == name]
    if others:
        tables = {
            "bench": bench_table,
            "kernels": kernels_table,
            "samplers": samplers_table,
            "support": support_table,
        }
        return markdown(tables.get(name, task_table)(others))
    return UNMEASURED


def update_tables(document: str, rows: Sequence[Result]) -> str:
    """`document` with every marked table rewritten from `rows`. UserError for an opening marker without its end."""
    opened = document.count("<!-- table:")
    if opened != len(_MARKED.findall(document)):
        raise UserError("a `<!-- table:NAME -->` line has no `<!-- /table -->` line after it: add one")
    return _MARKED.sub(lambda m: m[1] + table_for(m[2], rows) + m[3], document)
