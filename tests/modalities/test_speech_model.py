"""From a text and options to what the engine is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_core.request import Frames, Request, RequestError, Tokens
from modalities.checkpoint import Checkpoint
from modalities.speech.model import Said, SpeechModel, SpeechOptions
from modalities.speech.segments import Turn
from tests.modalities.conversations import Reference, conversation

TINY = Path(__file__).parents[1] / "data" / "s2-tiny"
CODES = np.arange(60).reshape(10, 6)
END = [259, *[0] * 10]


@pytest.fixture(scope="module")
def model() -> SpeechModel:
    return SpeechModel(Checkpoint(TINY))


def turns(request: Request) -> list[Turn]:
    return [segment for segment in request.segments if isinstance(segment, Turn)]


def positions(segments: Any) -> list[int]:
    """First integers of the positions, turns by their openings."""
    found: list[int] = []
    for segment in segments:
        match segment:
            case Tokens(ids):
                found += ids
            case Frames(rows):
                found += rows[:, 0].tolist()
            case Turn():
                found += positions(segment.opening)
    return found


def contains(found: list[int], part: list[int]) -> bool:
    return any(found[i : i + len(part)] == part for i in range(len(found)))


def test_a_short_text_is_one_turn_behind_the_voice(model: SpeechModel) -> None:
    voice = Reference("What is said.", CODES)
    request = model.request("a", "Hello.", [voice])
    assert positions(request.segments) == positions(conversation(model.tokenizer, ["Hello."], [voice]))
    assert len(turns(request)) == 1


def test_a_long_text_is_turns_that_its_parts_fit_into(model: SpeechModel) -> None:
    request = model.request("a", "Some words. " * 20, (), SpeechOptions(part_bytes=64, max_frames=30))
    assert len(turns(request)) == 4
    assert {turn.max_frames for turn in turns(request)} == {30}
    assert not any(turn.alone for turn in turns(request))
    assert all(t.alone for t in turns(model.request("a", "Some words. " * 20, (), SpeechOptions(remember=False))))


def test_no_part_may_run_on_for_ever(model: SpeechModel) -> None:
    (turn,) = turns(model.request("a", "Hi."))
    assert 6 * 21 < turn.max_frames < 10 * 22


def test_every_part_begins_with_the_style_behind_its_speaker(model: SpeechModel) -> None:
    options = SpeechOptions(style="very [quiet]\n", part_bytes=64)
    request = model.request("a", "<|speaker:1|>" + "Some words here. " * 8, (), options)
    assert len(turns(request)) > 1
    plain = model.tokenizer.plain
    for turn in turns(request):
        assert contains(positions(turn.opening), [269, *plain("[very (quiet)] Some words here.")])
    (turn,) = turns(model.request("a", "Hi.", (), SpeechOptions(style="whisper")))
    assert contains(positions(turn.opening), [*plain("user\n"), *plain("[whisper] Hi.")])


def test_what_was_said_before_stands_before_the_turn_as_far_as_it_fits(model: SpeechModel) -> None:
    rows = model.tokenizer.rows(CODES)
    said = [Said(text, np.concatenate((rows, [END]))) for text in ("One.", "Two.", "Three.")]
    options = SpeechOptions(max_frames=20)
    request = model.request("a", "Four.", (), options, said)
    expected = conversation(model.tokenizer, ["One.", "Two.", "Three.", "Four."], (), [rows, rows, rows])
    assert positions(request.segments) == positions(expected)

    long = [Said("x" * 300, rows), *said]
    assert positions(model.request("a", "Four.", (), options, long).segments) == positions(expected)
    alone = model.request("a", "Four.", (), SpeechOptions(max_frames=20, remember=False), said)
    assert positions(alone.segments) == positions(conversation(model.tokenizer, ["Four."]))


def test_greedy_speech_avoids_no_repeats(model: SpeechModel) -> None:
    assert model.request("a", "Hi.", (), SpeechOptions(temperature=0)).sampling.avoid_repeats == 0
    sampling = model.request("a", "Hi.").sampling
    assert sampling.avoid_repeats > 0 and sampling.temperature_last


def test_an_answer_to_a_recording_is_codes(model: SpeechModel) -> None:
    assert np.array_equal(model.codes(CODES.astype(np.int32).tobytes()), CODES)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (" \n", {}, "nothing to speak"),
        ("<|speaker:0|>", {}, "nothing to speak"),
        ("Hi.", {"max_frames": 0}, "max_frames is 0; it must be at least 1"),
        ("Hi.", {"part_bytes": 3}, "part_bytes is 3; it must be at least 64"),
        ("Hi.", {"latency": "soon"}, "latency is soon; it must be low, balanced, normal"),
        ("Hi.", {"top_p": 0}, "top_p is 0"),
    ],
)
def test_what_cannot_be_spoken_is_told_so(model: SpeechModel, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.request("a", text, (), SpeechOptions(**options))


def test_codecs_are_told_apart(model: SpeechModel, tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert SpeechModel(Checkpoint(tmp_path)).codec_fingerprint == model.codec_fingerprint
    data = bytearray((TINY / "codec.pth").read_bytes())
    data[-1] ^= 1
    (tmp_path / "codec.pth").unlink()
    (tmp_path / "codec.pth").write_bytes(data)
    assert SpeechModel(Checkpoint(tmp_path)).codec_fingerprint != model.codec_fingerprint
