"""A gateway on engines and tokenizers a page long: tokens are bytes, and the engine says what it is told to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI

from ar_core.request import FinishReason, Output, Request, TokenLogprob
from ar_core.stats import EngineStats
from modalities.detokenizer import TextStream
from streaming.client import EngineUnavailable
from streaming.http.app import build_app
from streaming.http.served import ServedModel
from streaming.messages import ModelInfo

EOS = 256
VOCAB = 257
CONTEXT = 2048

Step = Sequence[int] | Exception | float  # token ids that come together, a failure, or seconds of silence


class _Bytes:
    """In place of TokenBytes."""

    def __getitem__(self, token: int) -> bytes:
        return b"<eos>" if token == EOS else bytes([token])

    def is_special(self, token: int) -> bool:
        return token == EOS


class FakeChat:
    max_context = CONTEXT
    vocab_size = VOCAB
    eos_token_ids = (EOS,)
    has_template = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != EOS).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return _Bytes()[token]

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        if any(message["role"] == "tool" for message in messages):
            raise ValueError("this template knows no tools")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        text += "".join(f"[{name}={value}]" for name, value in (template_kwargs or {}).items())
        return self.encode(text + ("<assistant>" if add_generation_prompt else ""))

    def text_stream(self, stop: Sequence[str]) -> TextStream:
        return TextStream(_Bytes(), stop)  # type: ignore[arg-type]


def saying(text: str, together: int = 1) -> Callable[[Request], Iterable[Step]]:
    """A script: this text, so many tokens at a time, and the end."""
    ids = [*text.encode(), EOS]
    return lambda request: [ids[i : i + together] for i in range(0, len(ids), together)]


@dataclass
class FakeEngine:
    """In place of an EngineClient. `script` is asked for each request's steps."""

    script: Callable[[Request], Iterable[Step]] = field(default_factory=lambda: saying("Hello"))
    ready: bool = True
    requests: list[Request] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)  # whose generator ran to its end or failed
    aborted: set[str] = field(default_factory=set)  # whose generator was closed before
    info: ModelInfo | None = None

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def stats(self) -> EngineStats:
        if not self.ready:
            raise EngineUnavailable("the engine stopped")
        return EngineStats(running=3, waiting=2, kv_slots=100, kv_slots_used=50, kv_slots_cached=30, prompt_tokens=8)

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        try:
            async for output in self._outputs(request):
                yield output
            self.ended.add(request.id)
        except Exception:
            self.ended.add(request.id)
            raise
        finally:
            if request.id not in self.ended:
                self.aborted.add(request.id)

    async def _outputs(self, request: Request) -> AsyncGenerator[Output, None]:
        params, prompt = request.sampling, len(request.segments[0].ids)
        emitted = 0
        if not self.ready:
            raise EngineUnavailable("the engine stopped")
        for step in self.script(request):
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            await asyncio.sleep(0)
            ids = list(step)[: params.max_tokens - emitted]
            emitted += len(ids)
            stop_ids = {EOS, *params.stop_token_ids} - ({EOS} if params.ignore_eos else set())
            finish = FinishReason.LENGTH if emitted == params.max_tokens else None
            finish = FinishReason.STOP if stop_ids & set(ids) else finish
            logprobs = [_logprob(token, params.logprobs) for token in ids] if params.logprobs is not None else None
            yield Output(request.id, [[token] for token in ids], prompt, min(4, prompt), logprobs, finish=finish)
            if finish is not None:
                return


def _logprob(token: int, wanted: int) -> TokenLogprob:
    top = [(token, -0.5), *((other, float("-inf")) for other in range(97, 97 + wanted))]
    return TokenLogprob(token, -0.5, tuple(top[:wanted]))


def fake_app(engine: FakeEngine, **options: Any) -> FastAPI:
    return build_app({"fake": ServedModel("fake", 1700000000, engine, FakeChat())}, **options)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serves `app` in a thread, as a gateway does; gives its base URL."""
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, loop="uvloop", http="httptools", ws="none", lifespan="on", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
