"""Text out of tokens as they come: exact, in whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.chat import ChatModel
from modalities.detokenizer import TextStream, TokenBytes
from tests.modalities import tokenizers_in_small

BYTE_LEVEL = tokenizers_in_small.byte_level()
BYTE_FALLBACK = tokenizers_in_small.byte_fallback()
BY_WORD = tokenizers_in_small.by_word()
BYTES = {"byte level": TokenBytes(BYTE_LEVEL), "byte fallback": TokenBytes(BYTE_FALLBACK)}

KINDS = sorted(BYTES)
TEXTS = st.text(st.sampled_from("abEN D:éü漢字🙂👩\u200d🚀\n"), max_size=24)


def one_token_per_byte(kind: str, text: str) -> list[int]:
    """The cruellest way to spell a text: every border between bytes is one between tokens."""
    tokens = BYTES[kind]
    spelled = {tokens[token]: token for token in range(300) if len(tokens[token]) == 1}
    return [spelled[bytes([byte])] for byte in text.encode()]


def pieces(tokens: TokenBytes, ids: Sequence[int], sizes: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """What a stream gives out when ids come so many at a time."""
    stream = TextStream(tokens, stop)
    made, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        made.append(stream.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*made, stream.finish()]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of two that end together, before the longer one."""
    for end in range(len(text) + 1):
        lengths = [len(one) for one in stop if text[:end].endswith(one)]
        if lengths:
            return text[: end - max(lengths)]
    return text


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
STOPS = st.lists(st.text(st.sampled_from("EN D🙂é漢"), min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, sizes=SIZES)
def test_pieces_add_up_to_the_text_and_hold_whole_characters(kind: str, text: str, sizes: list[int]) -> None:
    made = pieces(BYTES[kind], one_token_per_byte(kind, text), sizes)
    assert "".join(made) == text
    assert all("\ufffd" not in piece for piece in made)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, sizes=SIZES, stop=STOPS)
@settings(max_examples=300)
def test_a_stop_string_never_leaks(kind: str, text: str, sizes: list[int], stop: list[str]) -> None:
    ids = one_token_per_byte(kind, text)
    expected = before_stop(text, stop)
    made = pieces(BYTES[kind], ids, sizes, stop)
    assert "".join(made) == expected
    for end in range(len(made)):  # at any time what is out is right, and no later token takes it back
        assert expected.startswith("".join(made[:end]))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, stop=STOPS)
def test_what_cannot_become_a_stop_string_is_given_out_at_once(kind: str, text: str, stop: list[str]) -> None:
    stream = TextStream(BYTES[kind], stop)
    out = stream.push(one_token_per_byte(kind, text))
    if not stream.stopped:
        held = text[len(out) :]
        assert not held or any(one.startswith(held) for one in stop)


@pytest.mark.parametrize(("tokenizer", "kind"), [(BYTE_LEVEL, "byte level"), (BYTE_FALLBACK, "byte fallback")])
@given(text=TEXTS, sizes=SIZES)
def test_pieces_add_up_to_what_the_tokenizer_decodes(tokenizer: object, kind: str, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text)  # type: ignore[attr-defined]
    assert "".join(pieces(BYTES[kind], ids, sizes)) == tokenizer.decode(ids)  # type: ignore[attr-defined]


@given(ids=st.lists(st.integers(0, 299), max_size=20), sizes=SIZES)
def test_bytes_that_are_no_text_become_replacement_characters(ids: list[int], sizes: list[int]) -> None:
    tokens = BYTES["byte level"]
    known = [token for token in ids if not tokens.is_special(token)]
    expected = b"".join(tokens[token] for token in known).decode(errors="replace")
    assert "".join(pieces(tokens, known, sizes)) == expected


def test_a_tokenizer_of_another_kind_is_read_by_decoding() -> None:
    ids = BY_WORD.encode("the cat sat", add_special_tokens=False)
    assert "".join(pieces(TokenBytes(BY_WORD), ids, [1])).strip() == BY_WORD.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK, BY_WORD])
def test_special_tokens_are_not_said_and_added_ones_are(tokenizer: object) -> None:
    tokens = TokenBytes(tokenizer)
    end, tool = tokenizer.convert_tokens_to_ids(["<|end|>", "<tool>"])  # type: ignore[attr-defined]
    assert tokens.is_special(end) and not tokens.is_special(tool)
    assert "".join(pieces(tokens, [end, tool, end], [1])) == "<tool>"
    assert tokens[end] == b"<|end|>"  # by name, where it is asked for


def test_ids_beyond_the_tokenizer_add_nothing() -> None:
    assert "".join(pieces(BYTES["byte level"], [10**6], [1])) == ""


@given(text=st.text(max_size=60), sizes=SIZES)
@settings(max_examples=60)
def test_the_embedded_models_tokenizer_streams_any_text(chat: ChatModel, text: str, sizes: list[int]) -> None:
    ids = chat.encode(text)
    whole = chat.decode(ids)
    stream = chat.text_stream(())
    made, at = [], 0
    for size in sizes * len(ids):
        made.append(stream.push(ids[at : at + size]))
        at += size
    assert "".join([*made, stream.finish()]) == whole
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in made)


def test_every_token_of_the_embedded_model_is_what_its_tokenizer_decodes(chat: ChatModel) -> None:
    for token in range(chat.vocab_size):
        assert chat.token_text(token) == chat.decode([token]), token
