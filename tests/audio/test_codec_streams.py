"""Streams give the samples and the codes of one whole call, whatever happens around them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from audio.codec import Codec, StreamingDecoder, StreamingEncoder
from tests.audio.tiny_codec import FOLDER, golden, greedy_speech, some_codes, some_sound, tiny_codec

SLOTS = 3
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Life:
    """A stream: when it opens, and how many frames (or samples) it brings at each step after."""

    opens: int
    pieces: list[int]


def lives(largest: int) -> st.SearchStrategy[list[Life]]:
    pieces = st.lists(st.integers(0, largest), min_size=1, max_size=5)
    return st.lists(st.builds(Life, st.integers(0, 6), pieces), min_size=1, max_size=5)


def stream(streamer, plan: list[Life], inputs: list[torch.Tensor], call, finish) -> list[torch.Tensor]:
    """Run the streams, each as soon as it may open and a slot is free; what each gave, joined."""
    outputs: list[list[torch.Tensor]] = [[] for _ in plan]
    waiting, running, step = sorted(range(len(plan)), key=lambda i: plan[i].opens), {}, 0
    fed = [0] * len(plan)
    while waiting or running:
        while waiting and plan[waiting[0]].opens <= step and len(running) < SLOTS:
            running[streamer.open()] = (waiting.pop(0), 0)
        new = {}
        for slot, (i, piece) in running.items():
            size = plan[i].pieces[piece]
            new[slot] = inputs[i][..., fed[i] : fed[i] + size]
            fed[i] += size
        for slot, output in call(new).items():
            outputs[running[slot][0]].append(output)
        for slot, (i, piece) in list(running.items()):
            running[slot] = (i, piece + 1)
            if piece + 1 == len(plan[i].pieces):
                outputs[i] += finish(slot)
                del running[slot]
        step += 1
    return [torch.cat(pieces, -1) for pieces in outputs]


@settings(max_examples=20, deadline=None)
@given(lives(8))
def test_any_split_of_any_streams_gives_the_samples_of_whole_decodes(plan):
    decoder = StreamingDecoder(tiny_codec(), SLOTS)
    codes = [some_codes(sum(life.pieces), seed) for seed, life in enumerate(plan)]

    def finish(slot: int) -> list[torch.Tensor]:
        decoder.close(slot)
        return []

    for samples, whole in zip(stream(decoder, plan, codes, decoder.decode, finish), codes):
        torch.testing.assert_close(samples, tiny_codec().decode(whole[None])[0], atol=TOLERANCE, rtol=0)


@settings(max_examples=10, deadline=None)
@given(lives(5000))
def test_any_split_of_any_streams_gives_the_codes_of_whole_encodes(plan):
    encoder = StreamingEncoder(tiny_codec(), SLOTS)
    sounds = [some_sound(sum(life.pieces), seed) for seed, life in enumerate(plan)]
    found = stream(encoder, plan, sounds, encoder.encode, lambda slot: [encoder.finish(slot)])
    for codes, whole in zip(found, sounds):
        assert codes.shape == (10, tiny_codec().frame_count(len(whole)))
        if len(whole):
            assert torch.equal(codes, tiny_codec().encode(whole[None])[0])


@pytest.mark.parametrize("frames", [1, 7])
def test_streamed_speech_sounds_as_the_references(frames):
    codes, samples = greedy_speech("ref")
    decoder = StreamingDecoder(tiny_codec(), 1)
    slot = decoder.open()
    pieces = [decoder.decode({slot: piece})[slot] for piece in codes.split(frames, 1)]
    torch.testing.assert_close(torch.cat(pieces), samples, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("samples", [441, 2048, 5000, 60417])
def test_streamed_codes_are_the_references(samples):
    encoder = StreamingEncoder(tiny_codec(), 1)
    slot = encoder.open()
    pieces = [encoder.encode({slot: piece})[slot] for piece in golden()["wav"].split(samples)]
    assert torch.equal(torch.cat([*pieces, encoder.finish(slot)], 1), golden()["codes"].long())


def test_a_long_stream_outgrows_no_table(monkeypatch):
    monkeypatch.setattr("audio.codec.transformer._FIRST_POSITIONS", 8)
    codec = Codec.load(FOLDER)
    codes = some_codes(40)
    decoder = StreamingDecoder(codec, 1)
    slot = decoder.open()
    pieces = [decoder.decode({slot: piece})[slot] for piece in codes.split(6, 1)]
    torch.testing.assert_close(torch.cat(pieces), tiny_codec().decode(codes[None])[0], atol=TOLERANCE, rtol=0)


def test_bfloat16_streams_stay_near_their_whole_decode():
    codec = Codec.load(FOLDER, dtype=torch.bfloat16)
    codes = some_codes(20)
    decoder = StreamingDecoder(codec, 1)
    slot = decoder.open()
    pieces = torch.cat([decoder.decode({slot: piece})[slot] for piece in codes.split(3, 1)])
    whole = codec.decode(codes[None])[0]
    assert (pieces - whole).square().mean().sqrt() < 0.02 * whole.abs().max()


def test_a_reopened_slot_remembers_nothing():
    decoder = StreamingDecoder(tiny_codec(), 1)
    slot = decoder.open()
    decoder.decode({slot: some_codes(12, 1)})
    decoder.close(slot)
    slot = decoder.open()
    codes = some_codes(5, 2)
    expected = tiny_codec().decode(codes[None])[0]
    torch.testing.assert_close(decoder.decode({slot: codes})[slot], expected, atol=TOLERANCE, rtol=0)

    encoder = StreamingEncoder(tiny_codec(), 1)
    slot = encoder.open()
    encoder.encode({slot: some_sound(5000, 1)})
    encoder.close(slot)
    slot = encoder.open()
    sound = some_sound(4096, 2)
    assert torch.equal(encoder.encode({slot: sound})[slot], tiny_codec().encode(sound[None])[0])


def test_a_poisoned_free_slot_harms_nobody_and_is_clean_when_opened():
    decoder = StreamingDecoder(tiny_codec(), 4)
    slots = [decoder.open() for _ in range(4)]
    decoder.close(slots[1])
    decoder._slots.rows[slots[1]] = torch.nan
    codes = {slot: some_codes(6, slot) for slot in (slots[0], slots[2], slots[3])}
    decoder.decode({slot: codes[slot][:, :2] for slot in codes})
    slot = decoder.open()
    assert slot == slots[1]
    codes[slot] = some_codes(6, slot)
    last = decoder.decode({s: codes[s][:, 2:] for s in codes if s != slot} | {slot: codes[slot]})
    for s, samples in last.items():
        expected = tiny_codec().decode(codes[s][None])[0][-len(samples) :]
        torch.testing.assert_close(samples, expected, atol=TOLERANCE, rtol=0)


def test_a_refused_call_moves_no_stream():
    decoder = StreamingDecoder(tiny_codec(), 2)
    slot = decoder.open()
    codes = some_codes(4)
    first = decoder.decode({slot: codes[:, :2]})[slot]
    with pytest.raises(ValueError, match="slot 1 is not open"):
        decoder.decode({slot: codes[:, 2:], 1: codes})
    with pytest.raises(ValueError, match=r"\[9, 4\]; they must be integers \[10, frames\]"):
        decoder.decode({slot: codes[:9]})
    samples = torch.cat((first, decoder.decode({slot: codes[:, 2:]})[slot]))
    torch.testing.assert_close(samples, tiny_codec().decode(codes[None])[0], atol=TOLERANCE, rtol=0)


def test_slots_run_out_and_come_back():
    decoder = StreamingDecoder(tiny_codec(), 2)
    slots = {decoder.open(), decoder.open()}
    assert slots == {0, 1}
    with pytest.raises(RuntimeError, match="all 2 slots are open"):
        decoder.open()
    decoder.close(1)
    assert decoder.open() == 1
    with pytest.raises(ValueError, match="slot 7 is not open"):
        decoder.close(7)
    with pytest.raises(ValueError, match="slots is 0; it must be at least 1"):
        StreamingEncoder(tiny_codec(), 0)


def test_samples_of_another_form_are_refused():
    encoder = StreamingEncoder(tiny_codec(), 1)
    slot = encoder.open()
    with pytest.raises(ValueError, match=r"samples are torch.int16 \[4\]; they must be floats \[samples\]"):
        encoder.encode({slot: torch.zeros(4, dtype=torch.int16)})


def test_a_frame_costs_the_same_however_much_came_before():
    decoder = StreamingDecoder(tiny_codec(), 1)
    slot = decoder.open()
    codes = some_codes(60)
    costs = []
    for frame in range(60):
        with FlopCounterMode(display=False) as counter:
            decoder.decode({slot: codes[:, frame : frame + 1]})
        costs.append(counter.get_total_flops())
    assert len(set(costs)) == 1
    with FlopCounterMode(display=False) as counter:
        tiny_codec().decode(codes[None])
    # What streaming adds is the window's keys, which a whole decode shares among a block of queries.
    assert sum(costs) < 1.1 * counter.get_total_flops()
