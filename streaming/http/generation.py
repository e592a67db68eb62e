"""Run requests and turn what the engine emits into pieces of text, one sequence per choice of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ar_core.request import FinishReason, Output, Request, TokenLogprob
from streaming.http.errors import ApiError, try_later
from streaming.http.logprobs import LogprobGate, PlacedLogprob
from streaming.http.schema import FinishName, PromptTokensDetails, Usage
from streaming.http.served import ServedModel
from streaming.metrics import StreamTimer

if TYPE_CHECKING:
    from modalities.detokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """What one choice gained. `finish` is set on its last piece."""

    index: int
    text: str
    logprobs: list[PlacedLogprob]
    finish: FinishName | None


class Choice:
    """One sequence of an answer, from token ids to text."""

    def __init__(self, index: int, model: ServedModel, stop: list[str]) -> None:
        self.index = index
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.finish: FinishName | None = None
        self._text: TextStream = model.chat.text_stream(stop)
        self._gate = LogprobGate(model.chat)
        self._timer = StreamTimer(model.name)

    def take(self, output: Output) -> Piece:
        """Raises ApiError if the engine gave the sequence up."""
        if output.finish in (FinishReason.ABORT, FinishReason.ERROR):
            reason = output.error or "the engine gave the request up"
            raise try_later(reason, "engine_error")
        ids = output.tokens
        self.prompt_tokens = output.prompt_tokens
        self.cached_tokens = output.cached_tokens
        self.completion_tokens += len(ids)
        if ids:
            self._timer.tokens(len(ids))
        logprobs: list[TokenLogprob] = output.logprobs or []
        if output.finish is FinishReason.STOP:  # the stop token is no part of the text
            ids, logprobs = ids[:-1], logprobs[: len(ids) - 1]
        text = self._text.push(ids)
        if output.finish is not None and not self._text.stopped:
            text += self._text.finish()
        if self._text.stopped or output.finish is FinishReason.STOP:
            self.finish = "stop"
        elif output.finish is FinishReason.LENGTH:
            self.finish = "length"
        if self.finish is not None:
            self._timer.finish()
        released = self._gate.release(logprobs, text, ended=self.finish is not None and not self._text.stopped)
        return Piece(self.index, text, released, self.finish)


class Generation:
    """The choices of one answer. Iterate `pieces()` once; `usage` is right at any time."""

    def __init__(self, model: ServedModel, requests: list[Request], stop: list[str], n: int) -> None:
        self._model = model
        self._requests = requests
        self._n = n
        self.choices = [Choice(i, model, stop) for i in range(len(requests))]

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many answers were asked for."""
        firsts = self.choices[:: self._n]
        prompt = sum(choice.prompt_tokens for choice in firsts)
        completion = sum(choice.completion_tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in firsts)
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Pieces that arrived together come together. Closing it early cancels what still runs in the engine.

        Raises ApiError, and what `EngineClient.submit` raises.
        """
        return self._single() if len(self._requests) == 1 else self._several()

    async def _single(self) -> AsyncGenerator[list[Piece], None]:
        choice = self.choices[0]
        async with aclosing(self._model.client.submit(self._requests[0])) as outputs:
            async for output in outputs:
                yield [choice.take(output)]
                if choice.finish is not None and output.finish is None:  # a stop string: the engine does not know yet
                    return
        if choice.finish is None:
            raise _cut_short()

    async def _several(self) -> AsyncGenerator[list[Piece], None]:
        arrived: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._collect(i, arrived)) for i in range(len(self._requests))]
        try:
            open_choices = len(tasks)
            while open_choices:
                batch = [await arrived.get()]
                while not arrived.empty():
                    batch.append(arrived.get_nowait())
                pieces = []
                for index, item in batch:
                    choice = self.choices[index]
                    if choice.finish is not None:
                        continue
                    if isinstance(item, Exception):
                        raise item
                    pieces.append(choice.take(item))
                    if choice.finish is not None:
                        open_choices -= 1
                        if item.finish is None:
                            tasks[index].cancel()
                yield pieces
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _collect(self, index: int, arrived: asyncio.Queue[tuple[int, Output | Exception]]) -> None:
        try:
            async with aclosing(self._model.client.submit(self._requests[index])) as outputs:
                async for output in outputs:
                    arrived.put_nowait((index, output))
            arrived.put_nowait((index, _cut_short()))  # read only if there was no end
        except Exception as error:  # it is raised again where the queue is read
            arrived.put_nowait((index, error))


def _cut_short() -> ApiError:
    return try_later("the engine ended the stream without finishing it", "engine_error")
