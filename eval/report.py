"""Tables and plots generated from results/*.jsonl, so that no figure in a document is typed by hand.

One quality table per model and evaluation, one row per (method, spec): bits per weight, perplexity, KLD against the
unquantized model, top-1 agreement, seconds the quantization took. The plot puts bits per weight against mean KLD on a
log scale, one line per method. Other rows (speed, question accuracy) go into one plain table. Of rows with the same key
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
from .results import Result, latest, read

# Order of rows and of the plot's legend; methods not listed follow by name.
METHODS = ("", "rtn", "hqq", "awq", "gptq")
_MARKED = re.compile(r"(<!-- table:([^\s>]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
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
            return by_key.get((*identity, task, name))  # type: ignore[arg-type]

        quality = Quality(
            model=model,
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
    spec = Spec.parse(quality.spec)
    return (quality.model, quality.task, rank, quality.method, -spec.bits, spec.group, quality.spec)


def quality_table(rows: Iterable[Quality]) -> Table:
    """Header and cells. A metric nobody measured is a dash."""
    header = ["method", "spec", "bits/weight", "PPL", "KLD", "top-1 agreement", "seconds"]
    return [
        header,
        *(
            [
                q.method or "–",
                f"`{q.spec}`",
                _cell(q.bpw, ".2f"),
                _cell(q.ppl, ".2f"),
                _cell(q.kld, ".5f"),
                _cell(None if q.top1 is None else 100 * q.top1, ".2f", " %"),
                _cell(q.seconds, ".1f"),
            ]
            for q in rows
        ),
    ]


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def plain_table(rows: Iterable[Result]) -> Table:
    """One line per row, for what is not a KLD evaluation."""
    cells = [
        [
            row.model,
            f"`{row.spec}`" if row.spec else "–",
            row.task,
            row.metric,
            f"{row.value:.5g}" + (f" ± {row.stderr:.2g}" if row.stderr else ""),
            str(row.n),
        ]
        for row in latest(rows)
        if not row.task.startswith("kld/")
    ]
    return [["model", "spec", "task", "metric", "value", "n"], *sorted(cells)]


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


def report(results_dir: str | Path, out_dir: str | Path) -> list[Path]:
    """Write report.md and one PNG per model and evaluation into `out_dir`, and return their paths.

    Raises UserError where there are no rows.
    """
    rows = read(results_dir)
    if not rows:
        raise UserError(f"{results_dir}: no rows in any .jsonl file; run `bitsmith eval kld` or `eval ppl` first")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    text, written = ["# Results\n"], []
    found = qualities(rows)
    for model, task in dict.fromkeys((q.model, q.task) for q in found):
        group = [q for q in found if (q.model, q.task) == (model, task)]
        picture = out / (re.sub(r"[^\w.-]+", "-", f"{model}-{task}") + ".png")
        plot(group, picture)
        written.append(picture)
        text.append(f"## {model}, {task}\n\n{markdown(quality_table(group))}\n![{model}]({picture.name})\n")
    others = plain_table(rows)
    if len(others) > 1:
        text.append(f"## Other measurements\n\n{markdown(others)}")
    page = out / "report.md"
    page.write_text("\n".join(text), encoding="utf-8")
    return [page, *written]


def table_for(name: str, rows: Sequence[Result]) -> str:
    """The Markdown between the markers of table `name`. Raises UserError where no row belongs to it."""
    quality = [q for q in qualities(rows) if q.model == name]
    tasks = list(dict.fromkeys(q.task for q in quality))
    if tasks:
        parts = [markdown(quality_table([q for q in quality if q.task == task])) for task in tasks]
        return "\n".join(
            f"{task}\n\n{part}" if len(tasks) > 1 else part for task, part in zip(tasks, parts, strict=True)
        )
    others = [row for row in rows if row.task.split("/")[0] == name]
    if others:
        return markdown(plain_table(others))
    known = sorted({q.model for q in qualities(rows)} | {row.task.split("/")[0] for row in rows} - {"kld"})
    raise UserError(f"table {name!r}: no result row belongs to it; tables there are: {', '.join(known) or 'none yet'}")


def update_tables(document: str, rows: Sequence[Result]) -> str:
    """`document` with every marked table rewritten from `rows`.

    Raises UserError for an opening marker without its end.
    """
    opened = document.count("<!-- table:")
    if opened != len(_MARKED.findall(document)):
        raise UserError("a `<!-- table:NAME -->` line has no `<!-- /table -->` line after it: add one")
    return _MARKED.sub(lambda m: m[1] + table_for(m[2], rows) + m[3], document)
