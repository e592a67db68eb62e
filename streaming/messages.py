"""What crosses the socket between a gateway (DEALER) and an engine (ROUTER), as msgpack.

A message to the engine is one `Command`. A message to a gateway is a list of `Reply`: all that one round of the
engine's loop made for it. An empty list only asks whether the gateway is still there.

`id` counts a client's requests and is never used again by that client.
"""

from __future__ import annotations

from array import array
from functools import singledispatch
from typing import Any

import msgspec
import numpy as np

from ar_core.request import FinishReason, Frames, Output, Request, RequestError, SamplingParams, TokenLogprob, Tokens
from ar_core.stats import EngineStats
from modalities.speech.chunks import Latency
from modalities.speech.segments import Codes, Recording, Turn


class ModelInfo(msgspec.Struct, frozen=True):
    """What an engine serves, and on what."""

    name: str
    kind: str  # chat or speech
    device: str
    dtype: str
    max_context: int  # positions of one sequence, prompt and answer together
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_slots: int


class TokenSegment(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    ids: bytes  # int32 [n]

    def unpack(self) -> Tokens:
        ids = array("i")
        ids.frombytes(self.ids)  # ValueError if it is not a whole number of them
        return Tokens(ids)


class FrameSegment(msgspec.Struct, frozen=True, array_like=True, tag="frames"):
    rows: bytes  # int32 [n, width]
    width: int

    def unpack(self) -> Frames:
        return Frames(np.frombuffer(self.rows, dtype=np.int32).reshape(-1, self.width).astype(np.int64))


class TurnSegment(msgspec.Struct, frozen=True, array_like=True, tag="turn"):
    opening: list[TokenSegment | FrameSegment]
    closing: list[TokenSegment | FrameSegment]
    max_frames: int
    latency: Latency
    alone: bool

    def unpack(self) -> Turn:
        opening = tuple(segment.unpack() for segment in self.opening)
        closing = tuple(segment.unpack() for segment in self.closing)
        return Turn(opening, closing, self.max_frames, self.latency, self.alone)


class RecordingSegment(msgspec.Struct, frozen=True, array_like=True, tag="recording"):
    samples: bytes  # float32 [n]

    def unpack(self) -> Recording:
        return Recording(np.frombuffer(self.samples, dtype=np.float32))


class CodesSegment(msgspec.Struct, frozen=True, array_like=True, tag="codes"):
    codes: bytes  # int32 [K, T]
    codebooks: int

    def unpack(self) -> Codes:
        return Codes(np.frombuffer(self.codes, dtype=np.int32).reshape(self.codebooks, -1))


# Further kinds join here: each a tagged struct with `unpack`, and a case of `pack`.
Segment = TokenSegment | FrameSegment | TurnSegment | RecordingSegment | CodesSegment


@singledispatch
def pack(segment: Any) -> Any:
    """A segment as it travels, one of `Segment`. Raises RequestError for one that cannot."""
    raise RequestError(f"a {type(segment).__name__} segment cannot be sent to an engine", "prompt")


@pack.register
def _(segment: Tokens) -> TokenSegment:
    try:
        return TokenSegment(array("i", segment.ids).tobytes())
    except OverflowError:
        wrong = next(token for token in segment.ids if not -(2**31) <= token < 2**31)
        raise RequestError(
            f"token id {wrong} does not fit into 32 bits; no vocabulary is that large", "prompt"
        ) from None


@pack.register
def _(segment: Frames) -> FrameSegment:
    return FrameSegment(segment.rows.astype(np.int32).tobytes(), segment.rows.shape[1])


@pack.register
def _(segment: Turn) -> TurnSegment:
    opening, closing = ([pack(part) for part in parts] for parts in (segment.opening, segment.closing))
    return TurnSegment(opening, closing, segment.max_frames, segment.latency, segment.alone)


@pack.register
def _(segment: Recording) -> RecordingSegment:
    return RecordingSegment(segment.samples.astype(np.float32).tobytes())


@pack.register
def _(segment: Codes) -> CodesSegment:
    return CodesSegment(segment.codes.astype(np.int32).tobytes(), segment.codes.shape[0])


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Asks for `Ready`."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    id: int
    segments: list[Segment]
    sampling: SamplingParams
    priority: int
    cache_salt: str

    @staticmethod
    def of(wire_id: int, request: Request) -> Submit:
        segments = [pack(segment) for segment in request.segments]
        return Submit(wire_id, segments, request.sampling, request.priority, request.cache_salt)

    def request(self, engine_id: str) -> Request:
        segments = [segment.unpack() for segment in self.segments]
        return Request(engine_id, segments, self.sampling, self.priority, self.cache_salt)


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Ends a request without a reply. The id of one that ended by itself is ignored."""

    id: int


class StatsQuery(msgspec.Struct, frozen=True, array_like=True, tag="stats?"):
    id: int


Command = Hello | Submit | Abort | StatsQuery


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    info: ModelInfo


class Emitted(msgspec.Struct, frozen=True, array_like=True, tag="out"):
    """`ar_core.request.Output` of a request; see there."""

    id: int
    rows: list[list[int]]
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprob] | None
    payload: Any
    finish: FinishReason | None
    error: str | None

    @staticmethod
    def of(wire_id: int, out: Output) -> Emitted:
        return Emitted(
            wire_id, out.rows, out.prompt_tokens, out.cached_tokens, out.logprobs, out.payload, out.finish, out.error
        )

    @staticmethod
    def failure(wire_id: int, error: str) -> Emitted:
        return Emitted(wire_id, [], 0, 0, None, None, FinishReason.ERROR, error)


class Invalid(msgspec.Struct, frozen=True, array_like=True, tag="invalid"):
    """The request can never be served: RequestError."""

    id: int
    message: str
    param: str | None


class Overloaded(msgspec.Struct, frozen=True, array_like=True, tag="overloaded"):
    """The queue is full: QueueFull."""

    id: int
    message: str


class Unavailable(msgspec.Struct, frozen=True, array_like=True, tag="unavailable"):
    """The engine takes no new requests, since it is stopping."""

    id: int
    message: str


class StatsReply(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    id: int
    stats: EngineStats


Reply = Ready | Emitted | Invalid | Overloaded | Unavailable | StatsReply

encoder = msgspec.msgpack.Encoder()
command_decoder = msgspec.msgpack.Decoder(Command)
reply_decoder = msgspec.msgpack.Decoder(list[Reply])


def join(outputs: list[Emitted], request_id: str) -> list[Output]:
    """What arrived for one request, in as few Outputs as can say it. Payloads cannot be joined."""
    if any(out.payload is not None for out in outputs):
        return [_output(request_id, out, out.rows, out.logprobs) for out in outputs]
    rows = outputs[0].rows if len(outputs) == 1 else [row for out in outputs for row in out.rows]
    logprobs = None
    if any(out.logprobs is not None for out in outputs):
        logprobs = [entry for out in outputs for entry in out.logprobs or ()]
    return [_output(request_id, outputs[-1], rows, logprobs)]


def _output(request_id: str, out: Emitted, rows: list[list[int]], logprobs: list[TokenLogprob] | None) -> Output:
    return Output(request_id, rows, out.prompt_tokens, out.cached_tokens, logprobs, out.payload, out.finish, out.error)
