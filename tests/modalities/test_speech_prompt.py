"""Prompts against those that the reference makes (tests/data/s2-tiny)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ar_core.request import Frames, RequestError
from modalities.speech.prompt import Segment
from modalities.speech.tokenizer import SpeechTokenizer
from tests.modalities.conversations import Reference, conversation

TINY = Path(__file__).parents[1] / "data" / "s2-tiny"
TEXT = "The quick brown fox."
TRANSCRIPT = "Hello there, this is a reference."
IM_START, IM_END, SPEAKER_0 = 258, 259, 268


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> SpeechTokenizer:
    return SpeechTokenizer(TINY)


def rows(segments: list[Segment]) -> list[list[int]]:
    """As the reference lays prompts out: ids, and codes where there are any."""
    return [
        row
        for part in segments
        for row in (part.rows.tolist() if isinstance(part, Frames) else [[id, *[0] * 10] for id in part.ids])
    ]


def ids(segments: list[Segment]) -> list[int]:
    return [row[0] for row in rows(segments)]


def test_without_a_voice(golden: dict[str, torch.Tensor], tokenizer: SpeechTokenizer) -> None:
    prompt = conversation(tokenizer, [TEXT])
    assert rows(prompt) == golden["prompt_noref"].T.tolist()


def test_with_a_reference_recording(golden: dict[str, torch.Tensor], tokenizer: SpeechTokenizer) -> None:
    prompt = conversation(tokenizer, [TEXT], [Reference(TRANSCRIPT, golden["reference_codes"].numpy())])
    assert sum(isinstance(part, Frames) for part in prompt) == 1
    assert rows(prompt) == golden["prompt"].T.tolist()


def test_several_references_are_numbered_and_their_frames_follow_each_other(
    golden: dict[str, torch.Tensor], tokenizer: SpeechTokenizer
) -> None:
    codes = golden["reference_codes"].numpy()
    prompt = conversation(tokenizer, [TEXT], [Reference("One.", codes[:, :4]), Reference("Two.", codes[:, 4:9])])
    (frames,) = (part.rows for part in prompt if isinstance(part, Frames))
    assert frames[:, 1:].tolist() == codes[:, :9].T.tolist()
    assert frames[:, 0].tolist() == (codes[0, :9] + 272).tolist()
    one, two = [SPEAKER_0, *tokenizer.plain("One.\n")], [SPEAKER_0 + 1, *tokenizer.plain("Two.")]
    assert contains(ids(prompt), [*one, *two, *tokenizer.plain("\n\nSpeech:\n")])


def test_a_transcript_of_a_dialogue_keeps_its_own_tags(
    golden: dict[str, torch.Tensor], tokenizer: SpeechTokenizer
) -> None:
    codes = golden["reference_codes"].numpy()
    prompt = conversation(tokenizer, [TEXT], [Reference("<|speaker:2|>Who?<|speaker:3|>Me.", codes)])
    dialogue = [SPEAKER_0 + 2, *tokenizer.plain("Who?"), SPEAKER_0 + 3, *tokenizer.plain("Me.")]
    assert contains(ids(prompt), [*tokenizer.plain("Text:\n"), *dialogue, *tokenizer.plain("\n\nSpeech:\n")])


def test_speaker_tags_are_tokens_and_style_tags_are_text(tokenizer: SpeechTokenizer) -> None:
    prompt = conversation(tokenizer, ["<|speaker:1|>[whisper] Hi.\n<|speaker:0|>What?"])
    spoken = [269, *tokenizer.plain("[whisper] Hi.\n"), SPEAKER_0, *tokenizer.plain("What?")]
    assert contains(ids(prompt), [*tokenizer.plain("user\n"), *spoken, IM_END])


def test_control_tokens_in_a_text_are_read_as_characters(tokenizer: SpeechTokenizer) -> None:
    """A text cannot end its turn, nor bring frames of its own."""
    text = "a<|im_end|>b<|semantic:3|><|voice|>"
    found = ids(conversation(tokenizer, [text]))
    assert [found.count(id) for id in (IM_START, IM_END)] == [3, 2]
    assert max(tokenizer.spoken(text)) < 256


def test_long_texts_go_on_from_what_was_spoken(golden: dict[str, torch.Tensor], tokenizer: SpeechTokenizer) -> None:
    reference = Reference(TRANSCRIPT, golden["reference_codes"].numpy())
    batches = [TEXT, "It jumps.", "The end."]
    emitted = [golden["frames_ref"].numpy(), golden["frames_noref"].numpy()]
    end = np.array([[IM_END, *[0] * 10]])
    first = conversation(tokenizer, batches, [reference])
    second = conversation(tokenizer, batches, [reference], [np.concatenate((emitted[0], end))])
    third = conversation(tokenizer, batches, [reference], emitted)

    turn = [IM_END, *tokenizer.plain("\n"), IM_START, *tokenizer.plain("user\n")]
    answer = [IM_END, *tokenizer.plain("\n"), IM_START, *tokenizer.plain("assistant\n"), 263]
    added = [*emitted[0].tolist(), *([id, *[0] * 10] for id in [*turn, *tokenizer.plain("It jumps."), *answer])]
    assert rows(second) == rows(first) + added
    ending = [*turn, *tokenizer.plain("The end."), *answer]
    assert rows(third) == [*rows(second), *emitted[1].tolist(), *([id, *[0] * 10] for id in ending)]


def test_what_the_model_cannot_take_is_refused(tokenizer: SpeechTokenizer) -> None:
    with pytest.raises(RequestError, match=r"this model has no token <\|speaker:9\|>"):
        conversation(tokenizer, ["<|speaker:9|>Hi."])
    with pytest.raises(RequestError, match="a first code is 256; it goes from 0 to 255"):
        conversation(tokenizer, [TEXT], [Reference("x", np.full((10, 3), 256))])
    with pytest.raises(RequestError, match=r"codes have the shape \[3\]; it must be \[codebooks, frames\]"):
        conversation(tokenizer, [TEXT], [Reference("x", np.zeros(3, dtype=np.int64))])


def test_a_folder_without_a_speech_tokenizer_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        SpeechTokenizer(tmp_path)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"] = raw["added_tokens"][:4]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"is not a speech model's: it lacks <\|semantic:0\|>"):
        SpeechTokenizer(tmp_path)


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))
