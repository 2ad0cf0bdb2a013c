"""bitsmith: quantize language models, measure what it cost, serve them.

The five public names are imported on first use, so `import bitsmith` needs neither torch nor a GPU.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

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
