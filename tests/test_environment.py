"""What the project is installed with works together."""

from __future__ import annotations

import subprocess
import sys


def test_torch_and_its_companions_can_be_imported_together() -> None:
    """A torchaudio or torchvision that was built for another torch, or another CUDA, fails here and nowhere sooner."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch, torchaudio, torchvision"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
