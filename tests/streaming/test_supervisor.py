"""The whole family of processes, with a fake engine and a stand-in for the HTTP face."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from streaming.settings import ServerSettings, SettingsError, load_settings
from streaming.supervisor import bind

READY = re.compile(r"Triptych is ready: (http://127\.0\.0\.1:\d+) \(model \w+, cpu(?:; model \w+, cpu)*\)\n")


class Server:
    """`python -m tests.streaming.fake_server` in a process of its own."""

    def __init__(self, folder: Path, factory: str, *, models: list[str], **options: Any) -> None:
        arguments = [factory, *models, *(f"--{key}={value}" for key, value in options.items())]
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.streaming.fake_server", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TMPDIR": str(folder)},
            )
        self.seen: set[int] = set()

    def wait_ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = READY.fullmatch(line)
        assert found, f"{line!r}, {self.errors.read_text()}"
        return found[1]

    def children(self, module: str) -> list[psutil.Process]:
        found = [child for child in psutil.Process(self.process.pid).children() if _runs(child, f"streaming.{module}")]
        self.seen.update(child.pid for child in found)
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.NoSuchProcess:  # it has just ended: a zombie counts as that
        return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def start(
        factory: str = "tests.streaming.fake_server:build", models: list[str] | None = None, **options: Any
    ) -> Server:
        servers.append(Server(tmp_path, factory, models=models or ["one"], **options))
        return servers[-1]

    yield start
    for started in servers:
        started.end()


def ask(url: str, model: str = "one", prompt: str = "5,6", max_tokens: int = 4) -> httpx.Response:
    return httpx.get(f"{url}/{model}/{prompt}/{max_tokens}", timeout=20)


def eventually(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_serves_recovers_and_drains(server: Any, tmp_path: Path) -> None:
    running = server(models=["one", "two"], gateways=2)
    url = running.wait_ready()
    assert ask(url).text == "5,6,5,6"
    assert ask(url, "two", "9", 2).text == "9,9"

    folder = next(tmp_path.glob("triptych-*"))
    assert folder.stat().st_mode & 0o777 == 0o700

    engines = running.children("worker")
    assert len(engines) == 2 and len(running.children("gateway")) == 2
    for child in (*engines, *running.children("gateway")):
        child.kill()
    eventually(lambda: len(running.children("worker")) == 2 and len(running.children("gateway")) == 2)

    def answers() -> bool:
        try:
            return ask(url).text == "5,6,5,6" and ask(url, "two", "9", 2).text == "9,9"
        except httpx.TransportError:
            return False

    eventually(answers)
    left = {child.pid for kind in ("worker", "gateway") for child in running.children(kind)}
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    assert not any(psutil.pid_exists(pid) for pid in left)
    assert not list(tmp_path.glob("triptych-*"))
    assert running.process.stdout.read() == ""  # nothing but the one line


def test_an_open_answer_is_finished_before_the_server_stops(server: Any) -> None:
    running = server(rate=50)
    url = running.wait_ready()
    with httpx.stream("GET", f"{url}/one/5,6/60", timeout=20) as response:
        chunks = response.iter_text()
        text = next(chunks)
        running.process.send_signal(signal.SIGTERM)
        text += "".join(chunks)
    assert text.strip(",").split(",") == ["5", "6"] * 30
    assert running.process.wait(20) == 0


def test_a_second_signal_stops_at_once(server: Any) -> None:
    running = server(rate=20)
    url = running.wait_ready()
    with httpx.stream("GET", f"{url}/one/5/8000", timeout=20) as response:
        chunks = response.iter_text()
        next(chunks)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            list(chunks)
    assert running.process.wait(3) == 1


def test_nothing_outlives_a_killed_supervisor(server: Any) -> None:
    running = server()
    running.wait_ready()
    children = [*running.children("worker"), *running.children("gateway")]
    assert len(children) == 2
    running.process.kill()
    eventually(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 3)


def test_a_model_that_cannot_load_ends_the_server_with_its_reason(server: Any) -> None:
    running = server("tests.streaming.fake_server:build_broken")
    assert running.process.wait(20) == 1
    said = running.errors.read_text()
    assert "cannot serve one: FileNotFoundError: there are no weights here" in said
    assert "engine one could not start (exit status 3)" in said
    assert "Traceback" not in said and said.count("there are no weights") == 1


def test_a_crash_loop_ends_and_the_rest_goes_on(server: Any) -> None:
    running = server(models=["one", "two"])
    url = running.wait_ready()
    first = min(running.children("worker"), key=lambda child: child.create_time())
    for _ in range(5):
        name = "one"
        assert "engine stopped" in ask(url, name, "667").text  # EXIT
        eventually(lambda: ask(url).text == "5,6,5,6" or "stays down" in running.errors.read_text(), 20)
    assert first.pid not in {child.pid for child in running.children("worker")}
    assert "engine one died 5 times in quick succession (exit status 9); it stays down" in running.errors.read_text()
    assert ask(url, "two").text == "5,6,5,6"
    assert httpx.get(f"{url}/ready").status_code == 503


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings: ServerSettings = load_settings({"port": port}, environment={})
        with pytest.raises(SettingsError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            bind(settings)
    with pytest.raises(SettingsError, match=r"cannot listen on 203\.0\.113\.7:0"):
        bind(load_settings({"host": "203.0.113.7", "port": 0}, environment={}))
