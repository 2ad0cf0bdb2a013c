"""A tokenizer from the metadata of a GGUF file, giving the ids that llama.cpp gives.

Byte-level BPE (`gpt2`): vocabulary and merges are in the file, the way text is cut is a name (gguf_pretokenizers.py).
SentencePiece (`llama`): vocabulary and scores are in the file; merges follow from them (every way to put a token
together from two others, best score first). llama.cpp puts the dummy space before every stretch of text that follows
the start or a special token, also before one that begins with a space; so does the normalizer here.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .gguf_config import Metadata
from .gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer

_LOG = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
# Characters. The way from scores to merges takes time in its square.
_LONGEST = 1024
# Token texts that end a completion whatever the metadata says, as in llama.cpp (src/llama-vocab.cpp).
_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"}
    | {"<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"}
    | {"<end_of_utterance>", "<eos>", "<turn|>", "<｜end▁of▁sentence｜>", "[e~["}
)
# In models that have all of these, <|end|> ends a message and not the completion (gpt-oss).
_HARMONY = {"<|return|>", "<|call|>", "<|end|>"}
_ROLES = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens."""

    # tokenizer.ggml.model: "gpt2" or "llama".
    model: str
    tokens: list[str]
    # One of NORMAL ... BYTE each.
    types: list[int]
    scores: list[float]
    merges: list[str]
    # Role ("bos", "eos" ...) -> id.
    ids: dict[str, int]
    pre: str
    add_bos: bool
    add_eos: bool
    add_space: bool


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """UserError for a file without a tokenizer, of a kind not read, or whose arrays do not fit together."""
    model = metadata.get("tokenizer.ggml.model", "string")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama") or not tokens:
        found = f"tokenizer.ggml.model is {model!r}" if tokens else "it has no tokenizer.ggml.tokens"
        raise UserError(
            f"{metadata.where} holds no tokenizer that bitsmith reads: {found}; accepted: gpt2 (byte-level BPE), llama "
            "(SentencePiece). Fix: convert the model with its tokenizer, or pass token ids"
        )
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise metadata.damaged(f"tokenizer.ggml.tokens holds {twice!r} twice")
    if max(map(len, tokens)) > _LONGEST:
        raise metadata.damaged(f"tokenizer.ggml.tokens holds a token of {max(map(len, tokens))} characters")
    types = _numbers(metadata, "token_type", len(tokens), NORMAL)
    scores = _numbers(metadata, "scores", len(tokens), 0.0)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {
        role: metadata.get(f"tokenizer.ggml.{role}_token_id", "uint32", defaults.get(role))
        for role in (*_ROLES, "eot", "eom")
    }
    pre = metadata.get("tokenizer.ggml.pre", "string", "default")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{metadata.where}: tokenizer.ggml.pre is {pre!r}, a way to cut text not known here; accepted: "
            f"{', '.join(PRE_TOKENIZERS)}. Fix: use the model's own tokenizer, or pass token ids"
        )
    return Vocabulary(
        model,
        [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)],
        [int(each) for each in types],
        [float(each) for each in scores],
        metadata.strings("tokenizer.ggml.merges") or [],
        # llama.cpp, too, goes on without a role whose id is beyond the vocabulary.
        {role: found for role, found in ids.items() if found is not None and found < len(tokens)},
        pre,
        metadata.get("tokenizer.ggml.add_bos_token", "bool", model == "llama" or PRE_TOKENIZERS[pre].add_bos),
        metadata.get("tokenizer.ggml.add_eos_token", "bool", False),
        metadata.get("tokenizer.ggml.add_space_prefix", "bool", model == "llama"),
    )


