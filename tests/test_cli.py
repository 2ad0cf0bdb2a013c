"""The command line: exit codes, where output goes, and that it starts fast."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bitsmith.calibrate.method import Settings
from bitsmith.cli import main as cli
from bitsmith.cli.main import command_names, main
from bitsmith.errors import UserError

PARSING = Path(cli.__file__).parent


def bitsmith(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "bitsmith", *args], capture_output=True, text=True, timeout=60)


def test_every_file_is_a_command() -> None:
    files = {path.stem for path in PARSING.glob("*.py") if not path.stem.startswith("_")} - {"main"}
    assert set(command_names()) == files
    assert {"quantize", "inspect", "generate", "chat", "serve", "formats"} <= files


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom bitsmith.cli.main import build_parser, command_names\nbuild_parser(command_names())\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'fastapi', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", ["", *command_names()])
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*([name] if name else []), "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: bitsmith {name}".rstrip())
    assert name or all(command in out for command in command_names())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["quantise", "a"], "unknown command 'quantise': did you mean `bitsmith quantize`?"),
        ([], "the following arguments are required: COMMAND"),
        (["inspect"], "the following arguments are required: PATH; see `bitsmith inspect --help`"),
        (["formats", "--jsom"], "unknown argument '--jsom': did you mean --json?"),
        (["formats", "extra"], "unknown argument 'extra'"),
        (["quantize", "a", "b", "--format", "gptq", "--bits", "x"], "argument --bits: invalid int value: 'x'"),
        # No abbreviations: a flag added later must not change what a script means.
        (
            ["quantize", "a", "b", "--format", "gptq", "--group", "64"],
            "unknown argument '--group': did you mean --group-size?",
        ),
    ],
)
def test_wrong_command_lines_are_one_message(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bitsmith: error: ") and captured.err.count("\n") == 1
    assert says in captured.err


def test_user_error_in_a_process_is_2_without_traceback() -> None:
    done = bitsmith("serve", "model", "--port", "99999")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bitsmith: error: --port 99999: accepted are 0 (any free port) to 65535\n"


@pytest.mark.parametrize(
    "line",
    ["inspect PATH", "inspect PATH --json", "generate PATH -p x", "chat PATH", "quantize PATH OUT --format rtn"],
)
def test_missing_model_is_one_message(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "no-such-model")
    assert main([{"PATH": missing, "OUT": str(tmp_path / "out")}.get(word, word) for word in line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{missing} does not exist" in captured.err and "Fix: check the path" in captured.err
    assert captured.err.count("\n") == 1


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `bitsmith formats` raise `error`."""

    def run(_: object) -> None:
        raise error

    monkeypatch.setattr(cli.load_command("formats"), "run", run)


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, UserError("the file is bad"))
    assert main(["formats"]) == 2
    assert capsys.readouterr().err == "bitsmith: error: the file is bad\n"
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["formats"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    # A defect keeps its traceback: Python prints it and exits with 1.
    fail_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["formats"])


def command_that(body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `bitsmith formats` in a process, with `body` as what the command does."""
    code = f"from bitsmith.cli import main as cli\ndef run(args):\n    {body}\ncli.load_command('formats').run = run\n"
    command = [sys.executable, "-c", code + "raise SystemExit(cli.main(['formats']))"]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


def test_a_defect_exits_with_1_and_a_traceback() -> None:
    done = command_that("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_reader_that_leaves_is_no_error(size: int) -> None:
    read, write = os.pipe()
    os.close(read)
    done = command_that(f"print('x' * {size})", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_formats_asks_the_dialects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "--json"]) == 0
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out)["formats"]}
    assert rows["gptq"]["bits"] == [2, 3, 4, 8]
    assert rows["gptq"]["zero_points"] == ["sym", "asym"] and rows["gptq"]["desc_act"]
    assert main(["formats"]) == 0
    assert re.search(r"^gptq\s", capsys.readouterr().out, re.MULTILINE)


def test_quantize_passes_on_only_what_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, object] = {}

    def quantize(src: str, out: str, **options: object) -> dict[str, float]:
        seen.update(options, src=src, out=out)
        return {"bpw": 4.25}

    monkeypatch.setattr("bitsmith.calibrate.driver.quantize", quantize)
    line = "quantize a b --format gptq --bits 4 --group-size -1 --asym --skip *.k_proj --skip lm_head"
    assert main([*line.split(), "--no-resume", "--damp-percent", "0.05"]) == 0
    assert capsys.readouterr().err == "wrote b: bpw 4.25\n"
    assert seen == {
        "src": "a",
        "out": "b",
        "format": "gptq",
        "bits": 4,
        "group_size": -1,
        "sym": False,
        "skip": ["*.k_proj", "lm_head"],
        "resume": False,
        "settings": Settings(damp_percent=0.05),
    }
