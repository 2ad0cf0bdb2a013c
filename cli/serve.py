"""`bitsmith serve PATH`: the HTTP server.

The port is bound before the model is loaded, so that a port in use is told at once. SIGINT and SIGTERM stop the
server in order: no new connections, a few seconds for the requests in flight, then those left are aborted; the exit
code is 0.
"""

import argparse
import asyncio
import contextlib
import errno
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import _engine, _threads
from ._output import note, quiet_libraries, read_text

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..serve.engine_async import AsyncEngine

# Seconds that requests in flight get to finish after a stop signal.
GRACE = 5


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("serve", help="OpenAI-compatible HTTP server", argument_default=argparse.SUPPRESS)
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--host", help="address to listen on; default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, help="default 8000; 0: any free port, which is printed")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="model id of the API; default: the directory's name"
    )
    parser.add_argument("--api-key", metavar="KEY", help="require `Authorization: Bearer KEY`")
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Jinja file that replaces the tokenizer's chat template"
    )
    parser.add_argument(
        "--sampler-preset",
        metavar="FILE",
        help="YAML or JSON of sampling parameters requests get (see serve/presets.py)",
    )
    parser.add_argument(
        "--quantize", metavar="FMT", help="quantize at load, by rounding to nearest (see `bitsmith formats`)"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="flags by name; the command line wins")
    _engine.add_flags(parser)
    _threads.add_flag(parser)


def with_config(args: argparse.Namespace) -> argparse.Namespace:
    """`args` over the flags of its --config file, which pass through the same parser."""
    if not hasattr(args, "config"):
        return args
    import yaml

    from .main import build_parser

    try:
        found = yaml.safe_load(read_text("--config", args.config))
    except yaml.YAMLError as error:
        raise UserError(f"--config {args.config}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--config {args.config} must hold a mapping of flag names to values, such as `port: 8000`")
    words = [word for name, value in found.items() for word in _flag(f"--{str(name).replace('_', '-')}", value)]
    try:
        merged = build_parser(["serve"]).parse_args(["serve", args.path, *words])
    except UserError as error:
        raise UserError(f"--config {args.config}: {error}") from error
    return argparse.Namespace(**vars(merged) | vars(args))


def _flag(name: str, value: object) -> list[str]:
    """What stands on a command line for a line of --config: `true` is the bare flag, `false` none."""
    return [name] * value if isinstance(value, bool) else [f"{name}={value}"]


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening. UserError if that is impossible."""
    # getaddrinfo would take a larger number modulo 65536.
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: accepted are 0 (any free port) to 65535")
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        in_use = error.errno == errno.EADDRINUSE
        fix = (
            "stop the other server or choose another --port (0: any free one)" if in_use else "check --host and --port"
        )
        raise UserError(f"cannot listen on {host}:{port}: {error}; {fix}") from error
    return listener


def run_server(app: "FastAPI", engine: "AsyncEngine", listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then stop in order."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Ending the requests still running gives their clients a last chunk; uvicorn would only cut the
            # connections.
            asyncio.get_running_loop().call_later(GRACE, engine.shutdown)
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2 * GRACE))
    # uvicorn raises the signal again once it has stopped, which without handlers of ours would be the exit status.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])


def run(args: argparse.Namespace) -> None:
    """Load the model and serve it."""
    quiet_libraries()
    args = with_config(args)
    _threads.apply(args)
    template = read_text("--chat-template", args.chat_template) if hasattr(args, "chat_template") else None
    preset = None
    if hasattr(args, "sampler_preset"):
        from ..serve.presets import read_preset

        source = f"--sampler-preset {args.sampler_preset}"
        preset = read_preset(read_text("--sampler-preset", args.sampler_preset), source)
    host = getattr(args, "host", "127.0.0.1")
    with contextlib.ExitStack() as held:
        listener = held.enter_context(bind(host, getattr(args, "port", 8000)))
        name = getattr(args, "served_model_name", Path(args.path).resolve().name)
        path = args.path
        if hasattr(args, "quantize"):
            from ..calibrate.driver import quantize

            path = str(Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bitsmith-"))) / "model")
            quantize(args.path, path, format=args.quantize, method="rtn")
        from ..serve.api import create_app
        from ..serve.engine_async import AsyncEngine
        from ..serve.llm import LLM

        llm = LLM(path, **_engine.options(args))
        engine = AsyncEngine(llm.engine)
        app = create_app(engine, name, getattr(args, "api_key", None), template, preset)
        shown = f"[{host}]" if ":" in host else host
        note(f"serving {name} at http://{shown}:{listener.getsockname()[1]}/v1")
        run_server(app, engine, listener)
