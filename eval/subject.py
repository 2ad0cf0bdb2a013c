"""What a measured checkpoint is called in results: its base model, spec, method and bits per weight.

Rows of all quantized forms of one model must share its name and say how each was made. Both are read from the
checkpoint: the recipe its dialect detects, and the notes the quantizer leaves in config.json.
"""

from dataclasses import dataclass
from pathlib import Path

from ..models.checkpoint import Checkpoint
from ..models.inspect import inspect_checkpoint
from .results import Result, here

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Subject:
    """The identity of one checkpoint in results; fields as in `Result`."""

    model: str
    spec: str
    method: str
    bpw: float

    def row(self, task: str, metric: str, value: float, stderr: float | None, n: int, seconds: float) -> Result:
        """A result measured now, here, on this checkpoint by a plain forward."""
        identity = {"model": self.model, "spec": self.spec, "method": self.method, "kv": "none"}
        return Result(**here(), **identity, task=task, metric=metric, value=value, stderr=stderr, n=n, seconds=seconds)


def subject(path: str, base: str | None = None) -> Subject:
    """Identify the checkpoint at `path`; `base` names the unquantized model where the command line says which it is."""
    checkpoint = Checkpoint(path)
    recipe, config = checkpoint.recipe, checkpoint.config
    spec = str(recipe.default) if recipe else _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), "f32")
    return Subject(
        model=_name(base or path),
        spec=spec,
        method=recipe.method if recipe else "",
        bpw=float(inspect_checkpoint(path)["bpw"]),
    )


def _name(path: str) -> str:
    """The last part of a directory or hub id."""
    return Path(path).resolve().name if Path(path).exists() else path.rsplit("/", 1)[-1]
