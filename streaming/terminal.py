"""`triptych chat`: a conversation in the terminal, answers streaming."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ar_core.request import RequestError
from modalities import SamplingParams, load
from modalities.offline import LanguageModel

Messages = list[dict[str, str]]


def chat_in_terminal(
    source: str, system: str | None, sampling: Mapping[str, Any], engine_options: Mapping[str, Any]
) -> None:
    """Read lines and answer them until the input ends. Raises what loading the model raises."""
    console = Console(stderr=True, highlight=False)
    with console.status(f"loading {source}"):
        model = load(source, **engine_options)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{source} speaks and cannot chat; use triptych say")
    if not model.chat.has_template:
        raise ValueError(f"{source} has no chat template, so it cannot chat; use modalities.load(...).generate")
    if sys.stdin.isatty():
        console.print(f"[dim]{source} on {model.engine.device}. Ctrl-D ends the chat.[/dim]")
    messages: Messages = [{"role": "system", "content": system}] if system else []
    params = SamplingParams(**sampling)
    while (text := _read_line()) is not None:
        if text.strip():
            _answer(model, [*messages, {"role": "user", "content": text}], params, messages, console)


def _read_line() -> str | None:
    """A line, or None at the end of the input or on Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(
    model: LanguageModel, conversation: Messages, params: SamplingParams, messages: Messages, console: Console
) -> None:
    """Print an answer as it comes, and keep question and answer in `messages`; an error keeps neither."""
    pieces: list[str] = []
    start = time.perf_counter()
    try:
        for piece in model.stream(conversation, params):
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]")
    except RequestError as error:
        console.print(f"[red]{error}[/red]")
        return
    print()
    messages[:] = [*conversation, {"role": "assistant", "content": "".join(pieces)}]
    if sys.stdin.isatty():
        seconds = time.perf_counter() - start
        console.print(f"[dim]{len(model.chat.encode(''.join(pieces)))} tokens in {seconds:.1f} s[/dim]")
