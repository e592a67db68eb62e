"""What is asked of the engine, and what it answers: small records, no behaviour."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_AVOID_REPEATS = 64


class RequestError(ValueError):
    """A request that cannot be served as it stands; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFull(RuntimeError):
    """The engine has as many waiting requests as it may hold. Trying again later can succeed."""


class FinishReason(enum.StrEnum):
    STOP = "stop"  # a stop token was emitted
    LENGTH = "length"  # max_tokens, or the context, is used up
    ABORT = "abort"  # the caller cancelled
    ERROR = "error"  # the engine could not go on; Output.error says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a sequence picks its next integer.

    A temperature of 0 is greedy. `top_k` 0 and `top_p` 1 mean "no limit". `logprobs` None asks for no
    log-probabilities, 0 for those of the emitted tokens, n for those of the n likeliest tokens beside them;
    they are taken from the model's own distribution, before penalties, bias and temperature.

    With `temperature_last`, top-k, top-p and min-p each look at the untempered distribution, and the temperature
    applies to what they leave; without, it comes first. `avoid_repeats` n draws an integer that is among the last n
    emitted once more, at temperature 1 within top-p 0.9, and keeps that one (after Chen et al., VALL-E 2, 2024).
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature_last: bool = False
    avoid_repeats: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, allowed, ok in (
            ("max_tokens", "at least 1", self.max_tokens >= 1),
            ("min_tokens", "between 0 and max_tokens", 0 <= self.min_tokens <= self.max_tokens),
            ("temperature", "between 0 and 100", 0.0 <= self.temperature <= 100.0),
            ("top_k", "at least 0 (0: no limit)", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0.0 < self.top_p <= 1.0),
            ("min_p", "between 0 and 1", 0.0 <= self.min_p <= 1.0),
            ("avoid_repeats", f"between 0 and {MAX_AVOID_REPEATS}", 0 <= self.avoid_repeats <= MAX_AVOID_REPEATS),
            ("presence_penalty", "between -2 and 2", -2.0 <= self.presence_penalty <= 2.0),
            ("frequency_penalty", "between -2 and 2", -2.0 <= self.frequency_penalty <= 2.0),
            ("repetition_penalty", "above 0 and at most 10", 0.0 < self.repetition_penalty <= 10.0),
            ("logprobs", "between 0 and 20", self.logprobs is None or 0 <= self.logprobs <= 20),
        ):
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be {allowed}", name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """The segment that every engine understands: token ids."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Frames:
    """Positions of several integers each, as a model with a FrameHead emits them: int64 [n, width]."""

    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, as segments (see `interfaces.SegmentEncoder`), and how to go on from it.

    Of two waiting requests the one with the lower `priority` starts first. Requests share cached KV only if
    their `cache_salt` is equal.
    """

    id: str
    segments: Sequence[Any]
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class Output:
    """What one step made for one request: usually one row of integers, sometimes none but an ending.

    The rows include a stop token that ended the sequence; `finish` STOP says that the last one is it.
    """

    request_id: str
    rows: list[list[int]]  # [n][head width]
    prompt_tokens: int
    cached_tokens: int  # prompt positions whose KV was found in the cache
    logprobs: list[TokenLogprob] | None = None
    payload: Any = None  # what the OutputStage made of the rows
    finish: FinishReason | None = None
    error: str | None = None

    @property
    def tokens(self) -> list[int]:
        """The first integer of each row: for text, the token ids."""
        return [row[0] for row in self.rows]
