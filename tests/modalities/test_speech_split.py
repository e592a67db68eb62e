"""Long texts in batches: what is spoken, by whom and in which order never changes; only where it is cut is a choice."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.speech.split import MAX_BYTES, MIN_BYTES, split

_TAG = re.compile(r"(<\|speaker:[0-9]{1,4}\|>)")

_pieces = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="ab ,.!?;\n", max_size=80),
    st.text(alphabet="你好，。！“”", max_size=60),
    st.sampled_from(["<|speaker:0|>", "<|speaker:1|>", "<|speaker:12|>", "<|speaker:", "|>", "[", "]", "<|im_end|>"]),
    st.sampled_from(["[whisper]", "[soft, slow. very slow.] ", "[" + "long " * 50 + "]", "x" * 400, "👩‍👩‍👧‍👦" * 9]),
    st.sampled_from(["Dr. Who paid 3.14 dollars. ", "<|phoneme_start|>h e l o. a<|phoneme_end|>", " " * 100, "é" * 90]),
)
_texts = st.lists(_pieces, max_size=12).map("".join)


def spoken(text: str) -> list[tuple[str, str]]:
    """Each character that is not white space, with the tag of who speaks it."""
    tag, said = "", []
    for part in _TAG.split(text):
        if _TAG.fullmatch(part):
            tag = part
        else:
            said += [(tag, character) for character in part if not character.isspace()]
    return said


@settings(max_examples=400, deadline=None)
@given(_texts, st.integers(MIN_BYTES, 400), st.integers(1, 5))
def test_nothing_is_lost_or_reordered_and_the_limits_hold(text: str, max_bytes: int, max_speakers: int) -> None:
    batches = split(text, max_bytes, max_speakers)
    assert [character for batch in batches for character in spoken(batch)] == spoken(text)
    for batch in batches:
        assert 0 < len(batch.encode()) <= max_bytes
        assert len({tag for tag, _ in spoken(batch)}) <= max_speakers
        assert batch == batch.strip()


@settings(max_examples=200, deadline=None)
@given(_texts, st.integers(MIN_BYTES, 400))
def test_tags_stay_whole(text: str, max_bytes: int) -> None:
    batches = split(text, max_bytes)
    for tag in ("[whisper]", "[soft, slow. very slow.]", "<|im_end|>", "<|phoneme_start|>h e l o. a<|phoneme_end|>"):
        assert sum(batch.count(tag) for batch in batches) == text.count(tag)


@given(st.text(alphabet="ab. \n", max_size=MAX_BYTES))
def test_a_text_that_fits_is_left_as_it_is(text: str) -> None:
    assert split(text) == ([text.strip()] if text.strip() else [])


@pytest.mark.parametrize(
    ("text", "batches"),
    [
        (
            "Hello there. Mr. Smith paid 3.14 dollars, e.g. to J. Doe! Then he left the U.S. for good. And so on.",
            ["Hello there. Mr. Smith paid 3.14 dollars, e.g. to J. Doe!", "Then he left the U.S. for good. And so on."],
        ),
        (
            'She said "Go away from here, please!" and then she went. He stayed where he was.',
            ['She said "Go away from here, please!" and then she went.', "He stayed where he was."],
        ),
        (
            "今天天气很好！我们去公园散步吧。你说呢？我觉得我们应该早点出发，这样不会太热。",
            ["今天天气很好！我们去公园散步吧。你说呢？", "我觉得我们应该早点出发，这样不会太热。"],
        ),
        (
            "one sentence that has no end, but it has some commas, here and there, so that it can be cut",
            ["one sentence that has no end, but it has some commas,", "here and there, so that it can be cut"],
        ),
        ("word " * 20, [" ".join(["word"] * 13), " ".join(["word"] * 7)]),
        (
            "a title\n\nand then a text of its own that goes on for rather longer",
            ["a title", "and then a text of its own that goes on for rather longer"],
        ),
        ("x" * 100, ["x" * 64, "x" * 36]),
        ("  \n ", []),
        ("", []),
        ("<|speaker:0|>", []),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_cuts_at_the_best_border_there_is(text: str, batches: list[str]) -> None:
    assert split(text, 64) == batches


def test_batches_end_with_a_speakers_turn_where_they_can() -> None:
    text = "<|speaker:0|>How are you all today?\n<|speaker:1|>I am fine. Thanks.\n<|speaker:0|>Good."
    assert split(text, 64) == [
        "<|speaker:0|>How are you all today?",
        "<|speaker:1|>I am fine. Thanks.\n<|speaker:0|>Good.",
    ]


def test_a_long_turn_keeps_its_speaker_in_every_batch() -> None:
    batches = split("<|speaker:3|>" + "Some words are said. " * 10 + "<|speaker:1|>Yes.", 100)
    assert len(batches) > 2
    assert all(batch.startswith("<|speaker:3|>Some") for batch in batches)
    assert batches[-1].endswith("<|speaker:1|>Yes.")
    assert all(batch.count("<|speaker:3|>") == 1 for batch in batches)


def test_at_most_five_speakers_share_a_batch() -> None:
    text = "".join(f"<|speaker:{i}|>Hi." for i in range(12))
    assert [len(_TAG.findall(batch)) for batch in split(text, 1000)] == [5, 5, 2]
    assert len(split("<|speaker:0|>Hi.<|speaker:1|>Ho." * 8, 1000)) == 1


def test_families_of_emoji_and_accents_stay_together() -> None:
    family, accented = "👩‍👩‍👧‍👦", "e\u0301"
    assert all(set(re.split(f"({family})", batch)) <= {"", family} for batch in split(family * 30, 64))
    assert all(not batch.startswith("\u0301") for batch in split(accented * 100, 64))


def test_limits_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes is 10 and max_speakers 5; they must be at least 64 and 1"):
        split("a", 10)
