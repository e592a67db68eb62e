"""Models in this very process, without a server.

from modalities import SamplingParams, load

model = load("smollm2-135m-instruct")
print(model.generate(["The capital of France is"], SamplingParams(max_tokens=16, temperature=0))[0])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ar_core.config import EngineConfig
from ar_core.request import FinishReason, Output, Request, RequestError, SamplingParams, TokenLogprob, Tokens
from modalities.chat import ChatModel
from modalities.checkpoint import Checkpoint, locate
from modalities.idle import UNLIMITED, leave_idle
from modalities.registry import build_engine, kind_of
from modalities.text import Text

if TYPE_CHECKING:
    from modalities.offline_speech import VoiceModel

_DEFAULT = SamplingParams()

# A text, token ids, or a conversation: a list of {"role": ..., "content": ...}.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def load_model(source: str, config: EngineConfig | None = None, **options: Any) -> LanguageModel | VoiceModel:
    """What `modalities.load` says."""
    checkpoint, settings = locate(source), replace(config or EngineConfig(), **options)
    if kind_of(checkpoint) == "chat":
        return LanguageModel(checkpoint, settings)
    from modalities.offline_speech import VoiceModel  # late: who only chats needs no codec

    return VoiceModel(checkpoint, settings)


class LanguageModel:
    """A language model and its tokenizer. For one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.chat = ChatModel(checkpoint)
        self.engine = build_engine(checkpoint, replace(config, max_queue=UNLIMITED))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] = _DEFAULT,
        *,
        stop: Sequence[str] = (),
        progress: bool = True,
    ) -> list[Text]:
        """What follows each prompt, in their order, computed together.

        `sampling` is one for all, or one for each. Ends at a `stop` string, which is not given out. Raises RequestError
        for a prompt that does not fit the model, before anything is computed.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts have {len(each)} sampling parameters; give one, or as many")
        answers = self._submit(prompts, each, stop)
        with _progress_bar(shown=progress) as bar:
            task = bar.add_task("generating", total=len(prompts))
            try:
                while self.engine.has_work:
                    bar.advance(task, sum(self._note(output, answers) for output in self.engine.step()))
            finally:
                leave_idle(self.engine, answers)
        return [answer.whole for answer in answers.values()]

    def stream(self, prompt: Prompt, sampling: SamplingParams = _DEFAULT, *, stop: Sequence[str] = ()) -> Iterator[str]:
        """The same for one prompt, piece by piece. Closing the iterator early ends the work."""
        answers = self._submit([prompt], [sampling], stop)
        (answer,) = answers.values()
        try:
            while self.engine.has_work:
                for output in self.engine.step():
                    self._note(output, answers)
                if piece := answer.take_new():
                    yield piece
        finally:
            leave_idle(self.engine, answers)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt of any kind."""
        if isinstance(prompt, str):
            return self.chat.encode(prompt)
        messages = [dict(item) for item in prompt if isinstance(item, Mapping)]
        return self.chat.render(messages) if messages else [item for item in prompt if isinstance(item, int)]

    def _submit(self, prompts: Sequence[Prompt], each: list[SamplingParams], stop: Sequence[str]) -> dict[str, _Answer]:
        """Queue all, or none if one of them is refused."""
        answers: dict[str, _Answer] = {}
        try:
            for prompt, sampling in zip(prompts, each, strict=True):
                request = Request(str(next(self._ids)), [Tokens(self.encode(prompt))], sampling)
                self.engine.add(request)
                answers[request.id] = _Answer(self.chat, stop)
        except RequestError:
            leave_idle(self.engine, answers)
            raise
        return answers

    def _note(self, output: Output, answers: Mapping[str, _Answer]) -> bool:
        """Add an output to its answer; whether that ended it."""
        answer = answers[output.request_id]
        if answer.finish is not None:
            return False
        answer.take(output)
        if answer.finish is not None and output.finish is None:  # a stop string: the engine does not know yet
            self.engine.abort(output.request_id)
        return answer.finish is not None


class _Answer:
    """One answer under way."""

    def __init__(self, chat: ChatModel, stop: Sequence[str]) -> None:
        self._stream = chat.text_stream(stop)
        self._text = ""
        self._taken = 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._counts = (0, 0)
        self.finish: FinishReason | None = None

    def take(self, output: Output) -> None:
        """Add what a step emitted."""
        tokens, logprobs = output.tokens, output.logprobs
        if output.finish is FinishReason.STOP:  # the stop token is no part of the text
            tokens, logprobs = tokens[:-1], logprobs and logprobs[:-1]
        self._text += self._stream.push(tokens)
        if output.finish is not None:
            self._text += self._stream.finish()
        self.finish = FinishReason.STOP if self._stream.stopped else output.finish
        self._tokens += tokens
        if logprobs is not None:
            self._logprobs = [*(self._logprobs or []), *logprobs]
        self._counts = (output.prompt_tokens, output.cached_tokens)

    def take_new(self) -> str:
        """The text that came since this was last called."""
        new = self._text[self._taken :]
        self._taken = len(self._text)
        return new

    @property
    def whole(self) -> Text:
        finish: Literal["stop", "length"] = "length" if self.finish is FinishReason.LENGTH else "stop"
        return Text(self._text, self._tokens, finish, *self._counts, self._logprobs)


def _progress_bar(*, shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not shown, console=Console(stderr=True), transient=True)
