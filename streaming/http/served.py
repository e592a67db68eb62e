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
    from streaming.messages import ModelInfo


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
    name: str
    created: int  # seconds since 1970
    client: Client
    chat: ChatModel

    @property
    def max_context(self) -> int:
        """Positions of one sequence: as the checkpoint says, or fewer if the engine's memory holds fewer."""
        info = self.client.info
        return self.chat.max_context if info is None else min(info.max_context, self.chat.max_context)

    @cached_property
    def fingerprint(self) -> str:
        return "fp_" + hashlib.blake2b(f"{self.name} {self.created}".encode(), digest_size=5).hexdigest()


Models = Mapping[str, ServedModel]


def find_model(models: Models, name: str) -> ServedModel:
    model = models.get(name)
    if model is None:
        known = ", ".join(models)
        message = f"model {shown(name)} is not served here; these are: {known}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return model
