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
    _sampling.add_flags(parser)
    _engine.add_flags(parser)
    _threads.add_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Print the completion."""
    params = _sampling.params(args)
    quiet_libraries()
    _threads.apply(args)
    from ..serve.llm import LLM

    llm = LLM(args.path, **_engine.options(args))
    start = time.perf_counter()
    (output,) = llm.generate([args.prompt], params)
    rate = output.completion_tokens / (time.perf_counter() - start)
    if not args.json:
        print(output.text)
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
    print_json(result)
