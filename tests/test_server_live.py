"""`bitsmith serve` as users run it: a process, a port, a tiny random Llama, clients that leave, SIGTERM."""

import copy
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from bitsmith.cli.main import build_parser, main
from bitsmith.cli.serve import with_config
from bitsmith.errors import UserError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 4096
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A checkpoint of a small random Llama over bytes, with a chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("Llama", max_position_embeddings=CONTEXT).save_pretrained(path)
    tokenizer = copy.copy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Running:
    """A server process and a client for it."""

    process: subprocess.Popen[str]
    client: httpx.Client

    def metric(self, name: str) -> float:
        """One unlabelled sample of /metrics."""
        match = re.search(
            rf"^bitsmith:{name}\{{model_name=\"tiny-llama\"\}} (\S+)$", self.client.get("/metrics").text, re.M
        )
        assert match is not None
        return float(match[1])

    def wait_for(self, name: str, value: float) -> None:
        """Poll /metrics until the sample has this value; fails after 10 seconds."""
        deadline = time.monotonic() + 10
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} stayed at {found}, not {value}"


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    """`bitsmith serve` on a port of the system's choice."""
    command = [sys.executable, "-m", "bitsmith", "serve", str(tiny), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    url = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert url is not None, line + process.stderr.read()
    transport = httpx.HTTPTransport(retries=5)
    with httpx.Client(base_url=url[0], timeout=30, transport=transport) as client:
        # The address is printed once the model is loaded, a moment before the port accepts.
        yield Running(process, client)
    process.kill()
    process.wait()


ENDLESS = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True, "stream": True}


