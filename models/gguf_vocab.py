"""The tokenizer's part of a GGUF file from a checkpoint's tokenizer: the inverse of gguf_tokenizer.py.

Every tokenizer written is read back and must give the same ids on a text made to tell ways of cutting apart, so what
GGUF cannot say (another normalizer, another model) is an error and not another tokenizer.

How text is cut is a name in GGUF. llama.cpp's converter knows it by a hash of the ids that a model's own tokenizer
gives to a fixed text, and stops where the hash is new, as it is for every vocabulary that somebody trained. Here it is
found by cutting: the first name (gguf_pretokenizers.py) under which the text falls into the same pieces.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .gguf_config import Metadata as Reader
from .gguf_file import GGUF
from .gguf_pretokenizers import PRE_TOKENIZERS
from .gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, build_tokenizer, cutter
from .gguf_write import Metadata, as_read

# Every pre-tokenizer known cuts it in its own way. No line begins with a space and no two spaces meet a special token:
# there SentencePiece and llama.cpp put a dummy space that transformers' Llama tokenizers do not.
PROBE = (
    "Hello, wörld! It's 3 o'clock; I'LL pay $1234567.89 (50%) <=> don't. ÉCOLE Été ЩЕДРО 日本語の文章、テスト。 한국어 "
    "\r\n\r\n\n  indented\t\ttabs   end \n x = foo_bar(baz[3]) + 12e-3 // http://a.b/c?d=e#f\n/path\n\n\n "
    "naïve café ﬀ Ⅻ ²³ ½ ५६७ ٣٤ 1 22 333 4444 'S 're 'Tis we'Ve a'b `code` ^~| \U0001f642\U0001f3f3️‍\U0001f308 "
    "é n\u0303 क्षि กำ ...!!!??? --- == ##\r\n\u3000wide\u00a0hard {a:b} @user #tag CamelCaseWORD a1b2 x²\r_under"
)
_TOKEN_ROLES = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "unk_token_id": "unknown",
    "pad_token_id": "padding",
    "sep_token_id": "seperator",
    "cls_token_id": "cls",
    "mask_token_id": "mask",
}
# Marked as ordinary in some tokenizers and yet never to be found inside of a text's words: as llama.cpp's converter.
_CONTROL_TEXTS = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
_CONTROL_SHAPES = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def vocabulary_metadata(tokenizer: PreTrainedTokenizerFast | None, vocab_size: int, where: str) -> Metadata:
    """tokenizer.* for a model of `vocab_size` embeddings; None is a file without a tokenizer.

    UserError for a tokenizer that is neither byte-level BPE nor SentencePiece-like BPE, that has more tokens than the
    model, cuts text in a way that llama.cpp has no name for, or would not be read back the same.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": ("string", "no_vocab")}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(backend, where)
    tokens, types = _tokens(tokenizer, vocab_size, kind, backend, where)
    found: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.model": ("string", kind),
        "tokenizer.ggml.pre": ("string", "default" if kind == "llama" else _pre_name(tokenizer, backend, where)),
        "tokenizer.ggml.tokens": ("strings", tokens),
        "tokenizer.ggml.token_type": ("int32s", types),
    }
    if kind == "llama":
        found["tokenizer.ggml.scores"] = ("float32s", _scores(tokens, types, backend["model"]["merges"]))
    else:
        found["tokenizer.ggml.merges"] = ("strings", [" ".join(_pair(m)) for m in backend["model"]["merges"]])
    found |= _special(tokenizer, kind) | _chat(tokenizer)
    _check(tokenizer, found, where)
    return found


def _kind(backend: dict[str, Any], where: str) -> str:
    """tokenizer.ggml.model: "gpt2" for byte-level BPE, "llama" for the BPE that stands for SentencePiece."""
    model, text = backend["model"], json.dumps([backend["pre_tokenizer"], backend["normalizer"]])
    if model["type"] == "BPE" and '"ByteLevel"' in text:
        return "gpt2"
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    raise UserError(
        f"{where}: a {model['type']} tokenizer cannot be written as GGUF; accepted: byte-level BPE, and BPE with byte "
        "fallback (SentencePiece). Fix: use another format, or a directory without tokenizer files"
    )


