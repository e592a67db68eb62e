"""A speech model's tokenizer: prompts of its own, what people want spoken, and frames."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ar_core.request import RequestError

END = "<|im_end|>"
SPEAKER_TAG = re.compile(r"<\|speaker:[0-9]{1,4}\|>")
# What stands for something in a text to be spoken; every other special token is read there as the characters it has.
_SPOKEN_TAGS = re.compile(rf"{SPEAKER_TAG.pattern}|<\|phoneme_start\|>|<\|phoneme_end\|>")


class SpeechTokenizer:
    """Raises FileNotFoundError for a folder without tokenizer.json, ValueError for one that has no semantic tokens."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{folder} has no tokenizer.json, the only form of tokenizer that is read")
        self._tokenizer = Tokenizer.from_file(str(file))
        # Special tokens are looked up by name, never found in a text: it is the text of a stranger.
        self._tokenizer.encode_special_tokens = True
        first = self._tokenizer.token_to_id("<|semantic:0|>")
        if first is None or self._tokenizer.token_to_id(END) is None:
            raise ValueError(f"{file} is not a speech model's: it lacks <|semantic:0|> or {END}")
        self._semantic_start: int = first
        names = (token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        self._num_semantic = sum(name.startswith("<|semantic:") for name in names)

    def special(self, name: str) -> int:
        """The id of a special token. Raises RequestError if the model has no such token."""
        token: int | None = self._tokenizer.token_to_id(name)
        if token is None:
            raise RequestError(f"this model has no token {name}", "input")
        return token

    def plain(self, text: str) -> list[int]:
        """A piece of text without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def spoken(self, text: str) -> list[int]:
        """A piece of text to be spoken, where tags of speakers and phonemes mean what they say.

        Raises RequestError for a speaker that the model does not have.
        """
        ids: list[int] = []
        at = 0
        for tag in _SPOKEN_TAGS.finditer(text):
            ids += self.plain(text[at : tag.start()])
            ids.append(self.special(tag.group()))
            at = tag.end()
        return ids + self.plain(text[at:])

    def rows(self, codes: np.ndarray) -> np.ndarray:
        """Codes, integers [K, T], as frames, int64 [T, K + 1]. Raises RequestError for a first code out of range."""
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim != 2:
            raise RequestError(
                f"codes have the shape {list(codes.shape)}; it must be [codebooks, frames]", "references"
            )
        wrong = codes[0][(codes[0] < 0) | (codes[0] >= self._num_semantic)]
        if wrong.size:
            raise RequestError(f"a first code is {wrong[0]}; it goes from 0 to {self._num_semantic - 1}", "references")
        return np.concatenate((codes[:1] + self._semantic_start, codes)).T

    def is_frame(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows int64 [n, K + 1] are frames, rather than the end: bool [n]."""
        first = rows[:, 0] - self._semantic_start
        return (first >= 0) & (first < self._num_semantic)
