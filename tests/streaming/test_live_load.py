"""Many speakers at once, of whom some leave and some send nonsense: a short form of `benchmarks.live_load`."""

from __future__ import annotations

import asyncio

from benchmarks.live_load import add_voices, disagreements, load, settled
from tests.streaming.speech_server import SpeechServer


def test_nothing_is_lost_and_nothing_left_behind(speech: SpeechServer) -> None:
    voices = add_voices(speech.url, 2)
    speech.until_idle()
    before = settled(speech.url)
    totals = asyncio.run(load(speech.url, 16, 4, voices))
    speech.until_idle()
    assert totals.problems == []
    assert totals.lost == 0
    assert totals.finished > 16 and totals.left > 0
    assert totals.errors == totals.nonsense > 0
    assert disagreements(totals, before, settled(speech.url)) == []
    for name in voices:
        speech.library.delete(name)