def _tokens(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, kind: str, backend: dict[str, Any], where: str
) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise UserError(f"{where}: the tokenizer has id {max(by_id)}, the model {vocab_size} embeddings")
    unknown = backend["model"]["unk_token"] if kind == "llama" else None
    tokens, types = [], []
    for index in range(vocab_size):
        token, added = by_id.get(index, f"[PAD{index}]"), tokenizer.added_tokens_decoder.get(index)
        if index not in by_id:
            types.append(UNUSED)
        elif token == unknown:
            types.append(UNKNOWN)
        elif added is not None and (added.special or _looks_special(token)):
            types.append(CONTROL)
        elif added is not None:
            token = token.replace(SPACE, " ")
            types.append(USER_DEFINED)
        else:
            is_byte = kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            types.append(BYTE if is_byte else NORMAL)
        tokens.append(token)
    return tokens, types


def _looks_special(token: str) -> bool:
    ends = any(token.startswith(first) and token.endswith(last) for first, last in _CONTROL_SHAPES)
    return token in _CONTROL_TEXTS or ends


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    """SentencePiece merges by score where BPE merges by rank: minus the rank of the first merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(_pair(merge)), rank)
    lowest = float(-len(merges) - 1)
    return [
        0.0 if kind in (BYTE, UNKNOWN) else float(-ranks[token]) if token in ranks else lowest
        for token, kind in zip(tokens, types, strict=True)
    ]


def _pre_name(tokenizer: PreTrainedTokenizerFast, backend: dict[str, Any], where: str) -> str:
    own = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    ignores = bool(backend["model"].get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        if pre.ignore_merges == ignores and cutter(pre).pre_tokenize_str(PROBE) == own:
            return name
    raise UserError(
        f"{where}: the tokenizer cuts text in a way that llama.cpp has no name for (tokenizer.ggml.pre). Fix: use "
        "another format"
    )


def _special(tokenizer: PreTrainedTokenizerFast, kind: str) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for name, role in _TOKEN_ROLES.items():
        index = getattr(tokenizer, name, None)
        if index is not None:
            found[f"tokenizer.ggml.{role}_token_id"] = ("uint32", index)
    plain, whole = (tokenizer("a", add_special_tokens=each)["input_ids"] for each in (False, True))
    added = whole[: len(whole) - len(plain)], whole[len(plain) :]
    found["tokenizer.ggml.add_bos_token"] = ("bool", len(whole) > len(plain) and added[0][0] == tokenizer.bos_token_id)
    found["tokenizer.ggml.add_eos_token"] = ("bool", len(whole) > len(plain) and added[1][-1] == tokenizer.eos_token_id)
    if kind == "llama":
        found["tokenizer.ggml.add_space_prefix"] = ("bool", tokenizer.tokenize("a")[0].startswith(SPACE))
    return found


def _chat(tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[str, Any]]:
    """tokenizer.chat_template, and one key more for each named one."""
    key, template = "tokenizer.chat_template", tokenizer.chat_template
    if not isinstance(template, dict):
        return {key: ("string", template)} if template else {}
    named = {f"{key}.{name}": ("string", text) for name, text in template.items() if name != "default"}
    usual = template.get("default", next(iter(template.values())))
    names = [name for name in template if name != "default"]
    return {key: ("string", usual), **named, "tokenizer.chat_templates": ("strings", names)}


def _check(tokenizer: PreTrainedTokenizerFast, metadata: Metadata, where: str) -> None:
    """UserError where what was written would not be read back as the same tokenizer."""
    back = build_tokenizer(Reader(GGUF([Path(where)], as_read(metadata), {})))
    for line in PROBE.splitlines(keepends=True):
        text = line.lstrip(" ")
        one, two = tokenizer(text)["input_ids"], back(text)["input_ids"]
        if one != two:
            at = next(i for i, (a, b) in enumerate(zip([*one, -1], [*two, -1], strict=False)) if a != b)
            raise UserError(
                f"{where}: as GGUF the tokenizer would give other ids for {text!r:.60} (from place {at}: "
                f"{two[at : at + 4]} instead of {one[at : at + 4]}). Fix: use another format"
            )
