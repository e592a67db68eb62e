"""How a stream of frames is cut into chunks: soon at first, and never so that a listener runs dry."""

import itertools

import pytest

from modalities.speech.chunks import PACES, Chunks, Latency


def chunk_sizes(latency: Latency, frames: int) -> list[int]:
    """Of a stream whose frames come one by one."""
    chunks, sizes, waiting = Chunks(latency), [], 0
    for i in range(frames):
        waiting += 1
        if chunks.due(waiting, ended=i == frames - 1):
            sizes.append(waiting)
            waiting = 0
    assert waiting == 0
    return sizes


@pytest.mark.parametrize("latency", PACES)
def test_chunks_begin_small_and_grow_to_a_limit(latency: Latency) -> None:
    pace, sizes = PACES[latency], chunk_sizes(latency, 400)
    assert sum(sizes) == 400
    assert sizes[0] == pace.first
    assert sizes[:-1] == sorted(sizes[:-1]) and sizes[-2] == pace.most
    assert all(after <= before * pace.growth + 1 for before, after in itertools.pairwise(sizes))


def test_low_latency_begins_with_the_first_frame_and_normal_sends_fewer_chunks() -> None:
    assert chunk_sizes("low", 100)[0] == 1
    assert len(chunk_sizes("normal", 100)) < len(chunk_sizes("balanced", 100)) < len(chunk_sizes("low", 100))


def test_an_end_sends_what_there_is_and_nothing_if_there_is_nothing() -> None:
    chunks = Chunks("normal")
    assert not chunks.due(1, ended=False)
    assert chunks.due(1, ended=True)
    assert not chunks.due(0, ended=True)
