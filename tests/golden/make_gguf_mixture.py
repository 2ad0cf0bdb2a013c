"""gguf_mixture.json for tests/test_gguf_mixture.py: the tensor types that llama.cpp gives small models.

    pip install llama-cpp-python==0.3.36; python make_gguf_mixture.py

One letter a tensor (`types` says which), in the order of gguf_models.tensors; null where llama.cpp refuses because it
wants an importance matrix or has no type for the shape.
"""

import json
import sys
import tempfile
from pathlib import Path

from bitsmith.quant_formats.gguf_rules import MIXTURES

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from gguf_models import llama_quantize, tensors, write, write_imatrix  # noqa: E402

CASES = ("llama-gqa4", "llama-odd", "mixtral", "phi3", "gemma2", "falcon")
# The two file types that are not llama.cpp's.
OURS = ("mxfp4", "nvfp4")

if __name__ == "__main__":
    letters: dict[str, str] = {}
    maps: dict[str, dict[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for case in CASES:
            write(case, work / "src.gguf")
            write_imatrix(case, work / "imatrix.npz")
            names = [n for n in MIXTURES if n not in OURS]
            base = [{"src": str(work / "src.gguf"), "dst": str(work / "x"), "ftype": MIXTURES[n].ftype} for n in names]
            with_imatrix = [{**job, "imatrix": str(work / "imatrix.npz")} for job in base]
            keys = [*names, *(f"{n} imatrix" for n in names)]
            maps[case] = {}
            for key, found in zip(keys, llama_quantize([*base, *with_imatrix]), strict=True):
                row = found and [letters.setdefault(found[t], chr(65 + len(letters))) for t, _ in tensors(case)]
                maps[case][key] = "".join(row) if row else None
    content = {
        "made_by": "llama-cpp-python 0.3.36",
        "types": {letter: kind for kind, letter in letters.items()},
        "maps": maps,
    }
    (HERE / "gguf_mixture.json").write_text(json.dumps(content, indent=1) + "\n")
