from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from benchmarks.server import Server, running
from modalities.checkpoint import Checkpoint

_JS = Path(__file__).parent / "js"


@pytest.fixture(scope="session")
def server(chat_checkpoint: Checkpoint) -> Iterator[Server]:
    """`triptych serve` with the embedded chat model, as a user starts it; in float32, so that what was computed alone,
    in a batch or from a cached prefix agrees to the last word."""
    with running("streaming.cli", "serve", "--port", "0", "--dtype", "float32") as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", timeout=120, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def node(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs one of the programs in `js/` against the server; gives what it printed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    folder = tmp_path_factory.mktemp("js")
    for file in _JS.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    installed = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert installed.returncode == 0, installed.stderr

    def run(program: str) -> str:
        command = ["node", program, f"{server.url}/v1"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
