"""The engine of a speech model: an `ar_core.Engine` for frames, with a codec behind it and turns in front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from ar_core.engine import Engine
from ar_core.request import FinishReason, Frames, Output, QueueFull, Request, RequestError
from ar_core.stats import EngineStats
from audio.codec import Codec
from modalities.speech.codec_stage import CodecStage
from modalities.speech.segments import Codes, Prompt, Recording, Turn

_PATIENCE = 0.01  # seconds that an otherwise idle step waits for the coder
_BEGUN = 1 << 32  # who has begun to speak goes on before anybody else begins, of whatever priority
_SEED_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of a request's turns


class _Speech:
    """A request under way: the conversation so far, and what is left to say."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.system: Prompt = tuple(s for s in request.segments if not isinstance(s, Turn))
        self.turns: list[Turn] = [s for s in request.segments if isinstance(s, Turn)]
        self.at = 0  # the turn that is spoken, or comes next
        self.spoken: list[list[list[int]]] = [[]]  # rows of each turn up to that one
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def turn_id(self) -> str:
        return f"{self.request.id}/{self.at}"

    def conversation(self, forget: int) -> list[object]:
        """The prompt of the turn, without the first `forget` turns before it."""
        segments: list[object] = [*self.system]
        for turn, rows in zip(self.turns[forget : self.at], self.spoken[forget : self.at]):
            segments += turn.opening
            if rows:
                segments.append(Frames(np.array(rows, dtype=np.int64)))
            segments += turn.closing
        return [*segments, *self.turns[self.at].opening]


