"""What turns hidden states into emitted rows."""

from __future__ import annotations

import torch

from ar_core.interfaces import Backbone, Emitted
from ar_core.sampling import SamplingState, emit


class TextHead:
    """One token per step, sampled from the backbone's logits."""

    width = 1

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def emit(self, hidden: torch.Tensor, sampling: SamplingState) -> Emitted:
        """[S, dim] -> rows int64 [S, 1]."""
        return emit(self._backbone.logits(hidden), sampling)
