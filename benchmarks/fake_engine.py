"""An engine without a model, for tests and for measuring what lies in front of an engine.

It emits the prompt over and over (or `script`), one token a step for each running request, so every answer is known
beforehand. Prompts that begin with CRASH or EXIT make it fail.
"""

from __future__ import annotations

import os
import time
from collections import deque

from ar_core.request import FinishReason, Output, QueueFull, Request, RequestError, TokenLogprob
from ar_core.stats import EngineStats
from streaming.messages import ModelInfo

CRASH = 666  # first token of a prompt that makes `step` raise
EXIT = 667  # first token of a prompt that ends the process without a word
VOCAB_SIZE = 49152


class FakeEngine:
    """`tokens_per_second` is the rate of one request; None: as fast as it goes."""

    def __init__(
        self,
        *,
        tokens_per_second: float | None = None,
        max_running: int = 64,
        max_queue: int = 1024,
        max_context: int = 8192,
        script: list[int] | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        self.aborted: list[str] = []
        self._step_seconds = 1 / tokens_per_second if tokens_per_second else 0.0
        self._max_running = max_running
        self._max_queue = max_queue
        self._max_context = max_context
        self._script = script
        self._stop_ids = stop_ids
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, list[int], int]] = {}  # request, prompt, emitted
        self._ended: list[Output] = []
        self._stats = EngineStats(kv_slots=max_running * max_context)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ended)

    def add(self, request: Request) -> None:
        prompt = _prompt(request)
        if len(prompt) >= self._max_context:
            raise RequestError(f"the prompt has {len(prompt)} tokens; at most {self._max_context - 1} fit", "prompt")
        if len(self._waiting) >= self._max_queue:
            raise QueueFull(f"{len(self._waiting)} requests wait already; no more than {self._max_queue} may")
        self._stats.requests += 1
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._stats.aborted += 1
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        self._running.pop(request_id, None)
        self._ended.append(Output(request_id, [], 0, 0, finish=FinishReason.ABORT))

    def step(self) -> list[Output]:
        time.sleep(self._step_seconds)
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting.popleft()
            self._running[request.id] = (request, _prompt(request), 0)
            self._stats.prompt_tokens += len(_prompt(request))
        outputs, self._ended = self._ended, []
        outputs += [self._emit(*entry) for entry in list(self._running.values())]
        self._stats.steps += 1
        return outputs

    def stats(self) -> EngineStats:
        self._stats.running = len(self._running)
        self._stats.waiting = len(self._waiting)
        self._stats.kv_slots_used = sum(len(prompt) + emitted for _, prompt, emitted in self._running.values())
        return self._stats

    def _emit(self, request: Request, prompt: list[int], emitted: int) -> Output:
        if prompt[0] == CRASH:
            raise RuntimeError("out of memory, or something like it")
        if prompt[0] == EXIT:
            os._exit(9)
        source = self._script or prompt
        token = source[emitted % len(source)]
        emitted += 1
        finish = self._finish(request, len(prompt), token, emitted)
        self._stats.generated_tokens += 1
        if finish is None:
            self._running[request.id] = (request, prompt, emitted)
        else:
            del self._running[request.id]
            self._stats.finished += 1
        return Output(request.id, [[token]], len(prompt), 0, _logprobs(request, token), finish=finish)

    def _finish(self, request: Request, prompt_len: int, token: int, emitted: int) -> FinishReason | None:
        params = request.sampling
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self._stop_ids)}
        if token in stops and emitted > params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if emitted >= min(params.max_tokens, self._max_context - prompt_len) else None


def make(
    name: str = "fake",
    *,
    tokens_per_second: float | None = None,
    max_running: int = 64,
    max_queue: int = 1024,
    max_context: int = 8192,
    script: list[int] | None = None,
    stop_ids: tuple[int, ...] = (),
) -> tuple[FakeEngine, ModelInfo]:
    """The factory that a worker is given: "benchmarks.fake_engine:make"."""
    engine = FakeEngine(
        tokens_per_second=tokens_per_second,
        max_running=max_running,
        max_queue=max_queue,
        max_context=max_context,
        script=script,
        stop_ids=tuple(stop_ids),
    )
    info = ModelInfo(
        name, "chat", "cpu", "float32", max_context, VOCAB_SIZE, tuple(stop_ids), max_running * max_context
    )
    return engine, info


def make_broken(message: str = "there are no weights here") -> tuple[FakeEngine, ModelInfo]:
    """A factory that cannot build its engine."""
    raise FileNotFoundError(message)


def _prompt(request: Request) -> list[int]:
    ids = [token for segment in request.segments for token in segment.ids]
    if not ids:
        raise RequestError("the prompt is empty; it must have at least one token", "prompt")
    wrong = [token for token in ids if not 0 <= token < VOCAB_SIZE]
    if wrong:
        raise RequestError(f"token id {wrong[0]} is not in the vocabulary (0 to {VOCAB_SIZE - 1})", "prompt")
    return ids


def _logprobs(request: Request, token: int) -> list[TokenLogprob] | None:
    wanted = request.sampling.logprobs
    if wanted is None:
        return None
    return [TokenLogprob(token, -0.5, tuple((token + rank, -0.5 - rank) for rank in range(wanted)))]
