"""The voices on disk that requests can name."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from audio.errors import AudioError
from audio.voice_file import (
    SUFFIX,
    Reference,
    UnusableVoice,
    Voice,
    checked_name,
    checked_references,
    digest_of,
    file_name,
    pack,
    unpack,
)

__all__ = ["LibraryFull", "Reference", "UnknownVoice", "UnusableVoice", "Voice", "VoiceExists", "VoiceLibrary"]

log = logging.getLogger(__name__)

_SHOWN = 20  # names in an error
_POLL = 0.005  # seconds between two tries for the lock, which is held for about as long
_Stamp = tuple[int, int, int]  # inode, time of change and size: a file that was replaced has another inode


class UnknownVoice(LookupError):
    """There is no voice of that name; the message lists those that there are."""


class VoiceExists(AudioError):
    """The name is taken."""


class LibraryFull(AudioError):
    """The library holds as many voices as it may."""


class VoiceLibrary:
    """The voices in a folder, one file each.

    Any number of processes may read and write the folder: a file appears whole or not at all, writers take turns, and
    readers see what others changed at their next call. `codec` is the fingerprint of the codec whose codes are usable
    here; None accepts any. `max_bytes` is for one voice's file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        codec: str | None = None,
        max_voices: int = 1000,
        max_bytes: int = 1 << 20,
    ) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._codec = codec
        self._max_voices = max_voices
        self._max_bytes = max_bytes
        self._known: dict[str, tuple[_Stamp, Voice | UnusableVoice]] = {}  # by file name

    def add(
        self,
        name: str,
        references: Sequence[Reference],
        *,
        codec: str,
        sample_rate: int,
        samples_per_frame: int,
        description: str = "",
    ) -> Voice:
        """Keep a new voice.

        Raises VoiceExists if the name is taken, LibraryFull, and AudioError for a name, codes or a size that cannot be.
        """
        checked = checked_references(references)
        voice = Voice(
            name=checked_name(name),
            references=checked,
            codec=codec,
            sample_rate=sample_rate,
            samples_per_frame=samples_per_frame,
            description=description,
            created_at=time.time(),
            digest=digest_of(codec, checked),
        )
        with self._writing():
            self._refuse_taken(name)
            count = len(self._files())
            if count >= self._max_voices:
                raise LibraryFull(f"there are {count} voices, and {self._max_voices} are allowed; delete one first")
            self._write(voice)
        return voice

    def get(self, name: str) -> Voice:
        """Raises UnknownVoice if there is none of that name, UnusableVoice if its file is no good here."""
        voice = self._load(file_name(name))
        if voice is None:
            raise self._unknown(name)
        if isinstance(voice, UnusableVoice):
            raise UnusableVoice(f"voice {name!r} cannot be used: {voice}")
        if self._codec not in (None, voice.codec):
            raise UnusableVoice(
                f"voice {name!r} was made with codec {voice.codec}, and this one is {self._codec}; "
                "add the voice again from its recording"
            )
        return voice

    def list(self) -> list[Voice]:
        """All voices by name, those of another codec included. Damaged files are passed over; the log warns of them."""
        files = self._files()
        for gone in self._known.keys() - set(files):
            self._known.pop(gone, None)
        return sorted((v for f in files if isinstance(v := self._load(f), Voice)), key=lambda v: v.name)

    def rename(self, old: str, new: str) -> Voice:
        """Raises what `get` raises for `old`, and VoiceExists or AudioError for `new`."""
        checked_name(new)
        with self._writing():
            voice = replace(self.get(old), name=new)
            self._refuse_taken(new)
            self._write(voice)
            (self._folder / file_name(old)).unlink()
        return voice

    def describe(self, name: str, description: str) -> Voice:
        """Give a voice another description. Raises what `get` raises."""
        with self._writing():
            voice = replace(self.get(name), description=description)
            self._write(voice)
        return voice

    def delete(self, name: str) -> None:
        """Raises UnknownVoice if there is none of that name. A damaged one can be deleted too."""
        with self._writing():
            try:
                (self._folder / file_name(name)).unlink()
            except FileNotFoundError:
                raise self._unknown(name) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, over all processes; the system takes the lock from a writer that dies."""
        with FileLock(self._folder / ".lock").acquire(poll_interval=_POLL):
            for left_behind in self._folder.glob(".new-*"):  # by a writer that died: no other one is at work now
                left_behind.unlink()
            yield

    def _write(self, voice: Voice) -> None:
        data = pack(voice)
        if len(data) > self._max_bytes:
            raise AudioError(f"voice {voice.name!r} takes {len(data)} bytes; at most {self._max_bytes} are allowed")
        descriptor, path = tempfile.mkstemp(prefix=".new-", dir=self._folder)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.chmod(path, 0o644)  # mkstemp's files are for their owner alone, and a library may have several users
        os.replace(path, self._folder / file_name(voice.name))

    def _files(self) -> tuple[str, ...]:
        return tuple(e.name for e in os.scandir(self._folder) if e.name.endswith(SUFFIX))

    def _load(self, file: str) -> Voice | UnusableVoice | None:
        """The voice in a file, what is wrong with it, or None if there is no such file."""
        path = self._folder / file
        try:
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            known = self._known.get(file)
            if known is None or known[0] != stamp:
                known = self._known[file] = (stamp, self._read(path, stat.st_size))
        except FileNotFoundError:
            return None
        return known[1]

    def _read(self, path: Path, size: int) -> Voice | UnusableVoice:
        try:
            if size > self._max_bytes:
                raise UnusableVoice(f"its file {path.name} has {size} bytes; at most {self._max_bytes} are allowed")
            return unpack(path)
        except UnusableVoice as error:
            log.warning("a voice in %s is passed over: %s", self._folder, error)
            return error

    def _refuse_taken(self, name: str) -> None:
        if (self._folder / file_name(name)).exists():
            raise VoiceExists(f"there is a voice {name!r} already; delete it first or choose another name")

    def _unknown(self, name: str) -> UnknownVoice:
        names = [repr(v.name) for v in self.list()]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        there = f"there are {', '.join(names[:_SHOWN])}{more}" if names else "there are none yet"
        return UnknownVoice(f"there is no voice {name!r}; {there}")
