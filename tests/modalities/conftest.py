from __future__ import annotations

import pytest

from modalities import load
from modalities.chat import ChatModel
from modalities.checkpoint import Checkpoint
from modalities.offline import LanguageModel


@pytest.fixture(scope="session")
def chat(chat_checkpoint: Checkpoint) -> ChatModel:
    return ChatModel(chat_checkpoint)


@pytest.fixture(scope="session")
def model(chat_checkpoint: Checkpoint) -> LanguageModel:
    return load(str(chat_checkpoint.path), device="cpu", dtype="float32", kv_slots=4096)
