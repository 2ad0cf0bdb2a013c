"""What commands print: one JSON object or plain lines on stdout, everything else on stderr."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError


def print_json(result: dict[str, Any]) -> None:
    """Write `result` as the one JSON object of a `--json` run.

    Infinities and NaN, which are not JSON, raise ValueError.
    """
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))


def note(message: str) -> None:
    """A line for the person watching; never part of the result."""
    print(message, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keep transformers and the hub client from talking over the command. Call before the first import of either."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def read_text(flag: str, file: str) -> str:
    """The text of the file given with `flag`. UserError if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {file}: {error}") from error