def _numbers(metadata: Metadata, name: str, count: int, default: float) -> Any:
    key = f"tokenizer.ggml.{name}"
    found = metadata.file.metadata.get(key)
    if found is None:
        return [default] * count
    if isinstance(found, list | str | int | float) or len(found) < count:
        raise metadata.damaged(f"metadata key {key} is no array of {count} numbers, one a token")
    return found[:count].tolist()


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers wraps it: encoding, decoding, special tokens, chat template."""
    vocabulary = read_vocabulary(metadata)
    backend = {"gpt2": _byte_level, "llama": _sentence_piece}[vocabulary.model](vocabulary, metadata)
    _add_tokens(backend, vocabulary, metadata)
    backend.post_processor = _template(vocabulary)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {names[r]: vocabulary.tokens[i] for r, i in vocabulary.ids.items() if r in names}
    if vocabulary.model == "gpt2":
        special.pop("unk_token", None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(metadata),
        **special,
    )


def _byte_level(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    pre = PRE_TOKENIZERS[vocabulary.pre]
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = []
    if metadata.strings("tokenizer.ggml.merges") is None:
        raise metadata.damaged("tokenizer.ggml.merges is missing")
    for line in vocabulary.merges:
        at = line.find(" ", 1)
        left, right = (line[:at], line[at + 1 :]) if at > 0 else (line, "")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise metadata.damaged(f"tokenizer.ggml.merges holds {line!r}, whose parts or result are no tokens")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = cutter(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def cutter(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """What cuts text before byte-level BPE merges."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentence_piece(vocabulary: Vocabulary, metadata: Metadata) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.tokens[vocabulary.ids["unknown"]] if "unknown" in vocabulary.ids else None
    merges = merges_of_scores(vocab, vocabulary.scores)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space:
        spaces.insert(0, normalizers.Prepend(SPACE))
        ends.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(ends)
    return backend


def merges_of_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best-scored token first; of two ways to make one, that with the
    shorter left part.
    """
    ranked = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                ranked.append((-scores[index], cut, token))
    ranked.sort()
    return [(token[:cut], token[cut:]) for _, cut, token in ranked]


def _add_tokens(backend: Tokenizer, vocabulary: Vocabulary, metadata: Metadata) -> None:
    """Tokens that are found in the text before anything is cut."""
    # As llama.cpp: nothing in the file says that Phi-3's special tokens swallow the white space after them.
    swallow = any(name in metadata.get("general.name", "string", "").lower() for name in ("phi-3", "phi3"))
    keep = ("<unk>", "<s>", "<|endoftext|>")
    special, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, UNKNOWN) or token in _ENDS:
            special.append(AddedToken(token, normalized=False, special=True, rstrip=swallow and token not in keep))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False, rstrip=swallow))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _template(vocabulary: Vocabulary) -> processors.TemplateProcessing:
    tokens = {role: (vocabulary.tokens[i], i) for role, i in vocabulary.ids.items() if role in ("bos", "eos")}
    before = tokens["bos"][0] + " " if vocabulary.add_bos and "bos" in tokens else ""
    after = " " + tokens["eos"][0] if vocabulary.add_eos and "eos" in tokens else ""
    return processors.TemplateProcessing(
        single=f"{before}$A{after}", pair=f"{before}$A{after} {before}$B:1{after}", special_tokens=list(tokens.values())
    )


def _chat_template(metadata: Metadata) -> str | dict[str, str] | None:
    """The template, or all of them by name where a file has more than one."""
    key = "tokenizer.chat_template"
    named = {k.removeprefix(key + "."): v for k, v in metadata.file.metadata.items() if k.startswith(key + ".")}
    usual = metadata.get(key, "string")
    if named and usual is not None and all(isinstance(each, str) for each in named.values()):
        return {"default": usual, **named}
    return usual


def end_ids(metadata: Metadata) -> list[int] | None:
    """Ids of every token that ends a completion: eos, eot, eom and those llama.cpp knows by their text; None where the
    file has no tokenizer.
    """
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if not tokens:
        eos = metadata.get("tokenizer.ggml.eos_token_id", "uint32")
        return None if eos is None else [eos]
    vocabulary = read_vocabulary(metadata)
    found = {vocabulary.ids[role] for role in ("eos", "eot", "eom") if role in vocabulary.ids}
    by_text = {token: index for index, token in enumerate(vocabulary.tokens) if token in _ENDS}
    if set(by_text) >= _HARMONY:
        del by_text["<|end|>"]
    return sorted(found | set(by_text.values()))
