"""`bitsmith chat PATH`: a conversation in the terminal, through the model's chat template.

Replies stream to stdout, prompts and notes go to stderr, so a piped conversation leaves only the replies. Ctrl-C ends
a reply (what was said of it stays in the conversation); `/reset` forgets the conversation; `/exit` or the end of
input leaves.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _engine, _sampling, _threads
from ._output import note, quiet_libraries, read_text

if TYPE_CHECKING:
    from ..samplers.params import SamplingParams
    from ..serve.engine import Engine

_ID = "chat"


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("chat", help="talk to a model in the terminal")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Jinja file that replaces the tokenizer's chat template"
    )
    _sampling.add_flags(parser)
    _engine.add_flags(parser)
    _threads.add_flag(parser)


def lines() -> Iterator[str]:
    """What the user types, without the commands, until `/exit` or the end of input. `/reset` comes through."""
    interactive = sys.stdin.isatty()
    if interactive:
        note("/reset forgets the conversation, /exit leaves")
        # Gives input() line editing and history; the module is not there on Windows.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def say(engine: "Engine", prompt_ids: list[int], params: "SamplingParams") -> str:
    """Stream one reply to stdout and return it. Ctrl-C ends it early."""
    reply = []
    engine.add_request(_ID, prompt_ids, params)
    try:
        while engine.has_work():
            for _, chunk in engine.step():
                reply.append(chunk.text_delta)
                print(chunk.text_delta, end="", flush=True)
    except KeyboardInterrupt:
        engine.abort(_ID)
    print(flush=True)
    return "".join(reply)


def run(args: argparse.Namespace) -> None:
    """Hold the conversation."""
    # A reply may use all the context that is left.
    params = _sampling.params(args, max_tokens=-1)
    template = read_text("--chat-template", args.chat_template) if args.chat_template else None
    quiet_libraries()
    _threads.apply(args)
    from ..serve.chat import chat_prompt_ids
    from ..serve.llm import LLM
    from ..serve.openai_types import ChatRequest

    engine = LLM(args.path, **_engine.options(args)).engine
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    for line in lines():
        if line == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        prompt_ids = chat_prompt_ids(engine.tokenizer, ChatRequest(messages), template)
        if len(prompt_ids) >= engine.max_model_len:
            note(
                f"{len(prompt_ids)} tokens do not fit the context of {engine.max_model_len}: /reset, or say it shorter"
            )
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": say(engine, prompt_ids, params)})
