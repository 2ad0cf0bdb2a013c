"""bitsmith: quantize language models, measure what it cost, serve them.

The five public names are imported on first use, so `import bitsmith` needs neither torch nor a GPU.
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Torch's OpenMP threads go on spinning for milliseconds after a parallel region, on the cores the native kernels' own
# threads need next: 32 sequences a step took 124 ms, 79 with a short spin. Read when libgomp is loaded, so it works
# where bitsmith is imported before torch; what the user has set wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_PUBLIC = {
    "load_model": "models.load",
    "load_tokenizer": "models.load",
    "quantize": "calibrate.driver",
    "LLM": "serve.llm",
    "SamplingParams": "samplers.params",
}
__all__ = ["LLM", "SamplingParams", "__version__", "load_model", "load_tokenizer", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitsmith' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
