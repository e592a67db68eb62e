"""A server in a process of its own: started, waited for, looked at, ended."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

_ANNOUNCED = re.compile(r"Triptych is ready: (\S+)")
_START_SECONDS = 240.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path  # what it wrote to its standard error

    def children(self, module: str) -> list[psutil.Process]:
        """Its processes of one kind: "streaming.worker" or "streaming.gateway"."""
        return [child for child in psutil.Process(self.process.pid).children() if module in child.cmdline()]

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(_STOP_SECONDS)


@contextlib.contextmanager
def running(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`python -m MODULE ARGUMENTS`, ready; it is ended by its process id at the end.

    Raises RuntimeError, with what it wrote, if it ends before it is ready, or is not within minutes.
    """
    with tempfile.TemporaryDirectory(prefix="triptych-log-") as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        assert process.stdout is not None
        try:
            yield Server(process, _wait_ready(process.stdout, log), log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            process.stdout.close()


def _wait_ready(output: IO[str], log: Path) -> str:
    line = output.readline() if select.select([output], [], [], _START_SECONDS)[0] else ""
    announced = _ANNOUNCED.match(line)
    if announced is None:
        raise RuntimeError(f"the server did not come up; it wrote {line!r} and {log.read_text()}")
    return announced[1]
