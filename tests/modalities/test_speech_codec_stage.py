"""The stage between model and listener: frames in, samples out, one decoder stream for each speech."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ar_core.request import FinishReason
from modalities.speech.codec_stage import CodecStage
from tests.audio.tiny_codec import some_codes, tiny_codec

END = [259, *[0] * 10]
FRAME = tiny_codec().config.frame_size


def rows(codes: torch.Tensor) -> list[list[int]]:
    """As the model emits them: a semantic token before the codes."""
    return [[300, *column] for column in codes.T.tolist()]


def decoded(codes: torch.Tensor) -> np.ndarray:
    return tiny_codec().decode(codes[None])[0].numpy()


def samples(payloads: list[bytes | None]) -> np.ndarray:
    return np.concatenate([np.frombuffer(payload or b"", np.float32) for payload in payloads])


def play(stage: CodecStage, request_id: str, codes: torch.Tensor, finish: FinishReason) -> list[bytes | None]:
    """Frames one by one, the last with the end of the turn."""
    emitted = rows(codes)
    payloads = [stage.process([(request_id, [row], None)])[0] for row in emitted[:-1]]
    last = [emitted[-1], END] if finish is FinishReason.STOP else [emitted[-1]]
    return [*payloads, *stage.process([(request_id, last, finish)])]


def test_turns_of_one_speech_are_one_stream() -> None:
    stage = CodecStage(tiny_codec(), slots=2)
    stage.open("a", "low")
    parts = [some_codes(5, seed=1), some_codes(7, seed=2), some_codes(1, seed=3)]
    payloads = []
    for turn, (codes, finish) in enumerate(zip(parts, (FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP))):
        payloads += play(stage, f"a/{turn}", codes, finish)
    stage.close("a")
    assert np.abs(samples(payloads) - decoded(torch.cat(parts, 1))).max() < 1e-4


def test_streams_are_decoded_together_and_do_not_mix() -> None:
    stage = CodecStage(tiny_codec(), slots=4)
    codes = {name: some_codes(6, seed=i) for i, name in enumerate("abc")}
    for name in codes:
        stage.open(name, "balanced")
    said: dict[str, list[bytes | None]] = {name: [] for name in codes}
    for i in range(6):
        finish = FinishReason.LENGTH if i == 5 else None
        batch = [(f"{name}/0", [rows(codes[name])[i]], finish) for name in codes]
        for name, payload in zip(codes, stage.process(batch), strict=True):
            said[name].append(payload)
    for name, payloads in said.items():
        assert np.abs(samples(payloads) - decoded(codes[name])).max() < 1e-4
    assert (stage.batches, stage.items) == (3, 9)  # 2, 3 and the last frame of each


def test_a_turn_that_is_aborted_or_closed_makes_no_sound() -> None:
    stage = CodecStage(tiny_codec(), slots=1)
    stage.open("a", "low")
    assert stage.process([("a/0", rows(some_codes(3)), FinishReason.ABORT)]) == [None]
    stage.close("a")
    assert stage.process([("a/0", rows(some_codes(3)), None), ("b/0", [END], FinishReason.STOP)]) == [None, None]


def test_a_turn_of_nothing_but_its_end_makes_no_sound() -> None:
    stage = CodecStage(tiny_codec(), slots=1)
    stage.open("a", "low")
    assert stage.process([("a/0", [END], FinishReason.STOP)]) == [None]
    stage.close("a")


def test_slots_are_taken_with_the_first_sound_and_given_back() -> None:
    stage = CodecStage(tiny_codec(), slots=1)
    for name in "abc":
        stage.open(name, "low")
        assert len(stage.process([(f"{name}/0", rows(some_codes(1)), None)])[0] or b"") == 4 * FRAME
        stage.close(name)


@pytest.mark.parametrize("turns", [1, 2])
def test_who_finds_no_slot_is_heard_when_its_part_ends(turns: int) -> None:
    stage = CodecStage(tiny_codec(), slots=1)
    stage.open("a", "low")
    stage.open("b", "low")
    stage.process([("a/0", rows(some_codes(1)), None)])
    for turn in range(turns):
        codes = some_codes(5, seed=turn)
        payloads = play(stage, f"b/{turn}", codes, FinishReason.LENGTH)
        assert payloads[:-1] == [None] * 4
        assert np.abs(samples(payloads) - decoded(codes)).max() < 1e-4
    stage.close("a")
    codes, decoded_together = some_codes(3, seed=9), stage.items
    payloads = play(stage, f"b/{turns}", codes, FinishReason.LENGTH)
    assert np.abs(samples(payloads) - decoded(codes)).max() < 1e-4
    assert stage.items > decoded_together
    stage.close("b")
