"""The voices that a request may ask for: those of the library by name, and recordings that come with the request."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import numpy as np

from ar_core.request import Output, Request
from audio.errors import AudioError
from audio.reading import read_audio
from audio.voices import Reference, Voice, VoiceLibrary
from modalities.speech.model import SpeechModel
from modalities.speech.segments import Recording
from streaming.client import EngineUnavailable

DEFAULT_VOICE = "default"  # what requests call the model's own

_REMEMBERED = 256  # recordings whose codes are kept

Submit = Callable[[Request], AsyncGenerator[Output, None]]


class References:
    """For one event loop. `submit` is that of the speech model's EngineClient."""

    def __init__(self, model: SpeechModel, library: VoiceLibrary, submit: Submit) -> None:
        self.library = library
        self._model = model
        self._submit = submit
        self._codes: OrderedDict[bytes, asyncio.Task[np.ndarray]] = OrderedDict()  # by digest, used last at the end
        self._ids = itertools.count()

    def named(self, name: str) -> list[Reference]:
        """A voice's references. Raises UnknownVoice, whose message lists those that there are, or UnusableVoice."""
        return list(self.library.get(name).references)

    async def recorded(self, sound: bytes, text: str) -> Reference:
        """A recording in any sound format, and what is said in it. Raises AudioError for one that cannot be used.

        Its codes are remembered by its content: the second request with it need neither decode nor encode it.
        """
        digest = hashlib.blake2b(sound, digest_size=16).digest()
        task = self._codes.get(digest)
        if task is None:
            task = self._codes[digest] = asyncio.create_task(self._encode(sound))
            task.add_done_callback(lambda done: self._forget_failure(digest, done))
        self._codes.move_to_end(digest)
        while len(self._codes) > _REMEMBERED:
            self._codes.popitem(last=False)
        # Shielded: others may wait for the same recording when this request's client goes away.
        return Reference(await asyncio.shield(task), text)

    async def add(self, name: str, sound: bytes, text: str, description: str = "") -> Voice:
        """Keep a recording as a voice. Raises AudioError and what `VoiceLibrary.add` raises."""
        return await self.keep(name, [await self.recorded(sound, text)], description)

    async def keep(self, name: str, references: Sequence[Reference], description: str = "") -> Voice:
        """Keep a voice of one or more references. Raises what `VoiceLibrary.add` raises."""
        refuse_reserved(name)
        codec = self._model.codec
        return await asyncio.to_thread(
            self.library.add,
            name,
            references,
            codec=self._model.codec_fingerprint,
            sample_rate=codec.sample_rate,
            samples_per_frame=codec.frame_size,
            description=description,
        )

    async def _encode(self, sound: bytes) -> np.ndarray:
        samples = await asyncio.to_thread(read_audio, sound, self._model.sample_rate)
        return await self.encode(samples)

    async def encode(self, samples: np.ndarray) -> np.ndarray:
        """Samples float32 [n] at the model's rate -> codes int32 [K, T]. Raises what `EngineClient.submit` raises."""
        request = Request(f"encode-{next(self._ids)}", [Recording(samples)])
        async with aclosing(self._submit(request)) as outputs:
            async for output in outputs:
                if output.payload is not None:
                    return self._model.codes(output.payload)
                if output.finish is not None:
                    raise EngineUnavailable(output.error or "the engine gave the recording up")
        raise EngineUnavailable("the engine ended without codes for the recording")

    def _forget_failure(self, digest: bytes, done: asyncio.Task[np.ndarray]) -> None:
        """Keep no failure, and let nobody complain that it was never looked at."""
        if (done.cancelled() or done.exception() is not None) and self._codes.get(digest) is done:
            del self._codes[digest]


def refuse_reserved(name: str) -> None:
    """Raises AudioError for the name that stands for no voice of the library."""
    if name == DEFAULT_VOICE:
        raise AudioError(f"{DEFAULT_VOICE!r} means the model's own voice; choose another name")
