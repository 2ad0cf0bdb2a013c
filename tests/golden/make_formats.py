"""Golden vectors for tests/test_formats.py: small weights packed by the libraries that own the formats.

Run once; the result, formats.safetensors, is in the repository:

    pip install hqq==0.2.8.post1 bitsandbytes==0.50.2
    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9     # unpack: they no longer import beside transformers 5
    python make_formats.py AUTO_GPTQ_SITE_DIR AUTOAWQ_SOURCE_DIR

Each case holds `<case>/m.<suffix>` (what the library would save), `<case>/expected` (the float32 weight, or its rows
named in `<case>/rows`), and in the header its quantization_config and the library that made it.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TENSORS: dict[str, Tensor] = {}
ABOUT: dict[str, str] = {}
Config = dict[str, Any]


def keep(case: str, made_by: str, config: Config, tensors: dict[str, Tensor], expected: Tensor, **more: Tensor) -> None:
    for name, tensor in {"expected": expected.float(), **more}.items():
        TENSORS[f"{case}/{name}"] = tensor.detach().clone().contiguous()
    for suffix, tensor in tensors.items():
        TENSORS[f"{case}/m.{suffix}"] = tensor.detach().clone().contiguous()
    ABOUT[case] = json.dumps({"made_by": made_by, "config": config})


def module_from(path: Path, **stubs: Any) -> types.ModuleType:
    """A source file on its own, with the modules it wants from its package replaced."""
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def affine(n: int, k: int, g: int, bits: int, lowest_zero: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A float32 linear that lies on an affine grid, its scales and zeros [n, k/g], and the group of each input."""
    scales = (torch.rand(n, k // g) * 0.02 + 0.01).half().float()
    zeros = torch.randint(lowest_zero, 1 << bits, (n, k // g)).float()
    codes = torch.randint(0, 1 << bits, (n, k)).float()
    groups = torch.arange(k) // g
    linear = nn.Linear(k, n, bias=False)
    linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
    return linear, scales, zeros, groups


def gptq(site: Path) -> None:
    source = module_from(site / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    for case, bits, n, k, g, act_order in (
        ("gptq-w2g32", 2, 32, 64, 32, False),
        ("gptq-w3g16-actorder", 3, 32, 64, 16, True),
        ("gptq-w8g32", 8, 32, 32, 32, False),
    ):
        # AutoGPTQ cannot store a zero point of 0.
        linear, scales, zeros, groups = affine(n, k, g, bits, lowest_zero=1)
        if act_order:
            groups = groups[torch.randperm(k)]
            codes = torch.randint(0, 1 << bits, (n, k)).float()
            linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
        expected = linear.weight.data.clone()
        layer = source.QuantLinear(bits, g, k, n, bias=False)
        layer.pack(linear, scales, zeros.clone(), groups.int())
        state = dict(layer.state_dict())
        state["scales"] = state["scales"].half()
        config = {"quant_method": "gptq", "bits": bits, "group_size": g, "sym": False, "desc_act": act_order}
        keep(case, "auto-gptq 0.7.1", config, state, expected)


def awq(source: Path) -> None:
    utils = types.ModuleType("awq.utils.module")
    utils.try_import = lambda name: (None, "")  # type: ignore[attr-defined]
    stubs = {"awq": types.ModuleType("awq"), "awq.utils": types.ModuleType("awq.utils"), "awq.utils.module": utils}
    for version, file, name in (
        ("gemv", "gemv.py", "WQLinear_GEMV"),
        ("gemv_fast", "gemv_fast.py", "WQLinear_GEMVFast"),
    ):
        layers = module_from(source / "awq/modules/linear" / file, **stubs)
        for g, k in ((64, 192), (32, 64)):
            linear, scales, zeros, _ = affine(8, k, g, 4, lowest_zero=0)
            linear.weight.data = linear.weight.data.half()
            exact = linear.weight.data.float()
            layer = getattr(layers, name).from_linear(linear, 4, g, scales=scales.half(), zeros=zeros.half())
            state = layer.state_dict()
            wide = scales.repeat_interleave(g, 1)
            codes = (exact / wide + zeros.repeat_interleave(g, 1)).round()
            if version == "gemv":
                expected = (codes - zeros.repeat_interleave(g, 1)) * wide
            else:
                shift = state["qzeros"].T[:, : k // g].float()
                expected = codes * wide + shift.repeat_interleave(g, 1)
            config = {"quant_method": "awq", "bits": 4, "group_size": g, "zero_point": True, "version": version}
            keep(f"awq-{version}-g{g}", "autoawq 0.2.9", config, state, expected)


def hqq() -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    cases = [(bits, axis, 16, (8, 32), False) for bits in (1, 2, 3, 4, 5, 6, 8) for axis in (0, 1)]
    cases += [(4, 1, 16, (8, 172), False), (3, 0, 8, (5, 24), False), (4, 1, 16, (8, 32), True)]
    for bits, axis, group, (n, k), as_float in cases:
        linear = nn.Linear(k, n, bias=False)
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=as_float)
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        wide = {**layer.meta, "compute_dtype": torch.float32}
        wide |= {name: layer.meta[name].float() for name in ("scale", "zero")}
        expected = Quantizer.dequantize(layer.W_q.data, wide)
        name = f"hqq-w{bits}g{group}-axis{axis}" + ("-float" if as_float else "") + (f"-k{k}" if k != 32 else "")
        content = {"quant_method": "hqq", "quant_config": config, "skip_modules": []}
        keep(name, "hqq 0.2.8.post1", content, layer.state_dict(), expected)


def bitsandbytes() -> None:
    from bitsandbytes import functional

    for case, table, double, block, (n, k), storage in (
        ("nf4", "nf4", False, 64, (5, 172), "uint8"),
        ("nf4-odd", "nf4", False, 64, (3, 33), "uint8"),
        ("nf4-dq", "nf4", True, 64, (97, 172), "uint8"),
        ("fp4-dq-bf16", "fp4", True, 128, (4, 128), "bfloat16"),
    ):
        weight = torch.randn(n, k) * 0.02
        packed, state = functional.quantize_4bit(
            weight, blocksize=block, quant_type=table, compress_statistics=double, quant_storage=getattr(torch, storage)
        )
        tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected = functional.dequantize_4bit(packed, state)
        rows = torch.arange(n) if n < 10 else torch.tensor([0, n // 2, n - 1])
        config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": table,
            "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": storage,
        }  # fmt: skip
        keep(f"bnb-{case}", "bitsandbytes 0.50.2", config, tensors, expected[rows], rows=rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    gptq(Path(sys.argv[1]))
    awq(Path(sys.argv[2]))
    hqq()
    bitsandbytes()
    save_file(TENSORS, Path(__file__).with_name("formats.safetensors"), metadata=ABOUT)
