"""Random Llamas of known shapes: what speed is measured on. Speed depends on shapes and formats, not on what was learnt.

One decoder layer's weights are drawn once and copied into every layer, each copy in its own memory: a layer shared by all would
sit in the processor's cache and measure nothing. Three engines get the same shape: ours quantized, transformers in bf16, and
llama.cpp from a Q4_0 file whose blocks are random bytes with a fixed scale (`write_gguf`).
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..kernels.dispatch import prepare
from ..kernels.spec import Spec
from ..models.linear import QuantLinear, fuse_siblings

_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; field names as in its config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 4096

    def config(self) -> Any:
        """The transformers configuration of this shape."""
        from transformers import LlamaConfig

        return LlamaConfig(**asdict(self), bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)


SHAPES = {
    # For tests.
    "tiny": Shape(256, 2, 4, 2, 512, 512),
    "135m": Shape(576, 30, 9, 3, 1536, 49152),
    # TinyLlama.
    "1.1b": Shape(2048, 22, 32, 4, 5632, 32000),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),
}


def shape_of(name: str) -> Shape:
    """A named shape. Raises UserError listing those there are."""
    if name not in SHAPES:
        raise UserError(f"{name!r} is neither a model directory nor a shape; the shapes are: {', '.join(SHAPES)}")
    return SHAPES[name]
