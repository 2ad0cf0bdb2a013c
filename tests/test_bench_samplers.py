"""`bench samplers`: what is compared, that contenders do what they are said to, and the command on a small batch."""

import json
from pathlib import Path

import pytest
import torch
from bitsmith.cli.main import main
from bitsmith.eval import sampler_speed as speed
from bitsmith.eval.report import table_for
from bitsmith.eval.results import FILE_NAME, read
from bitsmith.samplers.params import SamplingParams
from bitsmith.samplers.pipeline import plan


def test_every_sampler_of_the_table_changes_something() -> None:
    for name, asked in speed.SAMPLERS.items():
        assert plan(SamplingParams(**asked)), name


def test_contenders_agree_on_what_they_remove() -> None:
    """The same tokens survive ours and transformers', so the times are those of the same work."""
    batch = speed.Batch(3, 512)
    for name in ("top_k", "min_p", "epsilon_cutoff"):
        runs = speed.contenders(name, batch, ["transformers"])
        theirs = runs["transformers"]().isfinite()
        for piece in runs[speed.OURS]():
            tokens = [set(row.isfinite().nonzero()[:, 0].tolist()) for row in piece.logits]
            assert tokens == [set(theirs[row].nonzero()[:, 0].tolist()) for row in piece.rows], name


def test_rows_are_medians_per_row_and_ratios() -> None:
    (row,) = speed.rows("top_k", {"bitsmith": [4e-6, 1e-6, 2e-6], "llama.cpp": [8e-6]}, 2)
    assert (row["value"], row["ratio"], row["against"]) == (pytest.approx(1.0), pytest.approx(4.0), "llama.cpp")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    words = ["bench", "samplers", "2x256", "--against", "transformers", "--samples", "1", "--json"]
    assert not main([*words, "--results", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 2 and {row["name"] for row in found["rows"]} == set(speed.SAMPLERS)
    rows = read(tmp_path / FILE_NAME)
    assert {row.metric for row in rows} == set(speed.SAMPLERS) and all(row.value > 0 for row in rows)
    assert f"| {speed.CHAIN} | 2x256 |" in table_for("samplers", rows)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["0x512"], "accepted is ROWSxVOCABULARY"), (["2x256", "--against", "vllm"], "accepted: transformers, llama.cpp")],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "samplers", *words]) == 2
    assert message in capsys.readouterr().err
