"""A checkpoint written as one GGUF file: plan, metadata, tokenizer and tensors together."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import AnyCheckpoint
from .gguf_metadata import metadata_of
from .gguf_plan import Planned, pieces, plan
from .gguf_vocab import vocabulary_metadata
from .gguf_write import DENSE, Entry, write

# (tensor, ggml type) -> its rows as `gguf_write.write` takes them.
Rows = Callable[[Planned, str], Iterable[Tensor]]


def export(
    source: AnyCheckpoint, tokenizer: Any, path: Path, types: Mapping[str, str], file_type: int, rows: Rows
) -> int:
    """Write `source` to `path`; returns the bytes of the file.

    `types` gives the ggml type of each tensor by its GGUF name (F32 where it says nothing), `file_type` is llama.cpp's
    number of the whole (LLAMA_FTYPE), `tokenizer` is transformers' or None for a file without one. `rows` packs the
    tensors of block types; numbers come from the source here. UserError where GGUF cannot say what the model is
    (gguf_metadata.py, gguf_vocab.py), before anything is written.
    """
    arch, planned = plan(source)
    where = str(source.config_file)
    metadata = {
        **metadata_of(source, arch, planned, file_type, source.path.resolve().stem),
        **vocabulary_metadata(tokenizer, source.pretrained_config().vocab_size, where),
    }
    by_name = {each.name: each for each in planned}
    entries = [Entry(each.name, each.shape, types.get(each.name, "F32")) for each in planned]

    def content(entry: Entry) -> Iterable[Tensor]:
        each = by_name[entry.name]
        return pieces(each, source) if entry.type_name in DENSE else rows(each, entry.type_name)

    return write(path, metadata, entries, content)
