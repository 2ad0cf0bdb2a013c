"""Evaluation text: read it, turn it into one row of token ids, cut that row into windows.

The text is tokenised once as a whole, never window by window, so a window may begin within a word: that is what every
published protocol does. A tokenizer that puts a BOS before a text gets one, at the very start; whether it does is found
by asking it, because configurations lie. `windows` are consecutive and do not overlap; the ragged tail is dropped.

`wikitext2` is fetched by the `datasets` package and joined as each protocol's published figures do: rows joined by
blank lines (GPTQ and most papers) or glued together as in the raw file (llama.cpp). No text ships with this project.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

HUB = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
PROTOCOLS = ("windows", "llamacpp")
_JOIN = {"windows": "\n\n", "llamacpp": ""}


def load_text(source: str, protocol: str = "windows") -> str:
    """The text of a .txt file, of a .jsonl file's "text" fields (joined by blank lines) or of `wikitext2` from the hub.

    Raises UserError where the file is missing, empty, not UTF-8 or lacks the field, and where the hub cannot be
    reached.
    """
    if source in HUB and not Path(source).exists():
        return _hub_text(source, protocol)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such text file; pass a .txt or .jsonl file, or one of: {', '.join(HUB)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    if path.suffix == ".jsonl":
        text = "\n\n".join(_fields(path, text))
    if not text.strip():
        raise UserError(f"{path}: holds no text; pass a file with some")
    return text


def _fields(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}); each line must be one JSON object"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(
                f'{path}, line {number}: has no "text" string; each line must be an object like {{"text": "..."}}'
            )
        yield row["text"]


def _hub_text(name: str, protocol: str) -> str:
    repository, subset, split = HUB[name]
    fix = f"pass the text as a file instead: --data {name}.txt"
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name} is read with the `datasets` package, not installed: `pip install datasets`, or {fix}"
        ) from None
    try:
        rows = load_dataset(repository, subset, split=split)
    except OSError as error:
        # datasets and huggingface_hub report an unreachable hub as ConnectionError, FileNotFoundError or HTTP errors:
        # all OSError.
        raise UserError(f"{name}: could not fetch {repository} from the hub ({type(error).__name__}); {fix}") from None
    return _JOIN[protocol].join(rows["text"])


def bos_of(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer puts one before a text by itself, else None."""
    bos = tokenizer.bos_token_id
    with_specials = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos if bos is not None and with_specials[:1] == [bos] != without[:1] else None


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of the whole text, int64 [T], after the BOS if the tokenizer adds one (see `bos_of`).

    No EOS is added.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = bos_of(tokenizer)
    return torch.tensor(ids if bos is None else [bos, *ids], dtype=torch.long)


def windows(ids: torch.Tensor, ctx: int, max_tokens: int | None = None) -> torch.Tensor:
    """`ids` [T] cut into consecutive rows, int64 [n, ctx]. Of `max_tokens` tokens at most, the ragged tail dropped.

    Raises UserError where not even one row is full.
    """
    if max_tokens is not None and max_tokens < ctx:
        raise UserError(f"--max-tokens {max_tokens} is less than one window of {ctx} tokens: raise it or lower --ctx")
    if len(ids) < ctx:
        raise UserError(
            f"the text has {len(ids)} tokens, less than one window of {ctx}: pass --ctx {len(ids)} or more text"
        )
    count = min(len(ids), max_tokens or len(ids)) // ctx
    return ids[: count * ctx].view(count, ctx)
