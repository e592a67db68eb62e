"""The host's half of a speech model: from a text and a voice to what the engine is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ar_core.models.dual_ar_config import DualARConfig
from ar_core.request import Frames, Request, RequestError, SamplingParams, Tokens
from audio.codec import CodecConfig
from modalities.checkpoint import Checkpoint
from modalities.speech.chunks import PACES, Latency
from modalities.speech.prompt import Recorded, closing, opening, system
from modalities.speech.segments import Prompt, Turn
from modalities.speech.split import MAX_BYTES, split
from modalities.speech.tokenizer import SPEAKER_TAG, SpeechTokenizer

_AVOID_REPEATS = 10  # emitted tokens that are looked back at
# No voice needs longer for a byte of text than this, pauses included; who speaks longer has lost the thread.
_SECONDS_PER_BYTE = 0.35
_SECONDS_AT_LEAST = 6.0
_FINGERPRINT_BYTES = 1 << 20
_NOT_IN_A_TAG = str.maketrans({"[": "(", "]": ")", "\n": " ", "\r": " "})


@dataclass(frozen=True, slots=True)
class SpeechOptions:
    """How a text is spoken. With a temperature of 0 both transformers are greedy."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 30
    repetition_penalty: float = 1.0  # on semantic tokens spoken in the same part
    seed: int | None = None
    max_frames: int = 1024  # of each part of the text
    part_bytes: int = MAX_BYTES  # a longer text is spoken in parts
    remember: bool = True  # parts are spoken with those before them in mind
    style: str = ""  # how it is said, in free words: each part begins with it, in brackets
    latency: Latency = "normal"
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        for name, allowed, ok in (
            ("max_frames", "at least 1", self.max_frames >= 1),
            ("part_bytes", "at least 64", self.part_bytes >= 64),
            ("latency", ", ".join(PACES), self.latency in PACES),
        ):
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be {allowed}", name)


@dataclass(frozen=True, slots=True)
class Said:
    """What was spoken before: a text, and the rows that the model emitted for it, int64 [n, K + 1]."""

    text: str
    rows: np.ndarray


class SpeechModel:
    """A dual-AR model's tokenizer and its codec's sizes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        folder = checkpoint.path
        config = DualARConfig.read(folder)
        self.tokenizer = SpeechTokenizer(folder)
        self.max_context: int = config.max_context
        self.codec = _codec_config(folder)
        self.codec_fingerprint = _fingerprint(folder, self.codec)

    @property
    def sample_rate(self) -> int:
        """Samples per second of what the engine gives and takes."""
        return self.codec.sample_rate

    def request(
        self,
        request_id: str,
        text: str,
        references: Sequence[Recorded] = (),
        options: SpeechOptions = SpeechOptions(),
        before: Sequence[Said] = (),
    ) -> Request:
        """Ask for `text` in the voice of the references, going on from what was said `before` as far as that fits.

        Raises RequestError for what cannot be spoken.
        """
        parts = split(text, options.part_bytes)
        if not parts:
            raise RequestError(
                "input has nothing to speak; it must have at least one character that is no space", "input"
            )
        sampling = SamplingParams(
            max_tokens=options.max_frames,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            temperature_last=True,
            avoid_repeats=0 if options.temperature == 0 else _AVOID_REPEATS,
        )
        turns = [self._turn(part, options) for part in parts]
        start = system(self.tokenizer, references)
        room = self.max_context - _length(start) - max(_length(turn.opening) + turn.max_frames for turn in turns)
        segments = [*start, *self._history(before if options.remember else (), room), *turns]
        return Request(request_id, segments, sampling, options.priority, options.cache_salt)

    def _history(self, before: Sequence[Said], room: int) -> Prompt:
        """The last of what was said, as much as has room, in the order of the conversation."""
        kept: Prompt = ()
        for said in reversed(before):
            frames = Frames(said.rows[self.tokenizer.is_frame(said.rows)])
            turn = (*opening(self.tokenizer, said.text), frames, closing(self.tokenizer))
            room -= _length(turn)
            if room < 0:
                break
            kept = (*turn, *kept)
        return kept

    def codes(self, payload: bytes) -> np.ndarray:
        """The engine's answer to a Recording: int32 [K, T]."""
        return np.frombuffer(payload, dtype=np.int32).reshape(self.codec.num_codebooks, -1)

    def _turn(self, text: str, options: SpeechOptions) -> Turn:
        return Turn(
            opening=tuple(opening(self.tokenizer, _styled(text, options.style))),
            closing=(closing(self.tokenizer),),
            max_frames=min(options.max_frames, self._most_frames(text)),
            latency=options.latency,
            alone=not options.remember,
        )

    def _most_frames(self, text: str) -> int:
        seconds = _SECONDS_AT_LEAST + _SECONDS_PER_BYTE * len(text.encode())
        return int(seconds * self.codec.frame_rate)


def _styled(text: str, style: str) -> str:
    """A text with a style tag at its head, behind the speaker's own tag if it begins with one."""
    words = style.translate(_NOT_IN_A_TAG).strip()
    if not words:
        return text
    speaker = SPEAKER_TAG.match(text)
    at = speaker.end() if speaker else 0
    return f"{text[:at]}[{words}] {text[at:].lstrip()}"


def _length(segments: Sequence[Tokens | Frames]) -> int:
    """Positions of the segments."""
    return sum(len(part.ids) if isinstance(part, Tokens) else len(part.rows) for part in segments)


def _codec_config(folder: Path) -> CodecConfig:
    sizes = folder / "codec.json"
    return CodecConfig.read(sizes) if sizes.exists() else CodecConfig()


def _fingerprint(folder: Path, config: CodecConfig) -> str:
    """Tells codecs apart: codes of one mean nothing to another. Looks at the ends of the file, not at gigabytes."""
    digest = hashlib.blake2b(json.dumps(config.to_dict(), sort_keys=True).encode(), digest_size=8)
    for file in (folder / "codec.pth", folder / "codec.safetensors"):
        if file.exists():
            size = file.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with file.open("rb") as opened:
                digest.update(opened.read(_FINGERPRINT_BYTES))
                opened.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(opened.read())
    return digest.hexdigest()
