"""What a measured checkpoint is called in results: its base model, spec, method and bits per weight.

Rows of all quantized forms of one model must share its name and say how each was made. Both are read from the
checkpoint: the recipe its dialect detects, and the notes the quantizer leaves in config.json.

A GGUF file is named by its file type ("gguf:q4_k_m"), since its tensors have several specs, and its bits are those of
all its tensors, as llama.cpp counts them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.checkpoint import open_checkpoint
from ..models.gguf_file import read_gguf
from ..models.inspect import inspect_checkpoint
from ..quant_formats.base import Recipe
from ..quant_formats.gguf_rules import MIXTURES
from .results import Result, here

_KLD_ERRORS = {
    "kld_mean": "kld_stderr",
    "kld_median": None,
    "kld_p99": None,
    "kld_max": None,
    "top1_agreement": "top1_stderr",
    "ppl": "ppl_stderr",
    "ppl_base": "ppl_base_stderr",
    "bpw": None,
}

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Subject:
    """The identity of one checkpoint in results; fields as in `Result`."""

    model: str
    spec: str
    method: str
    bpw: float

    def rows(
        self, task: str, found: Mapping[str, Any], errors: Mapping[str, str | None], n: int, seconds: float
    ) -> list[Result]:
        """Results measured now, here, on this checkpoint by a plain forward.

        `errors` names the keys of `found` to keep, each with the key of its standard error or None.
        """
        place, identity = here(), {"model": self.model, "spec": self.spec, "method": self.method, "kv": "none"}
        common = {**place, **identity, "task": task, "n": n, "seconds": round(seconds, 2)}
        return [
            Result(**common, metric=metric, value=float(found[metric]), stderr=None if error is None else found[error])
            for metric, error in errors.items()
        ]

    def kld_rows(self, task: str, found: Mapping[str, Any], seconds: float) -> list[Result]:
        """What `kl_divergence` found, with the bits per weight it was bought for."""
        return self.rows(task, {**found, "bpw": self.bpw}, _KLD_ERRORS, found["tokens"], seconds)


def subject(path: str, base: str | None = None) -> Subject:
    """Identify the checkpoint at `path`; `base` is the path or name of its unquantized model, where that is known."""
    checkpoint = open_checkpoint(path)
    recipe, config = checkpoint.recipe, checkpoint.config
    if recipe and recipe.format == "gguf":
        return _gguf_subject(checkpoint.path, recipe, base)
    spec = str(recipe.default) if recipe else _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), "f32")
    return Subject(
        model=_name(base) if base else str(config.get("bitsmith", {}).get("source", _name(path))),
        spec=spec,
        method=_method(config, recipe),
        bpw=float(inspect_checkpoint(path)["bpw"]),
    )


def _gguf_subject(path: Path, recipe: Recipe, base: str | None) -> Subject:
    """Identify a GGUF file; a file type that it does not say, or that nobody knows, is the spec most weights have."""
    file = read_gguf(path)
    number = file.metadata.get("general.file_type")
    kind = next((f"gguf:{name}" for name, mix in MIXTURES.items() if mix.ftype == number), str(recipe.default))
    stored = sum(info.nbytes for info in file.tensors.values())
    weights = sum(math.prod(info.shape) for info in file.tensors.values())
    return Subject(_name(base or str(path)), kind, recipe.method, round(8 * stored / weights, 4))


def _method(config: Mapping[str, Any], recipe: Recipe | None) -> str:
    """From the notes our quantizer leaves, else the dialect's: other libraries name their format after its method."""
    if recipe is None:
        return ""
    noted = config.get("bitsmith")
    return str(noted.get("method", recipe.method)) if isinstance(noted, Mapping) else recipe.method


def _name(path: str) -> str:
    """The last part of a directory or hub id."""
    return Path(path).resolve().name if Path(path).exists() else path.rsplit("/", 1)[-1]
