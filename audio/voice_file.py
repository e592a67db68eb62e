"""A voice as a file: safetensors with the codes of its references, and everything else as JSON in the metadata."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from audio.errors import AudioError

SUFFIX = ".safetensors"

_DAMAGE = (  # what reading a file raises that is not what it seems
    safetensors.SafetensorError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    RecursionError,
)
_NAME = re.compile(r"[A-Za-z0-9 ._-]{1,255}")


class UnusableVoice(AudioError):
    """The voice is there, but its file is damaged or its codes belong to another codec."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A recording as the codec's codes, integers [K, T], and what is said in it."""

    codes: np.ndarray
    text: str


@dataclass(frozen=True, eq=False)
class Voice:
    """One voice of the library. `codec` names the codec that made the codes, `digest` covers codes, texts and codec."""

    name: str
    references: tuple[Reference, ...]
    codec: str
    sample_rate: int  # Hz
    samples_per_frame: int
    description: str
    created_at: float  # seconds since 1970
    digest: str

    @property
    def frames(self) -> int:
        """Frames of all references together."""
        return sum(r.codes.shape[1] for r in self.references)

    @property
    def duration(self) -> float:
        """Seconds of all references together."""
        return self.frames * self.samples_per_frame / self.sample_rate


def checked_name(name: str) -> str:
    """The name itself. Raises AudioError if a voice cannot be called that."""
    if not _NAME.fullmatch(name) or name != name.strip(" ") or not name.strip("."):
        raise AudioError(
            f"{name[:300]!r} cannot be a voice's name: 1 to 255 letters (a-z, A-Z), digits, spaces, '-', '_' and '.', "
            "no space at either end, not dots alone"
        )
    return name


def file_name(name: str) -> str:
    """Readable, short enough for any file system, and apart for names that differ in case alone."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", name[:40])
    return f"{readable}-{hashlib.sha256(_utf8(name)).hexdigest()[:20]}{SUFFIX}"


def checked_references(references: Sequence[Reference]) -> tuple[Reference, ...]:
    """The references with their codes as they are kept. Raises AudioError if there are none or codes are no codes."""
    if not references:
        raise AudioError("a voice needs at least one reference, and this one has none")
    return tuple(Reference(_checked_codes(r.codes), r.text) for r in references)


def pack(voice: Voice) -> bytes:
    """The bytes of the voice's file."""
    facts = {name: getattr(voice, name) for name in (*_FACTS, "frames", "duration")}
    facts["texts"] = [r.text for r in voice.references]
    codes = {f"codes.{i}": r.codes for i, r in enumerate(voice.references)}
    return save(codes, metadata={"voice": json.dumps(facts)})


def unpack(path: Path) -> Voice:
    """Raises FileNotFoundError, and UnusableVoice if the file is not what `pack` made of a voice of its name."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            facts = json.loads(file.metadata()["voice"])
            codes = [file.get_tensor(f"codes.{i}") for i in range(len(facts["texts"]))]
        references = checked_references([Reference(c, str(t)) for c, t in zip(codes, facts["texts"], strict=True)])
        voice = Voice(references=references, **{name: kind(facts[name]) for name, kind in _FACTS.items()})
    except FileNotFoundError:
        raise
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UnusableVoice(f"its file {path.name} is damaged ({error!r})") from error
    if voice.digest != digest_of(voice.codec, references):
        raise UnusableVoice(f"its file {path.name} is damaged (its digest does not fit its contents)")
    if file_name(voice.name) != path.name:
        raise UnusableVoice(f"{path.name} holds voice {voice.name!r}, whose file is called {file_name(voice.name)}")
    return voice


def digest_of(codec: str, references: Sequence[Reference]) -> str:
    """Equal for equal codes, texts and codec, in hexadecimal."""
    digest = hashlib.blake2b(codec.encode(), digest_size=20)
    for r in references:
        text = _utf8(r.text)
        digest.update(np.array([*r.codes.shape, len(text)], "<i8").tobytes())
        digest.update(r.codes.astype("<i4").tobytes())
        digest.update(text)
    return digest.hexdigest()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON can carry half a surrogate pair


def _checked_codes(codes: np.ndarray) -> np.ndarray:
    """int16 [K, T] where the codes fit, else int32; read-only."""
    if codes.ndim != 2 or 0 in codes.shape or codes.dtype.kind not in "iu":
        raise AudioError(f"codes are {codes.dtype} {list(codes.shape)}; they must be integers [codebooks, frames]")
    least, most = int(codes.min()), int(codes.max())
    if least < 0 or most >= 1 << 31:
        raise AudioError(f"codes go from {least} to {most}; they must lie between 0 and 2**31 - 1")
    kept = np.ascontiguousarray(codes.astype(np.int16 if most < 1 << 15 else np.int32))
    kept.flags.writeable = False
    return kept


_FACTS = {
    "name": str,
    "codec": str,
    "sample_rate": int,
    "samples_per_frame": int,
    "description": str,
    "created_at": float,
    "digest": str,
}
