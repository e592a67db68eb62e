"""The models that a gateway serves, by name."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from streaming.http.errors import ApiError, shown

if TYPE_CHECKING:
    from ar_core.request import Output, Request
    from ar_core.stats import EngineStats
    from modalities.chat import ChatModel
    from modalities.speech.model import SpeechModel
    from streaming.messages import ModelInfo
    from streaming.speech.references import References


class Client(Protocol):
    """What the HTTP face needs of `streaming.client.EngineClient`."""

    @property
    def ready(self) -> bool: ...

    @property
    def info(self) -> ModelInfo | None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def submit(self, request: Request) -> AsyncGenerator[Output, None]: ...

    async def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class ServedModel:
    """A language model."""

    name: str
    created: int  # seconds since 1970
    client: Client
    chat: ChatModel

    @property
    def max_context(self) -> int:
        """Positions of one sequence: as the checkpoint says, or fewer if the engine's memory holds fewer."""
        return _max_context(self.client, self.chat.max_context)

    @cached_property
    def fingerprint(self) -> str:
        return "fp_" + hashlib.blake2b(f"{self.name} {self.created}".encode(), digest_size=5).hexdigest()


@dataclass(frozen=True)
class ServedVoice:
    """A model that speaks, and the voices that it can speak in."""

    name: str
    created: int  # seconds since 1970
    client: Client
    speech: SpeechModel
    references: References

    @property
    def max_context(self) -> int:
        return _max_context(self.client, self.speech.max_context)


Models = Mapping[str, ServedModel | ServedVoice]


def find_any(models: Models, name: str) -> ServedModel | ServedVoice:
    """The model of that name, whatever it is for. Raises ApiError."""
    model = models.get(name)
    if model is None:
        known = ", ".join(models)
        message = f"model {shown(name)} is not served here; these are: {known}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return model


def find_model(models: Models, name: str) -> ServedModel:
    """The language model of that name. Raises ApiError."""
    model = find_any(models, name)
    if not isinstance(model, ServedModel):
        raise _wrong_kind(models, name, ServedModel, "speaks and takes no messages or prompts", "/v1/audio/speech")
    return model


def find_voice(models: Models, name: str) -> ServedVoice:
    """The speech model of that name. Raises ApiError."""
    model = find_any(models, name)
    if not isinstance(model, ServedVoice):
        raise _wrong_kind(models, name, ServedVoice, "makes text and cannot speak", "/v1/chat/completions")
    return model


def default_voice(models: Models) -> ServedVoice:
    """The first speech model, for protocols that need not name one. Raises ApiError if there is none."""
    for model in models.values():
        if isinstance(model, ServedVoice):
            return model
    known = ", ".join(models)
    raise ApiError(404, f"no speech model is served here; these are: {known}", param="model", code="model_not_found")


def _wrong_kind(models: Models, name: str, kind: type, what: str, path: str) -> ApiError:
    others = [other for other, model in models.items() if isinstance(model, kind)]
    instead = f"models that can: {', '.join(others)}" if others else "no model that can is served here"
    return ApiError(400, f"model {shown(name)} {what}; use it with {path}. Here, {instead}", param="model")


def _max_context(client: Client, made_for: int) -> int:
    info = client.info
    return made_for if info is None else min(info.max_context, made_for)
