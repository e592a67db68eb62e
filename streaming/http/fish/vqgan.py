"""/v1/vqgan/*: the codec alone, as the self-hosted server has it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from ar_core.request import Request as EngineRequest
from ar_core.request import RequestError
from audio.codec import CodecConfig
from audio.reading import read_audio
from modalities.speech.segments import Codes
from streaming.client import EngineUnavailable
from streaming.http.connection import while_connected
from streaming.http.fields import checked, is_form, read_fields
from streaming.http.fish.answers import negotiated
from streaming.http.fish.requests import CodesOfSounds, Sounds
from streaming.http.fish.voice import model_for
from streaming.http.served import ServedVoice

T = TypeVar("T")

_MAX_FRAMES = 4096  # of one sound: three minutes at 21.5 a second


async def encode(request: Request) -> Response:
    """Sound files to codes [K][T] each. As for references, silence at both ends is cut off first."""
    body = checked(Sounds, await read_fields(request, frozenset({"audios"})), strict=not is_form(request))
    model = model_for(request.app.state.models, request.headers.get("model"))
    tokens = await while_connected(request.receive, _all(_encoded(model, sound) for sound in body.audios))
    return negotiated(request, {"tokens": tokens})


async def decode(request: Request) -> Response:
    """Codes [K][T] to samples each: float16, mono, at the model's rate, which the header X-Sample-Rate names."""
    body = checked(CodesOfSounds, await read_fields(request))
    model = model_for(request.app.state.models, request.headers.get("model"))
    codes = [_codes(model.speech.codec, number, rows) for number, rows in enumerate(body.tokens)]
    audios = await while_connected(request.receive, _all(_decoded(model, each) for each in codes))
    return negotiated(request, {"audios": audios}, headers={"X-Sample-Rate": str(model.speech.sample_rate)})


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*works))


async def _encoded(model: ServedVoice, sound: bytes) -> list[list[int]]:
    samples = await asyncio.to_thread(read_audio, sound, model.speech.sample_rate)
    codes: list[list[int]] = (await model.references.encode(samples)).tolist()
    return codes


async def _decoded(model: ServedVoice, codes: np.ndarray) -> bytes:
    if codes.shape[1] == 0:
        return b""
    asked = EngineRequest(f"decode-{secrets.token_hex(8)}", [Codes(codes)])
    async with aclosing(model.client.submit(asked)) as outputs:
        async for output in outputs:
            if output.payload is not None:
                return np.frombuffer(output.payload, dtype=np.float32).astype(np.float16).tobytes()
            if output.finish is not None:
                raise EngineUnavailable(output.error or "the engine gave the codes up")
    raise EngineUnavailable("the engine ended without sound for the codes")


def _codes(codec: CodecConfig, number: int, rows: list[list[int]]) -> np.ndarray:
    """Integers [K, T]. Raises RequestError for codes that this codec does not have."""
    where = f"tokens[{number}]"
    lengths = sorted({len(row) for row in rows})
    if len(rows) != codec.num_codebooks or len(lengths) != 1 or lengths[0] > _MAX_FRAMES:
        raise RequestError(
            f"{where} has {len(rows)} rows of {', '.join(map(str, lengths))} codes; it must have "
            f"{codec.num_codebooks} equally long ones of at most {_MAX_FRAMES}",
            where,
        )
    for row, size in zip(rows, codec.codebook_sizes):
        wrong = next((code for code in row if code >= size), None)
        if wrong is not None:
            raise RequestError(f"{where} has a code {wrong} where codes go from 0 to {size - 1}", where)
    return np.array(rows, dtype=np.int32)
