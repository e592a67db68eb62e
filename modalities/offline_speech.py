"""Speech in this very process, without a server.

from modalities import load

model = load("path/to/a/speech/checkpoint")
me = model.reference("me.wav", "What I say in that recording.")
model.say("Hello there.", me, seed=1).save("hello.wav")
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ar_core.config import EngineConfig
from ar_core.device import pick_device
from ar_core.request import FinishReason, Output
from audio.codec import Codec
from audio.formats import FORMATS, encode_whole
from audio.reading import read_audio
from audio.voices import Reference, Voice
from modalities.checkpoint import Checkpoint, locate
from modalities.idle import UNLIMITED, leave_idle
from modalities.registry import build_speech_engine
from modalities.speech.model import SpeechModel, SpeechOptions

Sound = bytes | str | os.PathLike[str]


@dataclass(frozen=True, eq=False, slots=True)
class Speech:
    """What was spoken: float32 [n] in -1 to 1. `finish` is LENGTH if it had to be cut."""

    samples: np.ndarray
    sample_rate: int  # Hz
    frames: int
    prompt_tokens: int
    cached_tokens: int  # prompt positions whose KV was found in the cache
    finish: FinishReason

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    def save(self, path: Path | str) -> None:
        """Write a sound file of the format that its name ends with. Raises AudioError for another ending."""
        Path(path).write_bytes(encode_whole(self.samples, format_of(path), source_rate=self.sample_rate))


class VoiceModel:
    """A speech model with its codec. For one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.speech = SpeechModel(checkpoint)
        self.engine = build_speech_engine(checkpoint, replace(config, max_queue=UNLIMITED))
        self._ids = itertools.count()

    @property
    def sample_rate(self) -> int:
        return self.speech.sample_rate

    def reference(self, sound: Sound, text: str) -> Reference:
        """A recording, given as its bytes or its path, and what is said in it. Raises AudioError."""
        return _encoded(self.engine.codec, sound, text)

    def say(self, text: str, voice: Voice | Reference | Sequence[Reference] | None = None, **options: Any) -> Speech:
        """Speak a text in a voice, or in the model's own. `options` are fields of SpeechOptions.

        Raises RequestError for what cannot be spoken.
        """
        outputs = list(self._outputs(text, voice, SpeechOptions(**options)))
        last = outputs[-1]
        assert last.finish is not None
        samples = np.concatenate([np.zeros(0, np.float32), *map(_samples, outputs)])
        frames = sum(len(output.rows) for output in outputs) - (last.finish is FinishReason.STOP)
        return Speech(samples, self.sample_rate, frames, last.prompt_tokens, last.cached_tokens, last.finish)

    def say_stream(
        self, text: str, voice: Voice | Reference | Sequence[Reference] | None = None, **options: Any
    ) -> Iterator[np.ndarray]:
        """The same as samples float32 [n], piece by piece. Closing the iterator early ends the work."""
        for output in self._outputs(text, voice, SpeechOptions(**options)):
            if output.payload:
                yield _samples(output)

    def _outputs(
        self, text: str, voice: Voice | Reference | Sequence[Reference] | None, options: SpeechOptions
    ) -> Iterator[Output]:
        request = self.speech.request(str(next(self._ids)), text, _references(voice), options)
        self.engine.add(request)
        try:
            while self.engine.has_work:
                yield from self.engine.step()
        finally:
            leave_idle(self.engine, [request.id])


class Recorder:
    """The codec of a speech model by itself, which is all that it takes to make a voice."""

    def __init__(self, source: str, device: str = "auto") -> None:
        """Raises CheckpointError, and what reading the codec raises."""
        checkpoint = locate(source)
        self.speech = SpeechModel(checkpoint)
        self._codec = Codec.load(checkpoint.path, pick_device(device))

    def reference(self, sound: Sound, text: str) -> Reference:
        """As `VoiceModel.reference`."""
        return _encoded(self._codec, sound, text)


def format_of(path: Path | str) -> str:
    """The sound format that a file's name ends with. Raises ValueError for another ending."""
    suffix = Path(path).suffix.lower()
    for kind in FORMATS.values():
        if kind.suffix == suffix:
            return kind.name
    known = ", ".join(kind.suffix for kind in FORMATS.values())
    raise ValueError(f"{str(path)!r} does not end like a sound file; these do: {known}")


def _encoded(codec: Codec, sound: Sound, text: str) -> Reference:
    samples = torch.from_numpy(read_audio(sound, codec.config.sample_rate))
    return Reference(codec.encode(samples[None])[0].cpu().numpy(), text)


def _references(voice: Voice | Reference | Sequence[Reference] | None) -> Sequence[Reference]:
    match voice:
        case None:
            return ()
        case Voice():
            return voice.references
        case Reference():
            return [voice]
        case _:
            return voice


def _samples(output: Output) -> np.ndarray:
    return np.frombuffer(output.payload or b"", dtype=np.float32)
