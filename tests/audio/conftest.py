"""Settings of the sound tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when it is imported: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from threads, and lose much where the machine has other work for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
