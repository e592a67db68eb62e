"""Runs a step on the device: from scheduled work to a batch, through backbone and head, to emitted rows.

Emitted rows stay on the device as the next step's inputs (`_last_rows`), so the host can launch a step before
it has seen what the one before emitted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ar_core.attention.base import AttentionBackend
from ar_core.batch import Batch, Embeds
from ar_core.interfaces import Backbone, Emitted, Head
from ar_core.sampling import Draw, Sampler
from ar_core.scheduler import Work
from ar_core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way: who emits in it, and what, once `done`."""

    emitting: list[Sequence]
    emitted: Emitted  # on the host
    done: torch.cuda.Event | None

    def wait(self) -> Emitted:
        if self.done is not None:
            self.done.synchronize()
        return self.emitted


class Runner:
    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        attention: AttentionBackend,
        *,
        num_lanes: int,
        max_context: int,
        device: torch.device,
    ) -> None:
        self._backbone = backbone
        self._head = head
        self._attention = attention
        self._device = device
        self._sampler = Sampler(num_lanes, backbone.vocab_size, device, head.width)
        self._slot_table = torch.zeros(num_lanes, max_context, dtype=torch.int32, device=device)
        self._last_rows = torch.zeros(num_lanes, head.width, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, work: list[Work], banned: dict[str, tuple[int, ...]]) -> Launched:
        """Start a step. `banned` has the ids that a request, by its id, may not emit in it."""
        for item in work:
            if item.seq.table_len == 0:
                self._start(item.seq)
        batch = self._batch(work)
        hidden = self._backbone.embed(batch.inputs)
        if batch.embeds is not None:
            hidden = hidden.index_copy(0, batch.embeds.at, batch.embeds.rows.to(hidden.dtype))
        self._attention.plan(batch)
        hidden = self._backbone.forward(hidden, batch, self._attention)
        emitting = [item.seq for item in work if item.emits]
        if not emitting:
            return Launched([], Emitted(torch.empty(0, self._head.width, dtype=torch.int64)), None)
        if len(emitting) < hidden.shape[0]:
            hidden = hidden[batch.select]
        draws = [_draw(seq, banned.get(seq.id, ())) for seq in emitting]
        emitted = self._head.emit(hidden, self._sampler.state(draws))
        self._sampler.note(draws, emitted.rows)
        lanes = batch.lanes if len(emitting) == len(work) else batch.lanes[self._emitting(work)]
        self._last_rows[lanes] = emitted.rows
        return self._launched(emitting, emitted)

    def _emitting(self, work: list[Work]) -> torch.Tensor:
        """Which of the step's sequences emit: int64 [S]."""
        return self._to_device(np.flatnonzero([item.emits for item in work]))[0]

    def _start(self, seq: Sequence) -> None:
        prompt, emitted = np.split(seq.inputs[: seq.known, 0], [seq.prompt_len])
        self._sampler.start(seq.request.sampling, seq.lane, prompt, emitted)

    def _batch(self, work: list[Work]) -> Batch:
        """The step's tensors, sent to the device in one copy."""
        counts = [item.count for item in work]
        ends = [item.start + item.count for item in work]
        spans = [(item.seq, item.start, end) for item, end in zip(work, ends, strict=True)]
        query_start = np.concatenate([[0], np.cumsum(counts)])
        lanes = np.array([item.seq.lane for item in work])
        # Positions beyond what the host knows take the row that the step before emitted.
        unseen = [i for i, item in enumerate(work) if item.start >= item.seq.known]
        stale = [(seq, min(seq.table_len, start), end) for seq, start, end in spans]
        (
            inputs,
            positions,
            slots,
            starts,
            lengths,
            rows,
            select,
            unseen_at,
            unseen_rows,
            table_rows,
            table_columns,
            table_slots,
        ) = self._to_device(
            np.concatenate([seq.inputs[start:end].reshape(-1) for seq, start, end in spans]),
            _ranges(spans),
            np.concatenate([seq.slots[start:end] for seq, start, end in spans]),
            query_start,
            np.array(ends),
            lanes,
            query_start[1:][[item.emits for item in work]] - 1,
            query_start[unseen],
            lanes[unseen],
            np.repeat(lanes, [end - start for _, start, end in stale]),
            _ranges(stale),
            np.concatenate([seq.slots[start:end] for seq, start, end in stale]),
        )
        inputs = inputs.view(-1, self._head.width)
        if unseen:
            inputs[unseen_at] = self._last_rows[unseen_rows]
        self._slot_table[table_rows, table_columns] = table_slots.to(torch.int32)
        for seq, _, end in spans:
            seq.table_len = end
        return Batch(
            inputs=inputs,
            positions=positions,
            slots=slots,
            query_start=starts.to(torch.int32),
            context_len=lengths.to(torch.int32),
            slot_table=self._slot_table,
            lanes=rows,
            select=select,
            query_lens=counts,
            context_lens=ends,
            first_slots=[item.seq.first_slot for item in work],
            embeds=_embeds(spans, query_start),
        )

    def _to_device(self, *arrays: np.ndarray) -> Seq[torch.Tensor]:
        packed = torch.from_numpy(np.concatenate(arrays, dtype=np.int64))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        return packed.split([len(array) for array in arrays])

    def _launched(self, emitting: list[Sequence], emitted: Emitted) -> Launched:
        if self._device.type != "cuda":
            return Launched(emitting, emitted, None)
        host = Emitted(
            rows=_to_host(emitted.rows),
            logprob=None if emitted.logprob is None else _to_host(emitted.logprob),
            top_ids=None if emitted.top_ids is None else _to_host(emitted.top_ids),
            top_logprobs=None if emitted.top_logprobs is None else _to_host(emitted.top_logprobs),
        )
        done = torch.cuda.Event()
        done.record()
        return Launched(emitting, host, done)


def _draw(seq: Sequence, banned: tuple[int, ...]) -> Draw:
    # `emitted` counts the row of this step already.
    return Draw(seq.request.sampling, seq.lane, seq.seed, seq.emitted - 1, banned)


def _ranges(spans: list[tuple[Sequence, int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(start, end) for _, start, end in spans])


def _embeds(spans: list[tuple[Sequence, int, int]], query_start: np.ndarray) -> Embeds | None:
    """The embedding rows that fall into the spans of positions, and where in the batch."""
    at: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for (seq, start, end), first in zip(spans, query_start[:-1], strict=True):
        for span in seq.embeds:
            low, high = max(start, span.start), min(end, span.start + len(span.rows))
            if low < high:
                rows.append(span.rows[low - span.start : high - span.start])
                at.append(torch.arange(low - start, high - start, device=span.rows.device) + int(first))
    return Embeds(torch.cat(at), torch.cat(rows)) if rows else None


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
