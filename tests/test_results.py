"""Result rows: appended whole by several processes, read back or reported, and turned into tables and plots."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsmith.errors import UserError
from bitsmith.eval import results as results_module
from bitsmith.eval.report import report, table_for, update_tables
from bitsmith.eval.results import Result, append, default_dir, here, latest, read

ROOT = Path(__file__).resolve().parents[1]

ROW = Result(
    when="2026-11-20T10:00:00+00:00",
    git="abc",
    machine={"cpu": "x", "cores": 2},
    versions={"torch": "2.13"},
    model="books-8m",
    spec="affine4.g128.asym",
    kv="none",
    task="kld/text/llamacpp/512",
    metric="kld_mean",
    value=0.01,
    stderr=0.001,
    n=100,
    seconds=1.5,
    method="gptq",
)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    append(path, [ROW])
    append(path, [replace(ROW, metric="ppl", stderr=None)])
    assert read(path) == read(path.parent) == [ROW, replace(ROW, metric="ppl", stderr=None)]


def test_detail_comes_back_and_is_written_only_where_there_is_some(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    detailed = replace(ROW, detail={"rows": {"1": {"us": 2.0}}})
    append(path, [ROW, detailed])
    assert read(path) == [ROW, detailed]
    assert ["detail" in json.loads(line) for line in path.read_text().splitlines()] == [False, True]


def test_two_processes_append_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    script = (
        "import json, sys\n"
        "from bitsmith.eval.results import Result, append\n"
        "row = json.loads(sys.argv[2])\n"
        "for n in range(200):\n"
        "    append(sys.argv[1], [Result(**{**row, 'n': n, 'model': sys.argv[3] * 3000})])\n"
    )
    row = json.dumps(ROW.__dict__)
    running = [subprocess.Popen([sys.executable, "-c", script, str(path), row, name]) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    found = read(path)
    for name in "ab":
        assert [r.n for r in found if r.model == name * 3000] == list(range(200))


def test_torn_row_is_reported_and_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, [ROW, ROW])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"runs.jsonl, line 2: not a whole JSON row .*; delete that line"):
        read(path)
    append(path, [ROW])
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(UserError, match=r"line 2"):
        read(path)


def test_rows_that_are_no_results_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({**ROW.__dict__, "colour": 1}) + "\n")
    with pytest.raises(UserError, match=r"line 1: fields .*'colour'.*correct or delete that line"):
        read(path)
    with pytest.raises(UserError, match=r"no such results file or folder; run `bitsmith eval ppl`"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match=r"kld_mean of books-8m .* is nan ± 0.001: only finite figures"):
        append(path, [replace(ROW, value=math.nan)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot append results .*--results DIR"):
        append(tmp_path / "file" / "runs.jsonl", [ROW])


def test_newest_row_of_a_key_counts() -> None:
    newer = replace(ROW, value=0.02, when="2026-11-21T10:00:00+00:00")
    assert latest([newer, ROW]) == latest([ROW, newer]) == [newer]
    again = replace(ROW, value=0.03)
    assert latest([ROW, again]) == [again]
    assert len(latest([ROW, replace(ROW, method="rtn"), replace(ROW, kv="int8")])) == 3


def test_here_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = here()
    assert set(place) == {"when", "git", "machine", "versions"}
    assert place["machine"]["cores"] >= 1
    assert place["machine"]["cpu"]
    assert place["versions"]["torch"] == torch.__version__
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results_module, "ROOT", tmp_path / "package")
    assert default_dir() == tmp_path / "results"
    (tmp_path / "package" / ".git").mkdir(parents=True)
    assert default_dir() == tmp_path / "package" / "results"


def sweep() -> list[Result]:
    """Rows of five forms of one model, as `eval kld` and a quantization leave them."""
    rows = []
    forms = [
        ("f16", "", 16.0, 0.0),
        ("affine4.g128.asym", "gptq", 4.16, 0.01),
        ("affine3.g128.asym", "gptq", 3.15, 0.05),
    ]
    forms += [("affine4.g128.asym", "rtn", 4.16, 0.02), ("affine4.g32.asym", "rtn", 4.63, 0.015)]
    for spec, method, bpw, kld in forms:
        form = replace(ROW, spec=spec, method=method)
        metrics = {"kld_mean": kld, "bpw": bpw, "ppl": 20 * math.exp(kld), "top1_agreement": 1 - kld}
        rows += [replace(form, metric=name, value=value) for name, value in metrics.items()]
        if method:
            rows.append(replace(form, task="quantize", metric="seconds", value=12.0))
    return rows


def test_report_writes_tables_and_plots(tmp_path: Path) -> None:
    other = replace(ROW, task="ppl/text/windows/512", metric="ppl", value=33.25, stderr=0.5)
    append(tmp_path / "runs.jsonl", [*sweep(), other, replace(other, metric="nll", value=3.5, stderr=None)])
    page, picture = report(tmp_path, tmp_path / "out")
    text = page.read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| method | spec | bits/weight | PPL | KLD | top-1 agreement | seconds |"
    assert lines[2] == "| – | `f16` | 16.00 | 20.00 | 0 | 100.00 % | – |"
    assert [line.split(" | ")[:2] for line in lines[3:7]] == [
        ["| rtn", "`affine4.g32.asym`"],
        ["| rtn", "`affine4.g128.asym`"],
        ["| gptq", "`affine4.g128.asym`"],
        ["| gptq", "`affine3.g128.asym`"],
    ]
    assert lines[5] == "| gptq | `affine4.g128.asym` | 4.16 | 20.20 | 0.01 | 99.00 % | 12.0 |"
    assert "| model | method | spec | task | ppl | nll |" in text.split("## ppl")[1]
    assert "| books-8m | gptq | `affine4.g128.asym` | ppl/text/windows/512 | 33.25 ± 0.5 | 3.5 |" in text
    assert picture.name == "books-8m.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"]({picture.name})" in text


def test_gguf_files_of_a_model_share_a_table_of_their_own() -> None:
    rows = sweep()
    for kind, method, bpw, kld in (
        ("q2_k", "gguf", 3.36, 0.05),
        ("q4_k_m", "llama-quantize", 5.0, 0.004),
        ("q4_k_m", "gguf", 5.0, 0.003),
    ):
        form = replace(ROW, spec=f"gguf:{kind}", method=method)
        metrics = {"kld_mean": kld, "bpw": bpw, "ppl": 20.5}
        rows += [replace(form, metric=name, value=value) for name, value in metrics.items()]
    assert table_for("books-8m-gguf", rows).splitlines() == [
        "| file type | bits/weight | PPL | KLD, gguf | KLD, llama-quantize |",
        "| --- | --- | --- | --- | --- |",
        "| `q4_k_m` | 5.00 | 20.50 | 0.003 | 0.004 |",
        "| `q2_k` | 3.36 | 20.50 | 0.05 | – |",
    ]
    assert table_for("books-8m", rows) == table_for("books-8m", sweep())


def test_report_without_rows_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no rows in any .jsonl file; run `bitsmith eval kld`"):
        report(tmp_path, tmp_path / "out")


def test_bench_table_compares_engines_of_one_run() -> None:
    cases = {"decode-b1": (40.0, 20.0), "prefill-512": (100.0, 200.0)}
    rows = []
    for case, (ours, theirs) in cases.items():
        fields = {"model": "1.1b", "method": "", "metric": case, "n": 3}
        rows.append(
            replace(ROW, **fields, spec="affine4.g128.sym", task="bench/decode/bitsmith/2 threads/w", value=ours)
        )
        rows.append(replace(ROW, **fields, spec="bf16", task="bench/decode/transformers/2 threads/w", value=theirs))
    rows[1] = replace(rows[1], n=0)
    assert table_for("bench", rows).splitlines()[2:] == [
        "| 1.1b | bitsmith | `affine4.g128.sym` | x, 2 threads | 40.0 | 100.0 |",
        "| 1.1b | transformers | `bf16` | x, 2 threads | 20.0 (ours 2.00x) (disturbed) | 200.0 (ours 0.50x) |",
    ]


def test_bench_table_keeps_runs_apart() -> None:
    """A peer measured beside two forms of ours is compared with the one of its own run."""
    rows = [
        replace(ROW, model="1.1b", method="", metric="decode-b1", n=3, spec=spec, value=value, task=f"bench/decode/{engine}/2 threads/{ours}")
        for ours, values in (("affine4.g128.sym", (40.0, 20.0)), ("affine8.g32.sym", (30.0, 10.0)))
        for engine, spec, value in (("bitsmith", ours, values[0]), ("llama.cpp", "Q", values[1]))
    ]  # fmt: skip
    assert [line.split(" | ")[-1] for line in table_for("bench", rows).splitlines()[2:]] == [
        "40.0 |", "20.0 (ours 2.00x) |", "30.0 |", "10.0 (ours 3.00x) |",
    ]  # fmt: skip


def test_speed_of_another_processor_is_another_figure() -> None:
    """A run elsewhere neither replaces nor is compared with one here."""
    rows = [
        replace(ROW, model="1.1b", method="", metric="decode-b1", n=3, value=value, machine={"cpu": cpu}, task=f"bench/decode/{engine}/2 threads/w")
        for cpu, values in (("x", (40.0, 20.0)), ("y", (30.0, 10.0)))
        for engine, value in zip(("bitsmith", "llama.cpp"), values, strict=True)
    ]  # fmt: skip
    assert [line.split(" | ")[-2:] for line in table_for("bench", rows).splitlines()[2:]] == [
        ["x, 2 threads", "40.0 |"], ["x, 2 threads", "20.0 (ours 2.00x) |"],
        ["y, 2 threads", "30.0 |"], ["y, 2 threads", "10.0 (ours 3.00x) |"],
    ]  # fmt: skip


def _kernels(when: str, rows: dict[str, dict[str, float]], **more: Any) -> Result:
    """A row of `bench kernels`: by rows of x, microseconds of ours and of the others."""
    detail = {
        m: {
            "us": times.pop("bitsmith"),
            "gb_s": 20.0,
            "tflop_s": 0.5,
            "of_copy": 0.8,
            "of_matmul": 0.9,
            "against": times,
        }
        for m, times in rows.items()
    }
    fields: dict[str, Any] = {"model": "4096x14336", "spec": "affine4.g32.sym", "task": "kernels/cpu/2 threads"} | more
    return replace(ROW, method="", metric="m1 us", when=when, detail={"rows": detail}, **fields)


def test_kernels_table_compares_newest_figures_with_the_better_configuration() -> None:
    cpu = {"cpu": "Intel(R) Xeon(R) Processor, AVX512", "cores": 2}
    rows = [
        _kernels("2026-11-29", {"1": {"bitsmith": 200.0, "linear": 500.0, "llama.cpp": 250.0, "llama.cpp --no-repack": 220.0}}),
        _kernels("2026-11-28", {"1": {"bitsmith": 100.0, "linear": 500.0}, "2048": {"bitsmith": 1e5, "linear": 8e4}}),
        _kernels("2026-11-28", {"64": {"bitsmith": 100.0}}, spec="trellis3.mcg", machine=cpu),
        _kernels("2026-11-28", {"1": {"bitsmith": 10.0, "linear": 40.0}}, spec="trellis3.mcg", task="kernels/NVIDIA H100"),
        _kernels("2026-11-28", {"1": {"bitsmith": 100.0}}, model="4096x4096"),
        # As rows were before they had a detail.
        replace(ROW, model="4096x14336", method="", metric="m1 us", task="kernels/bitsmith/cpu/2 threads"),
    ]  # fmt: skip
    assert table_for("kernels", rows).splitlines()[2:] == [
        "| `affine4.g32.sym` Q4_0 | x, 2 | 200 | 20.0 (80%) | 0.50 (90%) | 2.5 / – / – / 0.8 | 1.1 / – / – |",
        "| `trellis3.mcg` | Intel Xeon, AVX512, 2 | – | – | – | – | – |",
        "| `trellis3.mcg` | NVIDIA H100 | 10 | 20.0 (80%) | – | 4 / – / – / – | – |",
    ]


def test_support_table_lists_claims() -> None:
    row = replace(ROW, model="", spec="", method="", task="support/formats", metric="reads GPTQ", value=7.0, n=7)
    assert table_for("support", [row]).splitlines()[2:] == ["| formats | reads GPTQ | 7 |"]


def test_marked_tables_are_rewritten_and_nothing_else() -> None:
    document = "before\n<!-- table:books-8m -->\nold\n<!-- /table -->\nafter\n"
    once = update_tables(document, sweep())
    assert once.startswith("before\n<!-- table:books-8m -->\n| method | spec |")
    assert once.endswith(" |\n<!-- /table -->\nafter\n")
    assert "old" not in once
    assert update_tables(once, sweep()) == once
    assert "-->\n*not measured yet*\n<!--" in update_tables(document.replace("books-8m", "nothing"), sweep())
    with pytest.raises(UserError, match=r"has no `<!-- /table -->` line after it"):
        update_tables("<!-- table:books-8m -->\n", sweep())


def test_readme_tables_are_the_committed_rows() -> None:
    document = (ROOT / "README.md").read_text(encoding="utf-8")
    if not list((ROOT / "results").glob("*.jsonl")):
        pytest.skip("results/ holds no rows yet")
    assert update_tables(document, read(ROOT / "results")) == document, "run `bitsmith eval report --readme README.md`"
