"""Tokenizers of each kind, small enough to make in a moment."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and said: über café 漢字 🙂 done"


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and those after it: every byte is a printable character."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS] * 3, trainer)
    return _with_special(made)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's models: pieces with ▁ for a space, and a token for each byte that is in none."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeghimnorstu:", "▁the", "th", "at", "é"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("a", "t")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_special(made)


def by_word() -> PreTrainedTokenizerFast:
    """Neither: whole words, and a decoder that joins them with spaces."""
    vocab = {word: index for index, word in enumerate(["<unk>", "a", *sorted(set(WORDS.split()) - {"a"})])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix="##"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return _with_special(made)


def _with_special(made: Tokenizer) -> PreTrainedTokenizerFast:
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    made.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
