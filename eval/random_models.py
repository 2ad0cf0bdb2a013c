"""Random Llamas of known shapes: what speed is measured on. Speed depends on shapes and formats, not on what was
learnt.

Three engines get the same shape: ours a quantized checkpoint (`write_checkpoint`), llama.cpp a GGUF file
(`write_gguf`), and transformers a bf16 model made from `Shape.config`. One decoder layer is drawn and written for every
layer; each has its own bytes in the file and in memory, so the processor's cache gains nothing from the repetition.

The GGUF file has the mixture that llama-quantize gives a Llama (`MIXTURES`). Its blocks are random codes under one
fixed scale, so no quantizer is needed. Our output head is quantized too, to 8 bits by default: at batch 1 a bf16 head
would be a sixth of the bytes read per token.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..kernels.families import family, spread
from ..kernels.grid import Params
from ..kernels.qtensor import QTensor, build, to_matrix
from ..kernels.spec import Spec
from ..quant_formats import gptq
from ..quant_formats.base import Options

# Of normally distributed weights, as most models are initialised.
_STD = 0.02
LLAMA_FIX = "install it with `pip install llama-cpp-python gguf`, or leave llama.cpp out of --against"
# File type -> ggml type of most weights, of the output head, and of what gets more bits in half of the layers.
MIXTURES = {
    "Q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
}
_FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7}
_MORE_BITS = ("attn_v", "ffn_down")
# ggml type -> weights a block, bytes a block. Q4_0: f16 scale, 16 bytes of codes. Q8_0: f16 scale, 32 codes. Q4_K: f16
# scale and minimum, 12 bytes of 6-bit sub-scales, 128 of codes. Q6_K: 192 bytes of codes, 16 int8 sub-scales, f16
# scale.
_BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
_SPECIAL = ("<unk>", "<s>", "</s>")


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

        return LlamaConfig(**asdict(self), bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype="bfloat16")

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a decoder layer's linears by their transformers path."""
        hidden, ff = self.hidden_size, self.intermediate_size
        kv = self.num_key_value_heads * hidden // self.num_attention_heads
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        mlp = {"gate": (ff, hidden), "up": (ff, hidden), "down": (hidden, ff)}
        return {f"self_attn.{k}_proj": v for k, v in attention.items()} | {f"mlp.{k}_proj": v for k, v in mlp.items()}


SHAPES = {
    # For tests.
    "tiny": Shape(256, 2, 4, 2, 512, 512),
    # TinyLlama.
    "1.1b": Shape(2048, 22, 32, 4, 5632, 32000),
    # Llama 3.
    "8b": Shape(4096, 32, 32, 8, 14336, 128256),
}


