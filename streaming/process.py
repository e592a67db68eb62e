"""Child processes: how one is started and told what to do, and how it ends with its parent.

A child is `python -m MODULE`. Its standard input is a pipe: first one line of JSON (not the command line, which every
user of the machine can read), then nothing until the parent is gone, however it went.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

CANNOT_START = 3  # exit status of a child that has said why it cannot start

T = TypeVar("T")


async def start(
    module: str, spec: msgspec.Struct, *, fds: Sequence[int] = (), environment: dict[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Keep the returned process: the child ends when its standard input closes.

    The child is in a session of its own, so that a Ctrl-C reaches the parent alone, which then decides.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        pass_fds=fds,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(spec) + b"\n")
    return child


def receive(kind: type[T]) -> T:
    """In the child: what it was told, and from now on it ends with its parent."""
    with os.fdopen(os.dup(0), "rb", buffering=0) as pipe:
        spec = msgspec.json.decode(pipe.readline(), type=kind)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    return spec


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def configure_logging(level: str, who: str) -> None:
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s %(levelname)-7s {who}: %(message)s", datefmt="%H:%M:%S", force=True
    )


def imported(name: str) -> Callable[..., Any]:
    """What "module:callable" names."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def describe_error(error: Exception) -> str:
    """Its type and the first line of what it says."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def describe_exit(status: int) -> str:
    """A process's return code in words."""
    if status >= 0:
        return f"exit status {status}"
    return f"killed by {signal.Signals(-status).name}"
