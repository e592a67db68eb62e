"""Text that arrives in any pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.speech.tokenizer import SPEAKER_TAG
from streaming.speech.live_text import LiveText

_WORDS = ["Hello", "3.14", "Dr.", "ends.", "[whisper. x]", "why?", "a", "incomprehensibilities" * 2]
_WORDS += ["。", "你好", "\n", "<|speaker:1|>", "<|speaker:2|>", ",", "[", "<", "“Yes.”"]


def parts(pieces: list[str], least: int = 10, most: int = 64) -> list[str]:
    text, made = LiveText(least, most), []
    for piece in pieces:
        made += text.push(piece)
    return [*made, text.flush()]


def test_sentences_leave_once_something_follows() -> None:
    text = LiveText(5, 100)
    assert text.push("Hello there.") == []
    assert text.push(" ") == []
    assert text.push("H") == ["Hello there."]
    assert text.flush() == "H"
    assert text.flush() == ""


def test_short_sentences_wait_for_others() -> None:
    assert parts(["Hi. Yes. No. And so it goes on. End"], least=20) == ["Hi. Yes. No. And so it goes on.", "End"]


def test_a_dot_that_ends_no_sentence_cuts_nothing() -> None:
    assert parts(["It is 3.", "14 says Dr. ", "No. Good"]) == ["It is 3.14 says Dr. No.", "Good"]


def test_what_is_too_long_is_cut_at_a_clause_or_a_word() -> None:
    assert parts(["Ten words. " * 12], least=100) == [" ".join(["Ten words."] * 5)] * 2 + ["Ten words. Ten words."]
    assert parts(["letters " * 12]) == [" ".join(["letters"] * 8), "letters letters letters letters"]
    assert parts(["short clause, " + "and words " * 8])[0] == "short clause,"


def test_nothing_is_cut_inside_a_tag_that_has_yet_to_end() -> None:
    assert parts(["Something to say [whispering. ", "softly] and more"]) == [
        "Something to say [whispering. softly] and more"
    ]


def test_a_part_that_begins_in_a_turn_repeats_the_speaker() -> None:
    made = parts(["<|speaker:0|>How do you do? <|speaker:1|>Quite well. ", "And how are you?"], least=5)
    assert made == ["<|speaker:0|>How do you do?", "<|speaker:1|>Quite well.", "<|speaker:1|>And how are you?"]


def test_tags_alone_are_nothing_to_speak_but_name_the_speaker() -> None:
    text = LiveText(5, 100)
    text.push("<|speaker:1|>")
    assert text.flush() == ""
    text.push("Hello")
    assert text.flush() == "<|speaker:1|>Hello"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(_WORDS), max_size=40), st.lists(st.integers(0, 300), max_size=10))
def test_pieces_do_not_matter_and_nothing_is_lost(words: list[str], cuts: list[int]) -> None:
    text = " ".join(words)
    borders = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    whole = parts([text])
    assert parts([text[a:b] for a, b in pairwise(borders)]) == whole
    assert parts(list(text)) == whole
    assert all(len(part.encode()) <= 64 + len("<|speaker:1|>") for part in whole[:-1])
    said, wanted = (SPEAKER_TAG.sub("", "".join(of)) for of in (whole, text))
    assert "".join(said.split()) == "".join(wanted.split())