def shape_of(name: str) -> Shape:
    """The shape of that name, or of the Llama whose config.json is in the directory `name`.

    Raises UserError where there is neither, and for a model of another architecture.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise UserError(f"{name!r} is neither a model directory nor a shape; the shapes are: {', '.join(SHAPES)}")
    config = json.loads(path.read_text())
    if config.get("model_type") != "llama":
        raise UserError(
            f"{path}: model_type is {config.get('model_type')!r}; peers are built "
            "for llama only: pass --against none, or a shape"
        )
    return Shape(**{field: config[field] for field in asdict(SHAPES["tiny"])})


def write_checkpoint(shape: Shape, directory: Path, bits: int, group_size: int, head_bits: int) -> Spec:
    """Write a random GPTQ-layout checkpoint of `shape`, rounded to nearest, with a dummy tokenizer; returns its spec.

    Raises UserError where the layout cannot hold these bits, or the group size does not divide the shape.
    """
    recipe = gptq.recipe(Options("gptq", bits, group_size))
    recipe = recipe.with_rules((("lm_head", replace(gptq.recipe(Options("gptq", head_bits, group_size)).default)),))
    spec = recipe.default
    for name, size in {**shape.linears(), "lm_head": (shape.vocab_size, shape.hidden_size)}.items():
        if problem := gptq.check(spec, size):
            raise UserError(f"{name} of this shape: {problem}")
    directory.mkdir(parents=True, exist_ok=True)
    layer = {name: gptq.save(_rounded(size, spec), recipe) for name, size in shape.linears().items()}
    head = recipe.spec("lm_head")
    assert head is not None
    tensors = dict(_prefixed("lm_head", gptq.save(_rounded((shape.vocab_size, shape.hidden_size), head), recipe)))
    norm = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = (torch.randn(shape.vocab_size, shape.hidden_size) * _STD).bfloat16()
    tensors["model.norm.weight"] = norm
    save_file(tensors, directory / "model-outer.safetensors", metadata={"format": "pt"})
    for index in range(shape.num_hidden_layers):
        prefix = f"model.layers.{index}"
        inner = {f"{prefix}.{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
        inner = {name: tensor.clone() for name, tensor in inner.items()}
        for name, parts in layer.items():
            inner |= _prefixed(f"{prefix}.{name}", parts)
        save_file(inner, directory / f"model-layer{index:03}.safetensors", metadata={"format": "pt"})
    config = shape.config().to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": gptq.config(recipe),
    }
    (directory / "config.json").write_text(json.dumps(config, default=str))
    _write_tokenizer(shape.vocab_size, directory)
    return spec


def _rounded(shape: tuple[int, int], spec: Spec) -> QTensor:
    grid = family(spec).grid
    matrix = to_matrix(torch.randn(shape) * _STD, spec)
    params = grid.fit(matrix, spec)
    size = (matrix.shape[0], matrix.shape[1])
    zero = None if params.zero is None else spread(params.zero, spec, size)
    codes, _ = grid.nearest(matrix, spec, Params(spread(params.scale, spec, size), zero))
    return build(codes, params, spec, shape)


def _prefixed(module: str, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{module}.{suffix}", tensor) for suffix, tensor in parts.items())


def _write_tokenizer(vocabulary: int, directory: Path) -> None:
    """One word per id: unk, bos, eos, then w3, w4 ... separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: index for index, token in enumerate(_SPECIAL)}
    words |= {f"w{index}": index for index in range(len(_SPECIAL), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unk, bos, eos = _SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos)
    fast.save_pretrained(directory)


def write_gguf(shape: Shape, path: Path, kind: str = "Q4_0") -> None:
    """Write a random Llama of `shape` and of a file type of MIXTURES that llama.cpp loads. UserError where gguf is not
    installed, the type is unknown or a size has no blocks.

    One layer's blocks are drawn once and written for every layer.
    """
    if kind not in MIXTURES:
        raise UserError(f"--gguf-type {kind!r} is not known; accepted: {', '.join(MIXTURES)}")
    body, top, more = MIXTURES[kind]
    try:
        import gguf
    except ImportError:
        raise UserError(f"the file for llama.cpp is written with gguf, not installed: {LLAMA_FIX}") from None
    blocks = max(_BLOCKS[body][0], _BLOCKS[top][0]), max(_BLOCKS[body][0], _BLOCKS[more][0])
    if shape.hidden_size % blocks[0] or shape.intermediate_size % blocks[1]:
        raise UserError(
            f"llama.cpp's {kind} mixture needs hidden_size to divide by {blocks[0]} and intermediate_size by "
            f"{blocks[1]}, found {shape.hidden_size} and {shape.intermediate_size}: leave llama.cpp out of --against, "
            "or take shape 1.1b"
        )
    head = shape.hidden_size // shape.num_attention_heads
    hidden, kv, ff = shape.hidden_size, shape.num_key_value_heads * head, shape.intermediate_size
    rng = np.random.default_rng(0)
    sizes = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (ff, hidden),
        "ffn_up": (ff, hidden),
        "ffn_down": (hidden, ff),
    }
    layer = {name: _blocks(rng, *size, body) for name, size in sizes.items()}
    better = {name: _blocks(rng, *sizes[name], more) for name in _MORE_BITS}
    types = {name: gguf.GGMLQuantizationType[name] for name in _BLOCKS}
    norm = np.ones(hidden, np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    _header(writer, shape, kind)
    writer.add_tensor("token_embd.weight", _blocks(rng, shape.vocab_size, hidden, body), raw_dtype=types[body])
    for index in range(shape.num_hidden_layers):
        for name in sizes:
            improved = name in better and index % 2 == 0
            data = better[name] if improved else layer[name]
            writer.add_tensor(f"blk.{index}.{name}.weight", data, raw_dtype=types[more if improved else body])
        writer.add_tensor(f"blk.{index}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.add_tensor("output.weight", _blocks(rng, shape.vocab_size, hidden, top), raw_dtype=types[top])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(rng: np.random.Generator, rows: int, columns: int, name: str) -> np.ndarray:
    """Random blocks, uint8 [rows, bytes], whose weights have a standard deviation near 0.02."""
    weights, size = _BLOCKS[name]
    blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    # Uniform codes of b bits have a standard deviation of 2**b / sqrt(12).
    if name == "Q4_0":
        blocks[:, :2] = np.array([0.02 / 4.6], np.float16).view(np.uint8)
    elif name == "Q8_0":
        blocks[:, :2] = np.array([0.02 / 73.9], np.float16).view(np.uint8)
    elif name == "Q4_K":
        # Sub-scales and minima are random 6-bit numbers, 32 on average; 7.5 of them centre the codes.
        blocks[:, :4] = np.array([0.02 / 4.6 / 32, 0.02 / 4.6 / 32 * 7.5], np.float16).view(np.uint8)
    else:
        blocks[:, 192:208] = 1
        blocks[:, 208:] = np.array([0.02 / 18.5], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _header(writer: Any, shape: Shape, kind: str) -> None:
    """Hyperparameters and a dummy SentencePiece vocabulary: unk, bos, eos, the bytes, then words."""
    words = shape.vocab_size - 259
    writer.add_quantization_version(2)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"▁w{i}" for i in range(words))]
    )
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(words)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
