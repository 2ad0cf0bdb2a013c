"""Fixtures every test file may use."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
import yaml
from bitsmith.kernels import pages
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from bitsmith.serve.llm import LLM
    from bitsmith.serve.runner import Work

HERE = Path(__file__).parent
SHARED = Path(__file__).resolve().parents[1].parent / "shared"
# The same examples in every run: a red test is then about the change. `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write results/support.jsonl from tests/support.yaml")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --write-support: one row per claim, all of whose tests ran and passed."""
    if not session.config.getoption("--write-support"):
        return
    from bitsmith.eval.results import Result, append, here

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = {kind: reporter.stats.get(kind, []) for kind in ("passed", "failed", "error")}
    rows = []
    for row in yaml.safe_load((HERE / "support.yaml").read_text()):
        count = {
            kind: sum(any(f"tests/{t}" in r.nodeid for t in row["tests"]) for r in found)
            for kind, found in reports.items()
        }
        if count["passed"] and not count["failed"] and not count["error"]:
            fields = here() | {
                "model": "",
                "spec": "",
                "kv": "none",
                "task": f"support/{row['area']}",
                "metric": row["claim"],
            }
            rows.append(Result(**fields, value=count["passed"], stderr=None, n=count["passed"], seconds=0.0))
    target = HERE.parent / "results" / "support.jsonl"
    target.unlink(missing_ok=True)
    append(target, rows)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN, 0x55 or 0xFF, so an output left unwritten shows."""
    # What `with torch.device` redirects torch collects at first use, for good: not the function below.
    with torch.device("cpu"):
        torch.empty(0)
    real = torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        found = real(*size, **options)
        return found.fill_(float("nan")) if found.dtype.is_floating_point else found.fill_(0x55)

    monkeypatch.setattr(torch, "empty", empty)
    piece = pages._take

    def take(size: int) -> tuple[Any, int]:
        memory, offset = piece(size)
        memory[offset : offset + size] = bytes([0xFF]) * size
        return memory, offset

    monkeypatch.setattr(pages, "_take", take)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("models/books-8m")` is that path of the material beside the checkout, or a skip with the reason."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"{path} is absent: this test needs the shared material beside the checkout")
        return path

    return find


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Attention of every kind that is served: plain, q/k norms, windows, soft caps, fused projections, sinks, experts.
_TINY: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 32},
    "Mistral": {"sliding_window": 8, "head_dim": 16},
    "Gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 20,
    },
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "Bloom": {},
    "Mamba": {},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., transformers.PreTrainedModel]":
    """`tiny_model("Gemma2", **config)` builds a two-layer float32 model over the byte tokenizer's vocabulary.

    Always the same one. Weights are larger than an initialisation's, so that mistakes in attention change the tokens.
    """

    def build(name: str, **config: Any) -> "transformers.PreTrainedModel":
        common = {
            "vocab_size": 257,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 256,
        }
        made = getattr(transformers, f"{name}Config")(**{**common, **_TINY[name], **config})
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.1 * noise if "norm" in name else 0.3 * noise
        return model.eval()

    return build


@pytest.fixture(scope="session")
def byte_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """One token per byte, ids 0 to 255, and <eos>: the worst case for characters and stop strings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="session")
def bpe_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """The bytes, <eos> (256) and tokens of several letters, some of which begin others: t, th, the, a space before."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ġthe", "r"), ("t", "h"), ("th", "e"), ("i", "n"), ("in", "g")]
    pieces = [*alphabet, "<eos>", *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def make_llm(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> "Callable[..., LLM]":
    """`make_llm()` is an LLM over a tiny Llama; `make_llm("text")` one that says this text, then eos, to every prompt.

    With `permits`, each of its steps takes one.
    """

    sizes = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 4, "num_blocks": 64}

    def make(says: str | None = None, permits: threading.Semaphore | None = None, **options: Any) -> "LLM":
        from bitsmith.serve.llm import LLM

        llm = LLM(tiny_model("Llama"), byte_tokenizer, **{**sizes, **options})
        if says is not None:
            script = [*byte_tokenizer.encode(says), byte_tokenizer.eos_token_id]

            def run(work: "Sequence[Work]") -> torch.Tensor:
                assert permits is None or permits.acquire(timeout=10), "the test gave no permit"
                said = torch.tensor([script[min(seq.num_output, len(script) - 1)] for seq, _ in work])
                return torch.nn.functional.one_hot(said, 257) * 20.0

            llm.engine.runner.run = run
        return llm

    return make
