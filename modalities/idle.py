"""What offline models of every kind share about their engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ar_core.request import Output

UNLIMITED = 2**31  # requests that may wait: nobody but the caller fills the queue


class Steps(Protocol):
    """Of an engine, what it takes to end its work."""

    @property
    def has_work(self) -> bool: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Output]: ...


def leave_idle(engine: Steps, request_ids: Iterable[str]) -> None:
    """End these requests, whatever happened to them, and let the engine come to rest."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
