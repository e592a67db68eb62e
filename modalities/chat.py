"""Between messages and token ids: templates, tokenising, and text out of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from modalities.checkpoint import Checkpoint
from modalities.detokenizer import TextStream, TokenBytes

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class ChatModel:
    """The host's half of a language model: its tokenizer and chat template. Safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = _load_tokenizer(checkpoint)
        self._tokens = TokenBytes(self._tokenizer)
        config = _load_config(checkpoint).get_text_config()
        self.max_context: int = config.max_position_embeddings
        self.vocab_size: int = config.vocab_size  # of the model; its tokenizer may know fewer ids

    @cached_property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """A text as the tokenizer sees it, begin-of-text token included if it has one."""
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones written out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """The prompt that the checkpoint's chat template makes of the messages. Raises whatever the template raises."""
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(template_kwargs or {}),
        )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text: bytes, since a character may take several tokens."""
        return self._tokens[token]

    def token_text(self, token: int) -> str:
        """The same as text; what is not a whole character becomes U+FFFD."""
        return self._tokens[token].decode(errors="replace")

    def text_stream(self, stop: Sequence[str]) -> TextStream:
        """For one answer: token ids in, text out, up to the first of the `stop` strings."""
        return TextStream(self._tokens, stop)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    folder = checkpoint.folder
    if any((folder / name).exists() for name in _TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if checkpoint.is_gguf:
        return AutoTokenizer.from_pretrained(folder, gguf_file=checkpoint.path.name, local_files_only=True)
    raise FileNotFoundError(f"{folder} has no tokenizer; one of {', '.join(_TOKENIZER_FILES)} is needed")


def _load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    if (checkpoint.folder / "config.json").exists():
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        return config
    from ar_core.gguf_weights import GGUFFile

    return GGUFFile(checkpoint.path).config()
