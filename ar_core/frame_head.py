"""Emits frames: one integer from the slow transformer, and the codes that belong to it from a fast one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch

from ar_core.interfaces import Emitted
from ar_core.sampling import Bias, Penalties, Repeats, SamplingState, emit, sample


class FrameBackbone(Protocol):
    """What a FrameHead needs of a backbone: which ids may be emitted, and their logits."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]  # exactly one: it ends a sequence of frames
    semantic: range  # the ids of frames
    num_codebooks: int
    codebook_size: int

    def frame_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, dim] -> float32 [S, len(semantic) + 1]: the semantic ids in order, then the end."""
        ...


class FastModel(Protocol):
    """What a FrameHead needs of a fast transformer; see `models/dual_ar.py`."""

    def start(self, hidden: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Slow states [S, dim] and codes 0, int64 [S] -> logits of code 1, float32 [S, codebook size], and a cache."""
        ...

    def step(self, codes: torch.Tensor, cache: Any) -> torch.Tensor:
        """The code before, int64 [S] -> logits of the next, float32 [S, codebook size]."""
        ...


class FrameHead:
    """A row [id, code 0, .. code K-1] per step.

    The id is drawn from the semantic tokens and the end alone, code 0 is its place among them, and codes 1 to K-1 are
    drawn one after the other, all with the sequence's own parameters. Penalties, bias, repeats and
    log-probabilities are about the id. Nothing here waits for the device, so a step can be captured as a graph.
    """

    def __init__(self, backbone: FrameBackbone, fast: FastModel, device: torch.device) -> None:
        self.width = backbone.num_codebooks + 1
        self._backbone = backbone
        self._fast = fast
        self._semantic = backbone.semantic
        (end,) = backbone.eos_token_ids
        self._ids = torch.tensor([*backbone.semantic, end], device=device)  # int64 [A], by column of the logits
        self._columns = torch.full((backbone.vocab_size,), -1, device=device)
        self._columns[self._ids] = torch.arange(len(self._ids), device=device)
        codes = torch.arange(len(self._ids), device=device).clamp(max=backbone.codebook_size - 1)
        codes[-1] = 0  # the end has no code
        self._codes = codes  # int64 [A]: code 0, by column

    def emit(self, hidden: torch.Tensor, sampling: SamplingState) -> Emitted:
        """[S, dim] -> rows int64 [S, K + 1]."""
        emitted = emit(self._backbone.frame_logits(hidden), self._of_columns(sampling))
        columns = emitted.rows[:, 0]
        row = [self._ids[columns], self._codes[columns]]
        logits, cache = self._fast.start(hidden, row[1])
        row.append(sample(logits, _of_code(sampling, 1)))
        for k in range(2, self.width - 1):
            logits = self._fast.step(row[-1], cache)
            row.append(sample(logits, _of_code(sampling, k)))
        emitted.rows = torch.stack(row, dim=1)
        if emitted.top_ids is not None:
            emitted.top_ids = self._ids[emitted.top_ids]
        return emitted

    def _of_columns(self, sampling: SamplingState) -> SamplingState:
        """What is said of ids, said of the columns of `frame_logits`."""
        return replace(
            sampling,
            penalties=None if sampling.penalties is None else self._penalties(sampling.penalties),
            bias=None if sampling.bias is None else self._bias(sampling.bias),
            repeats=None if sampling.repeats is None else self._repeats(sampling.repeats),
        )

    def _penalties(self, penalties: Penalties) -> Penalties:
        """Only what was emitted counts: the frames of a prompt are not something to keep away from."""
        counts = penalties.counts[:, self._ids]
        return replace(penalties, counts=counts, seen=counts > 0)

    def _bias(self, bias: Bias) -> Bias:
        columns = self._columns[bias.ids]
        # Ids that cannot be emitted anyhow add nothing, to whichever column.
        return replace(bias, ids=columns.clamp(min=0), amounts=torch.where(columns < 0, 0.0, bias.amounts))

    def _repeats(self, repeats: Repeats) -> Repeats:
        """The end may come whenever it is drawn: only semantic ids repeat themselves."""
        columns = repeats.recent - self._semantic.start
        semantic = (columns >= 0) & (columns < len(self._semantic))
        return replace(repeats, recent=torch.where(semantic, columns, -1))


def _of_code(sampling: SamplingState, k: int) -> SamplingState:
    """How code k is drawn: as the id is, without what is about ids, and with a number of its own."""
    uniform = None if sampling.rest_uniform is None else sampling.rest_uniform[:, k]
    return replace(sampling, uniform=uniform, penalties=None, bias=None, repeats=None, num_logprobs=None)
