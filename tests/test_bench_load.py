"""`bench load`: what is read, the rows it leaves and their table, on a tiny model."""

import json
import os
from pathlib import Path

import pytest
import torch
from bitsmith.cli.main import main
from bitsmith.eval import load_speed as speed
from bitsmith.eval.random_models import SHAPES, write_checkpoint, write_gguf
from bitsmith.eval.report import table_for
from bitsmith.eval.results import FILE_NAME, read


def test_all_bytes_are_read(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file, size in zip(files, (speed._PIECE + 5, 7), strict=True):
        file.write_bytes(os.urandom(size))
    assert speed.read(files) == speed._PIECE + 12


def test_ratio_is_that_of_medians() -> None:
    assert speed.ratio({speed.READ: [1.0, 9.0, 2.0], speed.LOAD: [3.0, 2.0, 90.0]}) == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["gguf", "gptq"])
def test_the_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, path = torch.get_num_threads(), tmp_path / "model.gguf"
    if kind == "gguf":
        write_gguf(SHAPES["tiny"], path, "Q4_0")
    else:
        write_checkpoint(SHAPES["tiny"], path := tmp_path / "model", 4, 32, 8)
    assert not main(["bench", "load", str(path), "--samples", "2", "--json", "--results", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert len(found["samples"][speed.LOAD]) == 2 and found[speed.LOAD] > found[speed.READ] > 0
    rows = read(tmp_path / FILE_NAME)
    assert {row.metric for row in rows} == {speed.READ, speed.LOAD, "load-cold/read-cold"}
    assert f"load/cpu bf16/{found['threads']} threads" in table_for("load", rows)
    torch.set_num_threads(threads)


def test_a_path_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "load"]) == 2
    assert "bench load needs a model directory, a .gguf file or a shape" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "spec"), [([], "affine4.g32.sym"), (["--gguf-type", "Q4_0"], "gguf:q4_0")])
def test_a_shape_is_written_for_the_run(kind: list[str], spec: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    flags = ["--group-size", "32", "--samples", "1", "--results", str(tmp_path)]
    assert not main(["bench", "load", "tiny", *kind, *flags])
    assert {(row.model, row.spec) for row in read(tmp_path / FILE_NAME)} == {("tiny", spec)}
    torch.set_num_threads(threads)
