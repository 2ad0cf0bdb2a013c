"""Runs under the python of the libraries that define the formats (tests/interop/requirements.txt), never under ours.

    python peers.py JOBS.json

JOBS.json is a list of {"do", "out", ...}. What is read and computed is in `JOBS` below; a job writes `out` with

    load_*      safetensors: logits float32 [B, T, V]; "<module>" [N, K], the weight that module multiplies with,
                read off by feeding it the identity; metadata: dtype, classes, versions
    quantize_*  a checkpoint directory, and `out`.json with the seconds it took
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Job = dict[str, Any]


def load_gptqmodel(job: Job) -> Any:
    """GPTQ and AWQ: the plain torch kernel, which needs no compiler and multiplies with fp16 weights as decoded."""
    from gptqmodel import BACKEND, GPTQModel

    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[job["format"]]
    return GPTQModel.load(job["path"], device="cpu", dtype=torch.float16, backend=backend).model


def load_transformers(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=dtype, device_map="cpu")
    # What is not quantized keeps the dtype it is stored in. bitsandbytes computes in what the config says, and on some
    # processors with weights repacked for bfloat16.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.support_avx512bf16_for_cpu = dtype, False
    return model


def load_hqq(job: Job) -> Any:
    """HQQ's own form, by its own loader."""
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel.from_quantized(job["path"], compute_dtype=torch.float32, device="cpu")


def load_hqq_hf(job: Job) -> Any:
    """HQQ's transformers form as transformers 4.57 read it (5.x cannot): every module's tensors handed to HQQLinear."""
    from accelerate import init_empty_weights
    from hqq.core.quantize import HQQLinear
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job["path"])
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(Path(job["path"]) / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        states.setdefault(module, {})[leaf] = tensor
    for path, state in states.items():
        if "W_q" in state:
            layer = HQQLinear(linear_layer=None, quant_config=None, compute_dtype=torch.float32, device="cpu")
            layer.load_state_dict(state)
            model.set_submodule(path, layer)
        else:
            for leaf, tensor in state.items():
                setattr(model.get_submodule(path), leaf, torch.nn.Parameter(tensor.float(), requires_grad=False))
    model.tie_weights()
    return model


def quantize_gptqmodel(job: Job) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(offload_to_disk=False, **job["config"])
    model = GPTQModel.load(job["path"], config, device="cpu", dtype=torch.float16)
    rows = load_file(job["ids"])["ids"]
    calibration = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    model.quantize(calibration, batch_size=8)
    model.save(job["out"])


def quantize_hqq(job: Job) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float16)
    config = BaseQuantizeConfig(**job["config"])
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_quantized(model, job["out"])


JOBS: dict[str, Callable[[Job], Any]] = {
    function.__name__: function
    for function in (
        load_gptqmodel, load_transformers, load_hqq, load_hqq_hf, quantize_gptqmodel, quantize_hqq,
    )
}  # fmt: skip


@torch.no_grad()
def report(model: Any, job: Job) -> None:
    """Logits on the tensor `ids` of the file job["ids"], and the weights of job["modules"]."""
    ids = load_file(job["ids"])["ids"]
    found = {"logits": model(ids).logits.float().contiguous()}
    with safe_open(job["ids"], "pt") as file:
        names = json.loads(file.metadata()["modules"])
    dtype = model.get_input_embeddings().weight.dtype
    for name in names:
        layer = model.get_submodule(name)
        found[name] = layer(torch.eye(layer.in_features, dtype=dtype)).T.contiguous()
    classes = sorted({type(model.get_submodule(name)).__name__ for name in names})
    facts = {"dtype": str(dtype).removeprefix("torch."), "classes": ", ".join(classes)}
    save_file(found, job["out"], metadata=facts)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        started = time.monotonic()
        made = JOBS[job["do"]](job)
        seconds = time.monotonic() - started
        if made is not None:
            report(made, job)
        else:
            libraries = {name: version(name) for name in ("torch", "transformers", "gptqmodel", "hqq")}
            facts = {"seconds": seconds, "threads": torch.get_num_threads(), "versions": libraries}
            Path(job["out"] + ".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