def skip_to_text(lines: Iterator[str]) -> None:
    """Read a stream up to the first event with text. Dropping a response's iterator closes the connection: keep it."""
    for line in lines:
        if line.startswith("data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            return
    raise AssertionError("the stream ended without text")


def test_it_is_up(server: Running) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    assert [card["id"] for card in server.client.get("/v1/models").json()["data"]] == ["tiny-llama"]


def test_chat_streams(server: Running) -> None:
    body = {**ENDLESS, "max_tokens": 20, "seed": 1, "stream_options": {"include_usage": True}, "logprobs": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    *parts, usage = [json.loads(text) for text in data]
    assert usage["usage"]["completion_tokens"] == 20
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    streamed = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    logprobs = [item for part in parts for item in part["choices"][0]["logprobs"]["content"]]
    assert len(logprobs) == 20 and all(item["logprob"] < 0 for item in logprobs)
    whole = server.client.post("/v1/chat/completions", json={**ENDLESS, "stream": False, "max_tokens": 20, "seed": 1})
    assert whole.json()["choices"][0]["message"]["content"] == streamed


def test_completions_batch_as_alone(server: Running) -> None:
    def texts(prompt: object) -> list[str]:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        return [choice["text"] for choice in server.client.post("/v1/completions", json=body).json()["choices"]]

    prompts = ["one", "a second, longer prompt", "3"]
    assert texts(prompts) == [text for prompt in prompts for text in texts(prompt)]


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_blocks(server: Running, stream: bool) -> None:
    free = server.metric("kv_cache_free_blocks")
    assert free == server.metric("kv_cache_blocks")
    body = {**ENDLESS, "stream": stream}
    if stream:
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            skip_to_text(lines)
            assert server.metric("num_requests_running") == 1
            assert server.metric("kv_cache_free_blocks") < free
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/chat/completions", json=body, timeout=0.5)
    server.wait_for("num_requests_running", 0)
    assert server.metric("kv_cache_free_blocks") == free
    assert server.metric("generation_tokens_total") < CONTEXT


def test_bad_requests_are_explained(server: Running) -> None:
    def message(**body: object) -> str:
        response = server.client.post("/v1/completions", json=body)
        assert response.status_code == 400
        return str(response.json()["error"]["message"])

    assert "temprature" in message(prompt="a", temprature=1)
    long = message(prompt="a" * 5000)
    assert "5000" in long and str(CONTEXT) in long
    assert "257" in message(prompt=[1, 5000])


def test_port_in_use_is_told_before_the_model_is_loaded(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(server.client.base_url.port)
    assert main(["serve", "/no/such/model", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "99999"], "--port 99999: accepted are 0 (any free port) to 65535"),
        (["--host", "999.1.1.1"], "cannot listen on 999.1.1.1:8000"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: "),
        (["--chat-template", "/no/such.jinja"], "--chat-template /no/such.jinja: "),
        (["--sampler-preset", "/no/such.yaml"], "--sampler-preset /no/such.yaml: "),
        (["--prt", "1"], "unknown argument '--prt': did you mean --port?"),
    ],
)
def test_wrong_flags_are_explained(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/such/model", *flags]) == 2
    assert says in capsys.readouterr().err


def test_config_file_is_flags_under_the_command_line(tmp_path: Path) -> None:
    def merged(text: str, *flags: str) -> dict[str, object]:
        (tmp_path / "serve.yaml").write_text(text)
        line = ["serve", "m", "--config", str(tmp_path / "serve.yaml"), *flags]
        return vars(with_config(build_parser(["serve"]).parse_args(line)))

    found = merged("port: 9000\nmax_num_seqs: 4\napi-key: -k\n", "--port", "9001")
    assert (found["port"], found["max_num_seqs"], found["api_key"], found["path"]) == (9001, 4, "-k", "m")
    for text, says in (
        ("prt: 1", "unknown argument '--prt=1': did you mean --port?"),
        ("port: many", "argument --port: invalid int value: 'many'"),
        ("- a", "must hold a mapping of flag names to values"),
        ("a: [", "serve.yaml"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            merged(text)


def test_generate_prints_one_json_object(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", str(tiny), "-p", "abc", "--max-tokens", "5", "--ignore-eos", "--temperature", "0", "--json"]
    assert main([*line, "--device", "cpu", "--logprobs", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt_tokens"], result["completion_tokens"], result["finish_reason"]) == (3, 5, "length")
    assert len(result["token_ids"]) == 5 and result["tokens_per_second"] > 0
    assert [len(entry["top"]) for entry in result["logprobs"]] == [2] * 5
    assert main([*line, "--min-p", "2"]) == 2
    assert "min_p must be a number between 0 and 1, not 2.0" in capsys.readouterr().err


def test_generate_explains_each_token(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", str(tiny), "-p", "abc", "--max-tokens", "3", "--ignore-eos", "--device", "cpu", "--seed", "1"]
    line += ["--temperature", "0.7", "--top-k", "4", "--trace"]
    assert main([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [token["token_id"] for token in result["sampler_trace"]] == result["token_ids"]
    for token in result["sampler_trace"]:
        temperature, top_k = token["steps"]
        assert (temperature["step"], temperature["removed"]) == ("temperature", 0)
        assert (top_k["step"], top_k["kept"], top_k["removed"]) == ("top_k", 4, 253)
        assert sum(each["prob"] for each in top_k["after"]) == pytest.approx(1)
        assert token["token_id"] in [each["token_id"] for each in top_k["after"]]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert out.count("(model)") == 3 and len(re.findall(r"^  top_k +253 +0\.\d{3} +4  ", out, re.M)) == 3


def test_chat_on_piped_input(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A template that shows how long the conversation is: replies are printed, prompts and notes are not.
    seen: list[str] = []
    monkeypatch.setattr(
        "bitsmith.cli.chat.say", lambda engine, ids, params: seen.append(engine.tokenizer.decode(ids)) or "ok"
    )
    lines = ["one", "two", "/reset", "", "three", "x" * 100, "four", "/exit", "five"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(tiny), "--system", "be", "--device", "cpu", "--max-model-len", "64"]) == 0
    assert seen == [
        "<system>be\n<user>one\n<a>",
        "<system>be\n<user>one\n<assistant>ok\n<user>two\n<a>",
        "<system>be\n<user>three\n<a>",
        "<system>be\n<user>three\n<assistant>ok\n<user>four\n<a>",
    ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "do not fit the context of 64: /reset" in captured.err


def test_chat_streams_replies_to_stdout(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    flags = ["--max-tokens", "6", "--ignore-eos", "--temperature", "0", "--device", "cpu"]
    assert main(["chat", str(tiny), *flags]) == 0
    said = capsys.readouterr().out
    assert main(["generate", str(tiny), "-p", "<user>hello\n<a>", *flags]) == 0
    assert capsys.readouterr().out == said


# Last: it stops the server.
def test_sigterm_ends_a_stream_in_order_and_exits_with_0(server: Running) -> None:
    # Eight at once take longer than the seconds of grace.
    with server.client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "n": 8}) as response:
        lines = response.iter_lines()
        skip_to_text(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in rest[:-1]]
    ends = [reason for reason in reasons if reason]
    assert len(ends) == 8 and set(ends) <= {"abort", "length"}
    assert server.process.wait(timeout=30) == 0
    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()
