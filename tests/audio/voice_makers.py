"""Voices that tests are made with, and processes that make them at the same time."""

from __future__ import annotations

import logging
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from audio.voices import LibraryFull, Reference, UnknownVoice, UnusableVoice, Voice, VoiceExists, VoiceLibrary


def reference(seed: int = 0, frames: int = 20, most: int = 4096) -> Reference:
    return Reference(np.random.default_rng(seed).integers(0, most, (10, frames)), f"What is said, number {seed}.")


def add(library: VoiceLibrary, name: str, *references: Reference, codec: str = "codec-1") -> Voice:
    return library.add(
        name,
        references or [reference()],
        codec=codec,
        sample_rate=44100,
        samples_per_frame=2048,
        description="Calm.",
    )


def add_the_same(folder: Path, me: int, barrier: Barrier, results: Queue[object]) -> None:
    library = VoiceLibrary(folder)
    won = []
    for i in range(30):
        barrier.wait(60)
        try:
            add(library, f"v{i}", reference(me))
            won.append(i)
        except VoiceExists:
            pass
    results.put((me, won))


def add_up_to_the_limit(folder: Path, me: int, barrier: Barrier, results: Queue[object]) -> None:
    library = VoiceLibrary(folder, max_voices=10)
    barrier.wait(60)
    added = 0
    for i in range(8):
        try:
            add(library, f"v{me}-{i}")
            added += 1
        except LibraryFull:
            pass
    results.put(added)


def read_and_write(folder: Path, me: int, barrier: Barrier, results: Queue[object]) -> None:
    """Two write and say when they are done, the others read until then. The result: damaged files seen, reads."""
    logging.disable(logging.CRITICAL)
    library = VoiceLibrary(folder)
    barrier.wait(60)
    if me < 2:
        for i in range(40):
            add(library, f"v{me}", reference(i, frames=10 + i))
            library.rename(f"v{me}", f"w{me}")
            library.delete(f"w{me}")
        (folder / f"done {me}").touch()
        results.put(([], 0))
        return
    damaged, reads = [], 0
    while len(list(folder.glob("done *"))) < 2:
        for name in ("v0", "w0", "v1", "w1"):
            try:
                reads += library.get(name).name == name
            except UnknownVoice:
                pass  # not there at this moment
            except UnusableVoice as error:
                damaged.append(repr(error))
        reads += len(library.list())
    results.put((damaged, reads))
