"""A checkpoint written as one GGUF file: plan, metadata, tokenizer and tensors together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import AnyCheckpoint
from .gguf_metadata import metadata_of
from .gguf_plan import Planned, pieces, plan
from .gguf_vocab import vocabulary_metadata
from .gguf_write import DENSE, Entry, Metadata, write

# (tensor, ggml type) -> its rows as `gguf_write.write` takes them.
Rows = Callable[[Planned, str], Iterable[Tensor]]


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its tensors' contents."""

    metadata: Metadata
    tensors: tuple[Planned, ...]
    # ggml type by tensor; F32 where there is none.
    types: Mapping[str, str]


def header(source: AnyCheckpoint, tokenizer: Any, types: Mapping[str, str], file_type: int) -> Header:
    """`types` gives the ggml type of each tensor by its GGUF name, `file_type` is llama.cpp's number of the whole
    (LLAMA_FTYPE), `tokenizer` is transformers' or None for a file without one.

    UserError where GGUF cannot say what the model is (gguf_metadata.py, gguf_vocab.py).
    """
    arch, planned = plan(source)
    metadata = {
        **metadata_of(source, arch, planned, file_type, source.path.resolve().stem),
        **vocabulary_metadata(tokenizer, source.pretrained_config().vocab_size, str(source.config_file)),
    }
    return Header(metadata, tuple(planned), types)


def export(head: Header, source: AnyCheckpoint, path: Path, rows: Rows) -> int:
    """Write the file; returns its bytes. `rows` packs the tensors of block types; numbers come from `source` here."""
    by_name = {each.name: each for each in head.tensors}
    entries = [Entry(each.name, each.shape, head.types.get(each.name, "F32")) for each in head.tensors]

    def content(entry: Entry) -> Iterable[Tensor]:
        each = by_name[entry.name]
        return pieces(each, source) if entry.type_name in DENSE else rows(each, entry.type_name)

    return write(path, head.metadata, entries, content)
