"""`bitsmith generate PATH -p TEXT`: one completion."""

import argparse
import time
from typing import Any

from . import _engine, _sampling, _threads
from ._output import note, print_json, quiet_libraries


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("generate", help="complete a prompt")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--trace",
        dest="sampler_trace",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print what each sampler did, token by token",
    )
    _sampling.add_flags(parser)
    _engine.add_flags(parser)
    _threads.add_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Print the completion."""
    params = _sampling.params(args)
    quiet_libraries()
    _threads.apply(args)
    from ..serve.llm import LLM
    from ..serve.openai_format import trace
    from ..serve.token_text import token_bytes_of

    llm = LLM(args.path, **_engine.options(args))
    start = time.perf_counter()
    (output,) = llm.generate([args.prompt], params)
    rate = output.completion_tokens / (time.perf_counter() - start)
    traced = zip(output.token_ids, output.trace or (), strict=False)
    traces = trace(list(traced), token_bytes_of(llm.engine.tokenizer))
    if not args.json:
        print(output.text)
        print("\n".join(line for each in traces for line in table(each)), end="\n" * bool(traces))
        note(f"{output.prompt_tokens} + {output.completion_tokens} tokens, {rate:.1f} tokens/s, {output.finish_reason}")
        return
    result = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "tokens_per_second": rate,
    }
    if output.logprobs is not None:
        result["logprobs"] = [
            {"token_id": entry.token_id, "logprob": entry.logprob, "top": dict(entry.top)} for entry in output.logprobs
        ]
    if output.trace is not None:
        result["sampler_trace"] = traces
    print_json(result)


def table(token: dict[str, Any]) -> list[str]:
    """One token's trace as lines: a step each, with what it removed and the best tokens after it."""

    def best(tokens: list[dict[str, Any]]) -> str:
        return "  ".join(f"{each['token']!r} {each['prob']:.3f}" for each in tokens)

    lines = ["", f"{token['token']!r} ({token['token_id']})"]
    if not token["steps"]:
        return [*lines, "  no sampler changed anything"]
    lines.append(f"  {'step':<26}{'removed':>8}{'mass':>8}{'kept':>8}  best")
    lines.append(f"  {'(model)':<26}{'':>8}{'':>8}{'':>8}  {best(token['steps'][0]['before'])}")
    for step in token["steps"]:
        counts = f"{step['removed']:>8}{step['removed_mass']:>8.3f}{step['kept']:>8}"
        lines.append(f"  {step['step']:<26}{counts}  {best(step['after'])}")
    return lines