class SpeechEngine:
    """The verbs of `ar_core.Engine`, for requests as in `segments.py`.

    Outputs of speech have samples as payload, float32 bytes; the rows of all turns follow one another, but for those
    that end a turn before the last. An encoded recording has its codes as payload, int32 bytes [K, T]; decoded codes
    their samples.
    """

    def __init__(self, engine: Engine, stage: CodecStage, codec: Codec) -> None:
        """`engine` has `stage` as its output stage."""
        self.engine = engine
        self._stage = stage
        self.codec = codec
        self._speeches: dict[str, _Speech] = {}
        self._by_turn: dict[str, _Speech] = {}  # by the engine's id of the turn under way
        self._between: list[_Speech] = []  # whose next turn has yet to enter the engine
        self._coder = ThreadPoolExecutor(1, thread_name_prefix="coder")
        self._coding: dict[str, Future[bytes]] = {}
        self._ended: list[Output] = []

    @property
    def has_work(self) -> bool:
        return bool(self.engine.has_work or self._between or self._coding or self._ended)

    def add(self, request: Request) -> None:
        """Raises RequestError if the request can never be served, QueueFull if not now."""
        match request.segments:
            case [Recording(samples)]:
                self._code(request, lambda: self._encode(samples))
            case [Codes(codes)]:
                self._code(request, lambda: self._decode(codes))
            case _:
                self._begin(_Speech(request))

    def abort(self, request_id: str) -> None:
        """End a request; its last output says ABORT. Unknown ids are ignored."""
        speech = self._speeches.pop(request_id, None)
        if speech is not None:
            if self._by_turn.pop(speech.turn_id, None) is not None:
                self.engine.abort(speech.turn_id)
            else:
                self._between.remove(speech)
            self._ended.append(_output(speech, [], FinishReason.ABORT))
            self._stage.close(request_id)
        elif (work := self._coding.pop(request_id, None)) is not None:
            work.cancel()
            self._ended.append(Output(request_id, [], 0, 0, finish=FinishReason.ABORT))

    def step(self) -> list[Output]:
        waiting, self._between = self._between, []
        for speech in waiting:
            self._go_on(speech)
        outputs, self._ended = self._ended, []
        if self.engine.has_work:
            for output in self.engine.step():
                speech_of = self._by_turn.get(output.request_id)
                if speech_of is not None:
                    outputs.append(self._take(speech_of, output))
        return [*outputs, *self._coded(may_wait=not outputs and not self.engine.has_work)]

    def stats(self) -> EngineStats:
        stats = self.engine.stats()
        stats.stage_batches, stats.stage_items = self._stage.batches, self._stage.items
        return stats

    # Speech

    def _begin(self, speech: _Speech) -> None:
        if not speech.turns:
            raise RequestError("there is nothing to speak", "input")
        if speech.request.id in self._speeches:
            raise RequestError(f"request id {speech.request.id!r} is in use", "id")
        self._check_lengths(speech)
        self._stage.open(speech.request.id, speech.turns[0].latency)
        try:
            self._enter(speech)
        except (RequestError, QueueFull):
            self._stage.close(speech.request.id)
            raise
        self._speeches[speech.request.id] = speech

    def _check_lengths(self, speech: _Speech) -> None:
        """Later turns can forget earlier ones, but each needs room for itself."""
        system = self.engine.prompt_length(speech.system)
        for number, turn in enumerate(speech.turns, 1):
            length = system + self.engine.prompt_length(turn.opening)
            if length >= self.engine.max_context:
                raise RequestError(
                    f"voice and part {number} of the text have {length} positions together; at most "
                    f"{self.engine.max_context - 1} fit. Shorter references, or a text split into shorter parts, would",
                    "input",
                )

    def _go_on(self, speech: _Speech) -> None:
        """Begin a turn after the first; a full queue only delays it."""
        try:
            self._enter(speech)
        except QueueFull:
            self._between.append(speech)

    def _enter(self, speech: _Speech) -> None:
        request, turn = speech.request, speech.turns[speech.at]
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + speech.at * _SEED_STRIDE) % 2**63)
        priority = request.priority - (_BEGUN if speech.at else 0)
        self.engine.add(
            Request(
                speech.turn_id,
                self._fitting(speech, turn.max_frames),
                replace(sampling, max_tokens=turn.max_frames, min_tokens=min(sampling.min_tokens, turn.max_frames)),
                priority,
                request.cache_salt,
            )
        )
        self._by_turn[speech.turn_id] = speech

    def _fitting(self, speech: _Speech, frames: int) -> list[object]:
        """The conversation, as far back as it leaves room for the turn's frames."""
        for forget in range(speech.at if speech.turns[speech.at].alone else 0, speech.at):
            segments = speech.conversation(forget)
            if self.engine.prompt_length(segments) + frames <= self.engine.max_context:
                return segments
        return speech.conversation(speech.at)

    def _take(self, speech: _Speech, output: Output) -> Output:
        """An output of the engine as one of the whole request."""
        finish, rows = output.finish, output.rows
        spoken = rows[:-1] if finish is FinishReason.STOP else rows
        speech.spoken[speech.at] += spoken
        if speech.at == 0:
            speech.prompt_tokens, speech.cached_tokens = output.prompt_tokens, output.cached_tokens
        if finish is not None:
            del self._by_turn[speech.turn_id]
            if finish in (FinishReason.STOP, FinishReason.LENGTH) and speech.at + 1 < len(speech.turns):
                speech.at += 1
                speech.spoken.append([])
                self._between.append(speech)
                finish, rows = None, spoken
            else:
                self._stage.close(speech.request.id)
                del self._speeches[speech.request.id]
        return replace(_output(speech, rows, finish), payload=output.payload, error=output.error)

    # Recordings and codes

    def _code(self, request: Request, work: Callable[[], bytes]) -> None:
        if request.id in self._coding:
            raise RequestError(f"request id {request.id!r} is in use", "id")
        if len(self._coding) >= self.engine.scheduler.max_queue:
            raise QueueFull(f"{len(self._coding)} recordings are waiting for the codec already")
        self._coding[request.id] = self._coder.submit(work)

    def _coded(self, *, may_wait: bool) -> list[Output]:
        outputs = []
        for request_id, future in list(self._coding.items()):
            if may_wait and not future.done():
                _wait(future)
                may_wait = False
            if future.done():
                del self._coding[request_id]
                outputs.append(_coded_output(request_id, future))
        return outputs

    def _encode(self, samples: np.ndarray) -> bytes:
        codes = self.codec.encode(torch.from_numpy(np.array(samples, np.float32))[None])[0]
        return codes.cpu().numpy().astype(np.int32).tobytes()

    def _decode(self, codes: np.ndarray) -> bytes:
        samples = self.codec.decode(torch.from_numpy(np.array(codes, np.int64))[None])[0]
        return samples.cpu().numpy().astype(np.float32).tobytes()


def _wait(future: Future[bytes]) -> None:
    try:
        future.exception(timeout=_PATIENCE)
    except TimeoutError:
        return


def _coded_output(request_id: str, future: Future[bytes]) -> Output:
    error = future.exception()
    if error is not None:
        return Output(request_id, [], 0, 0, finish=FinishReason.ERROR, error=f"the codec failed: {error}")
    return Output(request_id, [], 0, 0, payload=future.result(), finish=FinishReason.STOP)


def _output(speech: _Speech, rows: Sequence[list[int]], finish: FinishReason | None) -> Output:
    return Output(speech.request.id, list(rows), speech.prompt_tokens, speech.cached_tokens, finish=finish)
