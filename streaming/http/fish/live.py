"""The socket /v1/tts/live: text in as it is written, sound out as it is spoken.

in:  start{request}  text{text}  flush  stop          msgpack maps in binary frames
out: audio{audio}  finish{reason}  error{error}

Any number of utterances follow one another on a socket, each from `start` to `stop`. One task reads the socket; each
utterance is a task that waits for the one before it, and ends with the socket.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from contextlib import aclosing, suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from streaming.http.errors import ApiError, bad_request
from streaming.http.fields import checked
from streaming.http.fish import events
from streaming.http.fish.answers import as_fish_error
from streaming.http.fish.requests import MAX_TEXT, SpeechRequest, ignored
from streaming.http.fish.voice import model_for, references_of
from streaming.http.served import ServedVoice
from streaming.speech.live_text import LiveText
from streaming.speech.utterance import Utterance

_IDLE_SECONDS = 600.0  # without a word from the client while nothing is spoken
_MAX_BAD_FRAMES = 100  # one after the other
_MAX_WAITING = 16  # utterances that are not finished
_POLICY_VIOLATION = 1008
_GOING_AWAY = 1001


async def live(socket: WebSocket) -> None:
    await socket.accept()
    try:
        model = model_for(socket.app.state.models, socket.headers.get("model"))
    except ApiError as error:
        await socket.send_bytes(events.error(error))
        await socket.close(_POLICY_VIOLATION)
        return
    await _Conversation(socket, model).run()


class _Spoken:
    """What has been asked to be spoken in one utterance."""

    def __init__(self, request: SpeechRequest) -> None:
        self.request = request
        self.parts: asyncio.Queue[str | None] = asyncio.Queue()  # None: there will be no more
        self.over = False  # by its end or by an error: what still comes for it is dropped
        self._waiting = 0  # characters in `parts`
        self._text = LiveText(request.least_part, request.part_bytes)

    def push(self, text: str) -> None:
        """Raises ApiError if more is waiting than may."""
        if self.over:
            return
        if self._waiting + len(text) > MAX_TEXT:
            raise ApiError(429, f"more than {MAX_TEXT} characters wait to be spoken; send text as it is spoken")
        self._put(self._text.push(text))

    def flush(self) -> None:
        """Speak what there is, without waiting for more."""
        self._put([self._text.flush()])

    def stop(self) -> None:
        self.flush()
        self.parts.put_nowait(None)

    async def take(self) -> str | None:
        part = await self.parts.get()
        self._waiting -= len(part or "")
        return part

    def _put(self, parts: Iterable[str]) -> None:
        for part in parts:
            if part:
                self._waiting += len(part)
                self.parts.put_nowait(part)


class _Conversation:
    def __init__(self, socket: WebSocket, model: ServedVoice) -> None:
        self._socket = socket
        self._model = model
        self._open: _Spoken | None = None  # the utterance that was started and not stopped
        self._tasks: list[asyncio.Task[None]] = []  # of utterances that are not finished
        self._bad_frames = 0
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        try:
            while await self._take_event():
                pass
        except WebSocketDisconnect:
            pass
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take_event(self) -> bool:
        """Whether there may be another."""
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                message = await self._socket.receive()
        except TimeoutError:
            if self._tasks:
                return True
            await self._socket.close(_GOING_AWAY, "nothing was said for too long")
            return False
        if message["type"] == "websocket.disconnect":
            return False
        try:
            self._handle(events.event_of(message.get("bytes")))
            self._bad_frames = 0
        except ApiError as error:
            self._bad_frames += 1
            await self._send(events.error(as_fish_error(error)))
            if self._bad_frames >= _MAX_BAD_FRAMES:
                await self._socket.close(_POLICY_VIOLATION, f"{_MAX_BAD_FRAMES} bad events one after the other")
                return False
        return True

    def _handle(self, event: dict[str, Any]) -> None:
        """Raises ApiError for an event that does not fit; unknown ones are ignored."""
        match event["event"]:
            case "start":
                self._start(event.get("request"))
            case "text":
                self._started("text").push(events.text_of(event))
            case "flush":
                self._started("flush").flush()
            case "stop":
                self._started("stop").stop()
                self._open = None

    def _started(self, event: str) -> _Spoken:
        if self._open is None:
            raise bad_request(f"{event} came without a start; begin with start and its request")
        return self._open

    def _start(self, fields: Any) -> None:
        if self._open is not None and not self._open.over:
            raise bad_request("start came while an utterance is open; end that with stop first")
        if not isinstance(fields, dict):
            raise bad_request('start has no request; it must have one as "request", an object', "request")
        if len(self._tasks) >= _MAX_WAITING:
            raise ApiError(429, f"{_MAX_WAITING} utterances wait on this socket; wait for the finish of some")
        request = checked(SpeechRequest, {"text": "", **fields})
        spoken = self._open = _Spoken(request)
        spoken.push(request.text)
        before = self._tasks[-1] if self._tasks else None
        task = asyncio.create_task(self._speak(spoken, ignored(request, fields), before))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _speak(self, spoken: _Spoken, not_done: list[str], before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        with suppress(WebSocketDisconnect):  # the reader learns of it too
            try:
                if not_done:
                    await self._send(events.ignored(not_done))
                await self._say(spoken)
            except WebSocketDisconnect:
                raise
            except Exception as error:  # whatever it is, the client learns that this utterance is over
                await self._send(events.error(as_fish_error(error)), events.failure())
            finally:
                spoken.over = True

    async def _say(self, spoken: _Spoken) -> None:
        utterance = await self._utterance(spoken.request)
        while (part := await spoken.take()) is not None:
            async with aclosing(utterance.speak(part)) as sound:
                async for data in sound:
                    await self._send(*events.audio(data))
        await self._send(*events.audio(utterance.finish()), events.finish(utterance))

    async def _utterance(self, request: SpeechRequest) -> Utterance:
        options, delivery = request.options(), request.delivery()
        references = await references_of(self._model, request)
        return Utterance(self._model, f"live-{secrets.token_hex(16)}", references, options, delivery)

    async def _send(self, *frames: bytes) -> None:
        """Raises WebSocketDisconnect if nobody is there any more."""
        async with self._sending:
            for frame in frames:
                if self._socket.application_state is not WebSocketState.CONNECTED:
                    raise WebSocketDisconnect
                await self._socket.send_bytes(frame)
