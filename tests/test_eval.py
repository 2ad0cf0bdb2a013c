"""Perplexity and KL divergence against independent definitions; texts; the commands."""

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsmith.cli import eval as eval_command
from bitsmith.errors import UserError
from bitsmith.eval.kld import check_same_tokens, kl_divergence
from bitsmith.eval.ppl import default_ctx, perplexity, token_nll
from bitsmith.eval.results import read
from bitsmith.eval.text import bos_of, load_text, tokenize, windows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, POSITIONS = 50, 32


def tiny(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(1)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny(2)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (203,), generator=torch.Generator().manual_seed(3))


def log_probs(model: Any, tokens: list[int]) -> np.ndarray:
    """float64 [T, V], by the definition: one sequence, no slicing, no batching."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def half_windows(ids: torch.Tensor, ctx: int, bos: int | None) -> list[tuple[list[int], list[int], list[int]]]:
    """(what is read, scored positions, correct next tokens) of llama.cpp's protocol, in plain Python."""
    tokens, found = ids.tolist(), []
    for start in range(0, len(tokens) - ctx + 1, ctx):
        chunk = tokens[start : start + ctx]
        positions = list(range(ctx // 2, ctx - 1))
        seen = chunk if bos is None else [bos, *chunk[1:]]
        found.append((seen, positions, [chunk[p + 1] for p in positions]))
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_windows_perplexity_is_the_plain_loop(model: Any, ids: torch.Tensor, batch: int) -> None:
    found = perplexity(model, ids, ctx=16, batch=batch)
    nll = []
    for start in range(0, 12 * 16, 16):
        window = ids[start : start + 16].tolist()
        lp = log_probs(model, window)
        nll += [-lp[i, window[i + 1]] for i in range(15)]
    values = np.array(nll)
    assert found["tokens"] == len(values) == 12 * 15
    assert found["nll"] == pytest.approx(values.mean(), rel=1e-6)
    assert found["ppl"] == pytest.approx(math.exp(values.mean()), rel=1e-6)
    error = math.sqrt(((values**2).mean() - values.mean() ** 2) / (len(values) - 1))
    assert found["stderr"] == pytest.approx(found["ppl"] * error, rel=1e-6)
    assert (found["ctx"], found["protocol"]) == (16, "windows")


@pytest.mark.parametrize(("ctx", "bos"), [(16, 7), (16, None), (15, 7)])
def test_llamacpp_perplexity_scores_the_second_half(model: Any, ids: torch.Tensor, ctx: int, bos: int | None) -> None:
    found = perplexity(model, ids, ctx=ctx, protocol="llamacpp", bos=bos)
    nll = []
    for seen, positions, correct in half_windows(ids, ctx, bos):
        lp = log_probs(model, seen)
        nll += [-lp[p, token] for p, token in zip(positions, correct, strict=True)]
    assert found["tokens"] == len(nll) == 203 // ctx * (ctx - 1 - ctx // 2)
    assert found["ppl"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)


def test_max_tokens_keeps_whole_windows(model: Any, ids: torch.Tensor) -> None:
    found = perplexity(model, ids, ctx=16, max_tokens=40)
    assert found["ppl"] == perplexity(model, ids[:32], ctx=16)["ppl"]
    assert found["tokens"] == 2 * 15


def test_kld_is_its_definition(model: Any, base: Any, ids: torch.Tensor) -> None:
    found = kl_divergence(model, base, ids, ctx=16, bos=7, batch=2)
    kld, change, same, nll, nll_base = [], [], [], [], []
    for seen, positions, correct in half_windows(ids, 16, 7):
        p, b = log_probs(model, seen), log_probs(base, seen)
        for at, token in zip(positions, correct, strict=True):
            kld.append((np.exp(b[at]) * (b[at] - p[at])).sum())
            change.append(np.exp(p[at, token]) - np.exp(b[at, token]))
            same.append(p[at].argmax() == b[at].argmax())
            nll.append(-p[at, token])
            nll_base.append(-b[at, token])
    n, values = len(kld), np.array(kld)
    assert found["tokens"] == n == 12 * 7
    assert found["kld_mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert found["kld_stderr"] == pytest.approx(values.std() / math.sqrt(n - 1), rel=1e-6)
    for name, fraction in (("min", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)):
        assert found[f"kld_{name}"] == pytest.approx(percentile(kld, fraction), rel=1e-6), name
    assert found["top1_agreement"] == pytest.approx(np.mean(same))
    assert 0 < found["top1_agreement"] < 1
    assert found["dp_mean"] == pytest.approx(np.mean(change), rel=1e-5)
    assert found["dp_rms"] == pytest.approx(math.sqrt(np.mean(np.square(change))), rel=1e-6)
    assert found["ppl"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert found["ppl_base"] == pytest.approx(math.exp(np.mean(nll_base)), rel=1e-6)
    assert found["ln_ratio"] == pytest.approx(np.mean(nll) - np.mean(nll_base), rel=1e-5)
    # The error of a difference of paired samples, computed from the differences themselves.
    paired = np.array(nll) - np.array(nll_base)
    assert found["ln_ratio_stderr"] == pytest.approx(paired.std() / math.sqrt(n - 1), rel=1e-6)
    assert found["cor"] == pytest.approx(np.corrcoef(nll, nll_base)[0, 1], rel=1e-6)


def percentile(values: list[float], fraction: float) -> float:
    """Linear interpolation at fraction * (n - 1), as llama-perplexity prints."""
    ordered, at = sorted(values), fraction * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - (at - low)) + ordered[high] * (at - low)


def test_kld_of_a_model_with_itself_is_exactly_zero(model: Any, ids: torch.Tensor) -> None:
    found = kl_divergence(model, model, ids, ctx=16)
    assert (found["kld_mean"], found["kld_max"], found["kld_min"], found["dp_rms"], found["ln_ratio"]) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert found["top1_agreement"] == 1


def test_kld_grows_with_the_noise(model: Any, ids: torch.Tensor) -> None:
    found = []
    for noise in (0.001, 0.01, 0.1):
        other = tiny(1)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += noise * torch.randn_like(parameter)
        found.append(kl_divergence(other, model, ids, ctx=16)["kld_mean"])
    assert 0 < found[0] < found[1] / 10 < found[2] / 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ctx": 64}, "--ctx 64 exceeds the 32 positions of the model: pass --ctx 32 or less"),
        ({"ctx": 16, "protocol": "strided"}, "unknown protocol 'strided'; accepted: windows, llamacpp"),
        (
            {"ctx": 2, "protocol": "llamacpp"},
            "--ctx 2 scores no token under the llamacpp protocol: pass --ctx 3 or more",
        ),
        ({"ctx": 1}, "--ctx 1 scores no token"),
        (
            {"ctx": 16, "max_tokens": 15},
            "--max-tokens 15 is less than one window of 16 tokens: raise it or lower --ctx",
        ),
    ],
)
def test_bad_windows_are_refused(model: Any, ids: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        perplexity(model, ids, **arguments)
    assert message in str(caught.value)


def test_short_text_says_how_long_it_is(model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(
        UserError, match=r"the text has 10 tokens, less than one window of 16: pass --ctx 10 or more text"
    ):
        perplexity(model, ids[:10], ctx=16)


def test_default_ctx_fits_model_text_and_limit(model: Any, ids: torch.Tensor) -> None:
    assert default_ctx(model, ids, 2048, None) == POSITIONS
    assert default_ctx(model, ids, 16, None) == 16
    assert default_ctx(model, ids[:20], 2048, None) == 20
    assert default_ctx(model, ids, 2048, 10) == 10


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = torch.zeros(4, 5)
    logits[2, 1] = float("nan")
    with pytest.raises(UserError, match=r"not finite \(scored token 2 of a window\).*load it in float32"):
        token_nll(logits, torch.zeros(4, dtype=torch.long))


def test_models_over_other_vocabularies_are_refused(model: Any, ids: torch.Tensor) -> None:
    other = LlamaForCausalLM(replace_config(model.config, vocab_size=VOCABULARY + 6)).eval()
    with pytest.raises(UserError, match=r"predicts over 50 tokens and --base over 56: pass the unquantized form"):
        kl_divergence(model, other, ids, ctx=16)


def replace_config(config: Any, **changes: Any) -> Any:
    return LlamaConfig(**{**config.to_dict(), **changes})


class Words:
    """A tokenizer of whitespace-separated words; `adds` puts a BOS before a text."""

    def __init__(self, words: str, adds: bool = False) -> None:
        self.vocabulary = {word: index for index, word in enumerate(["<s>", *words.split()])}
        self.bos_token_id, self.adds = 0, adds

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [self.vocabulary[word] for word in text.split()]
        return {"input_ids": [0, *ids] if self.adds and add_special_tokens else ids}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_bos_is_found_by_asking() -> None:
    assert bos_of(Words("a b", adds=True)) == 0
    assert bos_of(Words("a b")) is None
    assert tokenize(Words("a b", adds=True), "b a").tolist() == [0, 2, 1]
    assert tokenize(Words("a b"), "b a").tolist() == [2, 1]
    assert windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_other_tokenizers_are_named() -> None:
    check_same_tokens(Words("a b"), Words("a b"))
    with pytest.raises(UserError, match=r"'b' is 2 in the model and 3 in --base\): pass the unquantized form"):
        check_same_tokens(Words("a b"), Words("a c b"))


def test_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert load_text(str(tmp_path / "a.txt")) == "one two"
    assert load_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', 'a.jsonl, line 2: has no "text" string'),
        ("a.jsonl", b'{"text": "one"\n', "a.jsonl, line 1: not JSON"),
        ("a.txt", b"caf\xe9", "a.txt: byte 3 is not UTF-8; save the file as UTF-8"),
        ("a.txt", b" \n", "a.txt: holds no text"),
        (None, b"", "no such text file; pass a .txt or .jsonl file, or one of: wikitext2"),
    ],
)
def test_bad_texts_are_refused(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_text(str(path))
    assert message in str(caught.value)


def test_wikitext2_comes_from_the_hub_or_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(repository: str, subset: str, split: str) -> None:
        asked.append((repository, subset, split))
        raise ConnectionError("no route")

    def online(repository: str, subset: str, split: str) -> dict[str, list[str]]:
        return {"text": ["a\n", "b\n"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError, match=r"could not fetch Salesforce/wikitext .*ConnectionError.*--data wikitext2.txt"):
        load_text("wikitext2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=online))
    assert load_text("wikitext2") == "a\n\n\nb\n"
    assert load_text("wikitext2", "llamacpp") == "a\nb\n"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"`pip install datasets`, or pass the text as a file instead"):
        load_text("wikitext2")


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint with a tokenizer of single letters."""
    path = tmp_path_factory.mktemp("eval") / "letters"
    model.save_pretrained(path)
    words = {"<s>": 0, **{letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=1)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    (path / "text.txt").write_text(" ".join("the quick brown fox jumps over the lazy dog" * 4))
    return path


def run_eval(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """`bitsmith eval ...` in this process, its stdout parsed."""
    parser = argparse.ArgumentParser()
    eval_command.add_parser(parser.add_subparsers())
    eval_command.run(parser.parse_args(["eval", *words]))
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_commands_print_and_record(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data", str(directory / "text.txt"), "--json", "--results", str(tmp_path)]
    found = run_eval(capsys, "ppl", str(directory), *where)
    assert {"ppl", "nll", "tokens", "ctx", "stderr"} <= set(found)
    assert (found["ctx"], found["protocol"]) == (POSITIONS, "windows")
    far = run_eval(capsys, "kld", str(directory), "--base", str(directory), "--max-tokens", "64", "--ctx", "16", *where)
    assert {"kld_mean", "kld_median", "kld_p99", "kld_max", "top1_agreement", "ppl", "ppl_base", "tokens"} <= set(far)
    assert (far["kld_max"], far["top1_agreement"], far["tokens"]) == (0, 1, 4 * 7)
    rows = {(row.task, row.metric): row for row in read(tmp_path)}
    row = rows["ppl/text/windows/32", "ppl"]
    assert (row.model, row.spec, row.method, row.kv, row.n) == ("letters", "f32", "", "none", found["tokens"])
    assert (row.value, row.stderr) == (found["ppl"], found["stderr"])
    assert rows["kld/text/llamacpp/16/64tok", "bpw"].value == 32
    run_eval(capsys, "ppl", str(directory), "--data", str(directory / "text.txt"), "--json", "--no-record")
    assert len(read(tmp_path)) == len(rows)


def test_commands_refuse_what_cannot_be(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"accepted are --batch 1 and --max-tokens 2 or more"):
        run_eval(capsys, "ppl", str(directory), "--data", str(directory / "text.txt"), "--batch", "0")
