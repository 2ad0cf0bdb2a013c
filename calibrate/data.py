"""Calibration text -> seeded blocks of tokens.

Sources: a text file, a .jsonl file (field "text", or OpenAI-style "messages" rendered with the chat template), or
`hub:NAME[:split]` through the datasets library. The whole text is tokenized once; blocks are drawn at random offsets
without overlap, so that a seed and a file decide the result and nothing else does.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.checkpoint import AnyCheckpoint
from ..models.load import load_tokenizer


def calibration_rows(ckpt: AnyCheckpoint, source: str, samples: int, seqlen: int, seed: int) -> Tensor:
    """int64 [samples, seqlen] of `source` (--calib) in the checkpoint's tokens; see `token_blocks`."""
    longest = ckpt.config.get("max_position_embeddings")
    if isinstance(longest, int) and seqlen > longest:
        raise UserError(
            f"--calib-seqlen {seqlen} is longer than the model's max_position_embeddings {longest}. Fix: at most "
            f"{longest}"
        )
    tokenizer = load_tokenizer(ckpt.path)
    return token_blocks(read_text(source, tokenizer), tokenizer, samples, seqlen, seed, source)


def read_text(source: str, tokenizer: Any = None) -> str:
    """The text of FILE or hub:NAME. UserError naming the file, the line and what was expected."""
    if source.startswith("hub:"):
        return _hub(source.removeprefix("hub:"))
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"calibration text {source} does not exist. Fix: --calib FILE (.txt or .jsonl) or --calib hub:NAME"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error}). Fix: convert it, or choose another file") from error
    if path.suffix != ".jsonl":
        return content
    return "\n\n".join(
        _row(line, f"{source}:{number}", tokenizer) for number, line in enumerate(content.splitlines(), 1) if line
    )


def _row(line: str, where: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}). Fix: one JSON object a line") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row, dict) and isinstance(row.get("messages"), list) and getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    raise UserError(
        f'{where} has neither a string "text" nor "messages" the chat template can render. Fix: give one of them'
    )


def _hub(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"--calib hub:{name} needs the datasets library. Fix: pip install 'bitsmith[hub]', or give a file"
        ) from error
    path, _, split = name.partition(":")
    try:
        rows = load_dataset(path, split=split or "train", streaming=True)
        return "\n\n".join(str(row["text"]) for row in rows.take(4096))
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise UserError(
            f"dataset {path} could not be read ({error}). Fix: check its name and the network, or give a file"
        ) from error


def token_blocks(text: str, tokenizer: Any, samples: int, seqlen: int, seed: int, where: str) -> Tensor:
    """int64 [samples, seqlen], drawn without overlap; fewer rows where the text is short, UserError where it holds
    none.

    The text is tokenized without special tokens; each block begins with the BOS token where the tokenizer has one.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    body = seqlen - len(bos)
    available = len(ids) // body
    if not available:
        raise UserError(
            f"{where} holds {len(ids)} tokens, fewer than one block of {seqlen}. Fix: more text, or a smaller "
            "--calib-seqlen"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:samples].sort().values.tolist()
    return torch.tensor([[*bos, *ids[i * body : (i + 1) * body]] for i in chosen])
