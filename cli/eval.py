"""`bitsmith eval ppl|kld|storyworld|report`: what quantization cost, measured by plain forwards and kept as result
rows.

Every measurement appends its rows to results/ (of the checkout, else of the working directory) unless told not to.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import _threads
from ._output import note, print_json, quiet_libraries


def add_parser(subparsers: Any) -> None:
    """Declare the command and its four measurements."""
    parser = subparsers.add_parser("eval", help="perplexity, KL divergence, tasks, reports")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    ppl = kinds.add_parser("ppl", help="perplexity on a text")
    _common(ppl)
    _text(ppl, "2048 or the model's positions", "windows")
    kld = kinds.add_parser("kld", help="KL divergence from the unquantized model")
    _common(kld)
    kld.add_argument("--base", required=True, metavar="PATH0", help="the unquantized model")
    _text(kld, "512 or the model's positions", "llamacpp")
    story = kinds.add_parser("storyworld", help="questions about generated stories, and the distance to their entropy")
    _common(story)
    story.add_argument("--data", metavar="FILE", help="stories (default: those of examples/storyworld)")
    story.add_argument("--limit", type=int, metavar="N", help="stories read at most")
    report = kinds.add_parser("report", help="tables and plots from the recorded rows")
    report.add_argument("--results", metavar="DIR", help="folder of the rows (default: results/)")
    report.add_argument("--out", metavar="DIR", help="folder to write to (default: results/report)")
    report.add_argument("--readme", metavar="FILE", help="rewrite the marked tables of this document")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--name", metavar="MODEL", help="the unquantized model's name in results (default: directory)")
    parser.add_argument("--device", default="cpu", metavar="DEV")
    _threads.add_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--results", metavar="DIR", help="folder to append rows to (default: results/)")
    where.add_argument("--no-record", action="store_true", help="append no rows")


def _text(parser: argparse.ArgumentParser, ctx: str, protocol: str) -> None:
    parser.add_argument(
        "--data", required=True, metavar="FILE|wikitext2", help=".txt, .jsonl with text fields, or a name"
    )
    parser.add_argument("--ctx", type=int, metavar="N", help=f"tokens a window (default: {ctx})")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of text read at most")
    parser.add_argument("--protocol", default=protocol, choices=("windows", "llamacpp"))
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="windows a forward")


def run(args: argparse.Namespace) -> None:
    """Measure, print, record."""
    quiet_libraries()
    if args.kind != "report":
        _threads.apply(args)
    {"ppl": _ppl, "kld": _kld, "storyworld": _storyworld, "report": _report}[args.kind](args)


def _load(args: argparse.Namespace, path: str) -> Any:
    from ..models.load import load_model

    return load_model(path, device=args.device)


def _windows(args: argparse.Namespace, model: Any, tokenizer: Any, longest: int) -> dict[str, Any]:
    """The arguments that `perplexity` and `kl_divergence` share."""
    from ..eval.ppl import default_ctx
    from ..eval.text import bos_of, load_text, tokenize

    if args.batch < 1 or (args.max_tokens is not None and args.max_tokens < 2):
        raise UserError(
            f"--batch {args.batch}, --max-tokens {args.max_tokens}: accepted are --batch 1 and --max-tokens 2 or more"
        )
    ids = tokenize(tokenizer, load_text(args.data, args.protocol))
    ctx = default_ctx(model, ids, longest, args.max_tokens) if args.ctx is None else args.ctx
    return {
        "ids": ids,
        "ctx": ctx,
        "protocol": args.protocol,
        "max_tokens": args.max_tokens,
        "batch": args.batch,
        "bos": bos_of(tokenizer),
    }


def _task(args: argparse.Namespace, ctx: int) -> str:
    """All that makes two figures comparable, as one slash-separated word."""
    limit = f"/{args.max_tokens}tok" if args.max_tokens else ""
    return f"{args.kind}/{Path(args.data).stem}/{args.protocol}/{ctx}{limit}"


def _ppl(args: argparse.Namespace) -> None:
    from ..eval.ppl import perplexity
    from ..eval.subject import subject
    from ..models.load import load_tokenizer

    who, model = subject(args.path, args.name), _load(args, args.path)
    start = time.perf_counter()
    found = perplexity(model, **_windows(args, model, load_tokenizer(args.path), 2048))
    errors = {"ppl": "stderr", "nll": "nll_stderr"}
    rows = who.rows(_task(args, found["ctx"]), found, errors, found["tokens"], time.perf_counter() - start)
    _finish(args, found, rows)


def _kld(args: argparse.Namespace) -> None:
    from ..eval.kld import check_same_tokens, kl_divergence
    from ..eval.subject import subject
    from ..models.load import load_tokenizer

    tokenizer = load_tokenizer(args.path)
    check_same_tokens(tokenizer, load_tokenizer(args.base))
    who = subject(args.path, args.name or args.base)
    model, base = _load(args, args.path), _load(args, args.base)
    start = time.perf_counter()
    found = kl_divergence(model, base, **_windows(args, model, tokenizer, 512))
    _finish(args, found, who.kld_rows(_task(args, found["ctx"]), found, time.perf_counter() - start))


def _storyworld(args: argparse.Namespace) -> None:
    from ..eval.results import ROOT
    from ..eval.storyworld import evaluate
    from ..eval.subject import subject
    from ..models.load import load_tokenizer

    who, model = subject(args.path, args.name), _load(args, args.path)
    data = Path(args.data) if args.data else ROOT / "examples" / "storyworld" / "heldout.jsonl"
    start = time.perf_counter()
    found = evaluate(model, load_tokenizer(args.path), data, args.limit)
    task = "storyworld" + (f"/{args.limit}" if args.limit else "")
    errors = {"bpw": None, "accuracy": "stderr", "gap_nats_per_token": "gap_stderr"}
    _finish(
        args,
        found,
        who.rows(task, {**found, "bpw": who.bpw}, errors, int(found["n_questions"]), time.perf_counter() - start),
    )


def _finish(args: argparse.Namespace, found: dict[str, Any], rows: list[Any]) -> None:
    """Print what was found and append its rows."""
    from ..eval.results import FILE_NAME, append, default_dir

    if args.json:
        print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:<20} {value:.6g}" if isinstance(value, float) else f"{name:<20} {value}")
    if not args.no_record:
        path = (Path(args.results) if args.results else default_dir()) / FILE_NAME
        append(path, rows)
        note(f"{len(rows)} rows appended to {path}")


def _report(args: argparse.Namespace) -> None:
    from ..eval.report import report, update_tables
    from ..eval.results import default_dir, read

    source = Path(args.results) if args.results else default_dir()
    for path in report(source, Path(args.out) if args.out else source / "report"):
        print(path)
    if args.readme:
        document = Path(args.readme)
        if not document.is_file():
            raise UserError(f"--readme {document}: no such file; give the document that holds the table markers")
        document.write_text(update_tables(document.read_text(encoding="utf-8"), read(source)), encoding="utf-8")
        print(document)
