"""WebSocket /v1/audio/speech/stream: text in any pieces, sound as soon as there is a sentence.

client  session.config{...}  input.text{text}  input.done  session.close
server  session.configured  audio.start  <binary frames>  audio.done  input.committed  session.done  error

An utterance is all text up to an `input.done`. One after the other may be sent on one socket, and the configuration may
change between any two texts; until it does, the model keeps in mind what it has said. Closing the socket ends all work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from pydantic import Field, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from modalities.speech.model import Said
from modalities.speech.split import MAX_BYTES
from streaming.http.body import explain
from streaming.http.errors import as_api_error, bad_request
from streaming.http.requests import Body
from streaming.http.speech.requests import SessionConfig
from streaming.http.speech.schema import (
    AudioDone,
    AudioStart,
    InputCommitted,
    SessionConfigured,
    SessionDone,
    SpeechError,
)
from streaming.http.speech.speaking import Speaking, speaking, usage_of
from streaming.speech.live_text import LiveText
from streaming.speech.references import DEFAULT_VOICE
from streaming.speech.synthesis import Synthesis

CONFIG_SECONDS = 10.0  # until the first configuration
IDLE_SECONDS = 30.0  # without a message, and with nothing to say
MAX_WAITING = 256 << 10  # characters that were sent and not spoken yet
_REMEMBERED = 64  # sentences

_NORMAL, _POLICY, _FAILED = 1000, 1008, 1011  # RFC 6455, section 7.4.1

_log = logging.getLogger(__name__)


class _InputText(Body):
    type: Literal["input.text"]
    text: str = Field(max_length=MAX_WAITING)


class _Typed(Body):
    type: str


@dataclass(frozen=True)
class _Voice:
    """A configuration, and what has been said since it was made."""

    how: Speaking
    config: SessionConfig
    said: list[Said]


@dataclass(frozen=True)
class _Sentence:
    voice: _Voice
    utterance: int
    text: str


@dataclass(frozen=True)
class _UtteranceEnd:
    utterance: int


_Item = _Sentence | _UtteranceEnd | None  # None: the session's end


async def speech_socket(socket: WebSocket) -> None:
    await socket.accept()
    session = _Session(socket)
    tasks = [asyncio.create_task(work) for work in (session.listen(), session.speak(), session.watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    await session.end([error for error in results if isinstance(error, Exception)])


class _Overdue(Exception):
    """The client kept the session waiting for too long."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class _Session:
    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._id = f"speech-{secrets.token_hex(16)}"
        self._begun = False  # a configuration has come
        self._voice: _Voice | None = None
        self._text = _live_text()
        self._held: list[str] = []  # text that waits for input.done, if nothing is spoken before
        self._utterance = 0  # that text belongs to
        self._items: asyncio.Queue[_Item] = asyncio.Queue()
        self._queued = 0  # characters in there, and of what is spoken now
        self._spoken = 0  # sentences of the utterance
        self._quiet_since = _now()
        self._closing = False

    # What the client says

    async def listen(self) -> None:
        """Until the client has gone."""
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            self._quiet_since = _now()
            try:
                await self._take(message.get("text") or "")
            except Exception as error:  # whatever it is, the session goes on
                await self._tell_failure(error)

    async def watch(self) -> None:
        """Raises _Overdue when the client says nothing for too long, while there is nothing to speak."""
        await asyncio.sleep(CONFIG_SECONDS)
        if not self._begun:
            raise _Overdue("config_timeout", f"no session.config came within {CONFIG_SECONDS:g} s")
        while (left := self._quiet_since + IDLE_SECONDS - _now()) > 0 or self._queued:
            await asyncio.sleep(left if left > 0 else IDLE_SECONDS)
        raise _Overdue("idle_timeout", f"nothing was sent or spoken for {IDLE_SECONDS:g} s")

    async def _take(self, data: str) -> None:
        if self._closing:
            return
        if not data:
            raise bad_request("a message of a client is JSON in a text frame")
        try:
            match _Typed.model_validate_json(data).type:
                case "session.config":
                    await self._configure(SessionConfig.model_validate_json(data))
                case "input.text":
                    self._add(_InputText.model_validate_json(data).text)
                case "input.done":
                    await self._commit()
                case "session.close":
                    self._close()
        except ValidationError as error:
            raise explain(error) from None

    async def _configure(self, config: SessionConfig) -> None:
        self._begun = True
        state = self._socket.app.state
        how = await speaking(config, config.response_format, state.models, state.reference_folder)
        self._voice = _Voice(how, config, [])
        voice = config.voice_name or DEFAULT_VOICE
        await self._tell(SessionConfigured(how.model.name, voice, how.delivery.format, how.sample_rate))

    def _add(self, text: str) -> None:
        voice = self._configured()
        waiting = self._text.held + sum(map(len, self._held)) + self._queued
        if waiting + len(text) > MAX_WAITING:
            raise bad_request(
                f"{waiting} characters wait to be spoken, and {len(text)} more are too many: {MAX_WAITING} may wait",
                "text",
                "text_too_long",
            )
        if voice.config.split_granularity == "none":
            self._held.append(text)
        else:
            self._enqueue(voice, self._text.push(text))

    async def _commit(self) -> None:
        """Speak what is left of the utterance."""
        voice = self._configured()
        self._flush(voice)
        self._items.put_nowait(_UtteranceEnd(self._utterance))
        await self._tell(InputCommitted(self._utterance))
        self._utterance += 1
        self._text = _live_text()  # who spoke last does not speak the next one

    def _close(self) -> None:
        """Speak what is left, and then end."""
        self._closing = True
        if self._voice is not None:
            self._flush(self._voice)
        self._items.put_nowait(None)

    def _flush(self, voice: _Voice) -> None:
        rest = [self._text.flush(), "".join(self._held).strip()]
        self._held = []
        self._enqueue(voice, [text for text in rest if text])

    def _enqueue(self, voice: _Voice, texts: list[str]) -> None:
        for text in texts:
            self._queued += len(text)
            self._items.put_nowait(_Sentence(voice, self._utterance, text))

    def _configured(self) -> _Voice:
        if self._voice is None:
            raise bad_request("session.config must be the first message", code="not_configured")
        return self._voice

    # What it hears

    async def speak(self) -> None:
        """Until the client has asked for the end and all is spoken."""
        while (item := await self._items.get()) is not None:
            match item:
                case _Sentence():
                    await self._try_to_say(item)
                    self._queued -= len(item.text)
                    self._spoken += 1
                case _UtteranceEnd(utterance):
                    await self._tell(SessionDone(utterance, self._spoken))
                    self._spoken = 0
            self._quiet_since = _now()
        if self._spoken:
            await self._tell(SessionDone(self._utterance, self._spoken))

    async def _try_to_say(self, sentence: _Sentence) -> None:
        try:
            await self._say(sentence)
        except WebSocketDisconnect:
            raise
        except Exception as error:  # the next sentence may fare better
            await self._tell_failure(error)

    async def _say(self, sentence: _Sentence) -> None:
        """Raises what went wrong, after an `audio.done` if there was an `audio.start`."""
        voice, how = sentence.voice, sentence.voice.how
        synthesis = await how.synthesis(f"{self._id}-{secrets.token_hex(4)}", sentence.text, voice.said)
        place = (sentence.utterance, self._spoken)
        await self._tell(AudioStart(*place, sentence.text, how.delivery.format, how.sample_rate))
        sent = 0
        try:
            async with aclosing(self._frames(synthesis, whole=not voice.config.stream_audio)) as frames:
                async for frame in frames:
                    await self._socket.send_bytes(frame)
                    sent += len(frame)
        except (WebSocketDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            await self._tell(AudioDone(*place, sent, round(synthesis.seconds, 3), usage_of(synthesis), error=True))
            raise
        await self._tell(AudioDone(*place, sent, round(synthesis.seconds, 3), usage_of(synthesis), error=False))
        voice.said.append(Said(sentence.text, np.array(synthesis.rows, dtype=np.int64)))
        del voice.said[:-_REMEMBERED]

    @staticmethod
    async def _frames(synthesis: Synthesis, *, whole: bool) -> AsyncGenerator[bytes, None]:
        if whole:
            yield await synthesis.whole()
            return
        async with aclosing(synthesis.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _tell(self, event: msgspec.Struct) -> None:
        await self._socket.send_text(msgspec.json.encode(event).decode())

    async def _tell_failure(self, error: Exception) -> None:
        shown = as_api_error(error)
        if shown.code == "internal_error":
            _log.error("a speech socket failed", exc_info=error)
        await self._tell(SpeechError(shown.message, shown.code, shown.param))

    async def end(self, errors: list[Exception]) -> None:
        """Close the socket, if it is open still, and say why."""
        code = _NORMAL
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it closed in the meantime
            for error in errors:
                if isinstance(error, _Overdue):
                    code = _POLICY
                    await self._tell(SpeechError(str(error), error.name, None))
                elif not isinstance(error, WebSocketDisconnect):
                    code = _FAILED
                    await self._tell_failure(error)
            if WebSocketState.DISCONNECTED not in (self._socket.client_state, self._socket.application_state):
                await self._socket.close(code)


def _live_text() -> LiveText:
    return LiveText(least=1, most=MAX_BYTES)


def _now() -> float:
    return asyncio.get_running_loop().time()
