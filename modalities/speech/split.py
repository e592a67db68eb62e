"""Splits a long text into batches that a speech model can speak one after the other.

A batch holds turns of a few speakers. It ends where a speaker's turn does, or else at the end of a sentence, of a
clause, of a word, or, where a text has none of these, anywhere but inside a tag. Only white space between batches is
lost; a batch that begins within a turn repeats the turn's speaker tag.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from modalities.speech.tokenizer import SPEAKER_TAG

MAX_BYTES = 300
MAX_SPEAKERS = 5
MIN_BYTES = 64  # room for a speaker tag and a word

# Where a text may be cut: the ends of pieces, rising.
Level = Callable[[str], Iterator[int]]

_JOINER = "\u200d"

# Never cut inside: style tags such as [whisper], control tokens, phonemes between their markers.
_ATOM = re.compile(r"<\|phoneme_start\|>.{0,200}?<\|phoneme_end\|>|<\|[^|<>\n]*\|>|\[[^\[\]\n]*\]", re.DOTALL)
# The beginning of one of these at the end of what is searched.
_OPEN_TAG = re.compile(r"(?:\[[^\[\]\n]*|<(?:\|[^|<>\n]*\|?)?)\Z")

_CLOSERS = r"[\"'”’»)\]）】」』〉》]*+"
_ENDS = ".!?…‽؟۔।։"
# The lookbehind keeps a long run of such characters from being tried from each of them.
_SENTENCE = re.compile(rf"(?<![{_ENDS}])[{_ENDS}]++{_CLOSERS}(?=\s|$)\s*|[。！？｡]+{_CLOSERS}\s*|\n\s*")
_CLAUSE = re.compile(rf"[,;:،؛]{_CLOSERS}\s+|[，、；：]{_CLOSERS}\s*|\s[–—-]+\s+|—+\s*")
_WORD = re.compile(r"\s+")

# Words whose dot does not end a sentence (where it does all the same, no harm is done: another border is found).
_ABBREVIATION = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|st|sr|jr|gen|col|capt|lt|sgt|gov|sen|rep|vs|etc|approx|dept|est|fig|nos|vol|pp|eds?|"
    "inc|ltd|corp|ave|blvd|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|"
    "bzw|ca|evtl|ggf|nr|str|usw|mme|mlle|sra|srta|uds?",
    re.IGNORECASE,
)
_LAST_WORD = re.compile(r"[\w.]*\w$")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says in one go; the tag is empty where a text names no speaker."""

    tag: str
    text: str


def split(text: str, max_bytes: int = MAX_BYTES, max_speakers: int = MAX_SPEAKERS) -> list[str]:
    """Batches of at most `max_bytes` bytes of UTF-8 and `max_speakers` speakers; none if there is nothing to speak.

    Raises ValueError for limits that cannot be kept.
    """
    if max_bytes < MIN_BYTES or max_speakers < 1:
        raise ValueError(
            f"max_bytes is {max_bytes} and max_speakers {max_speakers}; they must be at least {MIN_BYTES} and 1"
        )
    batches: list[str] = []
    batch, speakers = "", set[str]()
    for turn in _turns(text):
        tag = turn.tag
        for part in _packed(turn.text, max_bytes - len(turn.tag), _LEVELS):
            if batch and (_size(batch + tag + part) > max_bytes or len(speakers | {turn.tag}) > max_speakers):
                batches.append(batch.strip())
                batch, speakers, tag = "", set(), turn.tag
            batch += tag + part
            speakers.add(turn.tag)
            tag = ""  # a second part in the same batch goes on with the turn
    return [*batches, batch.strip()] if batch else batches


def first_sentences(text: str, least: int) -> int:
    """How many of the characters are sentences that have ended, `least` of them without tags of speakers or more.

    As few as can be, and 0 if there are none yet. For a text that is still coming: a sentence has ended when something
    follows it, and nothing is cut inside a tag whose end has yet to come.
    """
    end = 0
    for sentence in _cut(text, _sentence_ends(text), len(text.encode())):
        end += len(sentence)
        if end == len(text) or _OPEN_TAG.search(text, 0, end):
            return 0
        if len(SPEAKER_TAG.sub("", text[:end]).strip()) >= max(least, 1):
            return end
    return 0


def first_part(text: str, max_bytes: int) -> int:
    """How many of the characters `max_bytes` bytes of UTF-8 have room for, cut as `split` cuts; 0 if they hold all.

    For a text that is still coming: a tag whose end has yet to come is left alone.
    """
    tag = _OPEN_TAG.search(text)
    if tag is not None and _size(tag.group()) <= max_bytes:
        text = text[: tag.start()]
    if _size(text) <= max_bytes:
        return 0
    leading = len(text) - len(text.lstrip())
    return leading + len(next(_packed(text[leading:], max_bytes, _LEVELS)))


def _turns(text: str) -> Iterator[Turn]:
    """The turns in which something is said."""
    tags = ["", *SPEAKER_TAG.findall(text)]
    for tag, said in zip(tags, SPEAKER_TAG.split(text), strict=True):
        if said.strip():
            yield Turn(tag, said.lstrip())


def _packed(text: str, limit: int, levels: Sequence[Level]) -> Iterator[str]:
    """A text in pieces of at most `limit` bytes, cut at the ends that the first level finds, or the next, and so on."""
    if _size(text) <= limit:
        yield text
        return
    held = ""
    for piece in _cut(text, levels[0](text), limit):
        if _size(held + piece) <= limit:
            held += piece
            continue
        if held.strip():
            yield held
        # What is too long for itself is cut more finely; what comes next may go on after the last of that.
        *done, held = _packed(piece, limit, levels[1:])
        yield from done
    if held.strip():
        yield held


def _size(text: str) -> int:
    """Bytes of what is spoken: white space around it is stripped in the end."""
    return len(text.strip().encode())


def _cut(text: str, ends: Iterator[int], limit: int) -> Iterator[str]:
    """The text cut at `ends`, rising, but for those inside an atom that `limit` has room for."""
    atoms = (atom.span() for atom in _ATOM.finditer(text) if _size(atom.group()) <= limit)
    first, last = next(atoms, (len(text), len(text)))
    start = 0
    for end in chain(ends, [len(text)]):
        while last <= end < len(text):
            first, last = next(atoms, (len(text), len(text)))
        if start < end and (end <= first or end == len(text)):
            yield text[start:end]
            start = end


def _sentence_ends(text: str) -> Iterator[int]:
    return (match.end() for match in _SENTENCE.finditer(text) if not _abbreviates(text, match))


def _abbreviates(text: str, end: re.Match[str]) -> bool:
    """Whether what looks like a sentence's end is an abbreviation's: `Dr.`, `J.`, `e.g.`, any before a small letter."""
    if end.group().rstrip() != "." or end.end() == len(text):
        return False
    if text[end.end()].islower():
        return True
    word = _LAST_WORD.search(text, max(0, end.start() - 20), end.start())
    if word is None:
        return False
    letters = word.group()
    return _ABBREVIATION.fullmatch(letters) is not None or "." in letters or (len(letters) == 1 and letters.isalpha())


def _clause_ends(text: str) -> Iterator[int]:
    return (match.end() for match in _CLAUSE.finditer(text))


def _word_ends(text: str) -> Iterator[int]:
    return (match.end() for match in _WORD.finditer(text))


def _character_ends(text: str) -> Iterator[int]:
    """Between characters as they are seen: not before accents, variation selectors or skin tones, nor at joiners."""
    for i in range(1, len(text)):
        if text[i - 1] != _JOINER and text[i] != _JOINER and not _modifies(text[i]):
            yield i


def _modifies(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc", "Me") or "\U0001f3fb" <= character <= "\U0001f3ff"


def _anywhere(text: str) -> Iterator[int]:
    return iter(range(1, len(text)))


_LEVELS = (_sentence_ends, _clause_ends, _word_ends, _character_ends, _anywhere)
