"""Finds out, by running a loaded model on three positions, what its layers store and whether it can be served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from ar_core.attention.base import AttentionSpec
from ar_core.interfaces import KVShape
from ar_core.models.transformers_seam import (
    EXAMINING,
    SERVING,
    AttentionCall,
    Layer,
    MaskRule,
    RuledMask,
    Seam,
)
from ar_core.models.transformers_support import UnsupportedModel

# What attention modules pass that changes nothing here: masks give way to rules, the rest speaks to training, to
# other kernels, or to those who want to see inside.
_HARMLESS = {
    *("dropout", "scaling", "softcap", "sliding_window", "is_causal", "position_ids"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
}


@dataclass(frozen=True, slots=True)
class Findings:
    """layers is keyed by transformers' layer index; kv_layout is in the order of `Layer.index`.

    hidden [3, dim] and float32 logits [3, vocab] are what the decoder, and the model around it, made of the same input.
    """

    layers: dict[int, Layer]
    kv_layout: tuple[KVShape, ...]
    hidden: torch.Tensor
    logits: torch.Tensor


class _Recorder:
    """Keeps every attention call and lets each position attend to itself alone."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def receive(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)


class Examination:
    """Runs a model with its attention replaced by a recorder. Raises UnsupportedModel where the model does not fit."""

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, seam: Seam, max_context: int) -> None:
        self._model = model
        self._decoder = decoder
        self._seam = seam
        self._last = max_context - 1
        self._embedding = model.get_input_embeddings()

    def findings(self) -> Findings:
        """What was found, after every check has passed."""
        try:
            calls, logits = self._run_with_masks()
            hidden = self._check_embeddings_suffice(calls)
            self._check_positions_are_independent()
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if isinstance(error, UnsupportedModel):
                raise
            raise self._refusal(f"it does not run on embeddings and positions alone ({error!r})") from error
        layers: dict[int, Layer] = {}
        shapes: list[KVShape] = []
        for call in calls:
            if call.layer_idx in layers:
                self._refuse(f"layer {call.layer_idx} attends more than once in a step")
            layers[call.layer_idx] = Layer(len(shapes), self._spec(call))
            shapes.append(KVShape(call.key.shape[1], call.key.shape[2], call.value.shape[2]))
        return Findings(layers, tuple(shapes), hidden, logits)

    def _run_with_masks(self) -> tuple[list[AttentionCall], torch.Tensor]:
        """The whole model on token ids: its attention calls, their masks telling what each may see, and its logits."""
        self._model.config._attn_implementation = EXAMINING
        try:
            calls, out = self._run(self._model, [0, 1, 2], input_ids=self._ids(0, 1, 2))
        finally:
            self._model.config._attn_implementation = SERVING
        if not calls:
            self._refuse("no layer of it uses transformers' attention interface")
        return calls, out.logits[0].float()

    def _check_embeddings_suffice(self, calls: list[AttentionCall]) -> torch.Tensor:
        """Embeddings alone must come to the same as token ids. Returns the hidden states [T, dim]."""
        others, hidden = self._decode([0, 1, 2], self._embedding(self._ids(0, 1, 2)))
        if any(call.mask is not None for call in others):
            self._refuse("it makes attention masks, or biases, of its own")
        if not all(close(a.value, b.value) for a, b in zip(calls, others, strict=True)):
            self._refuse("its layers read token ids beside the embeddings")
        return hidden

    def _check_positions_are_independent(self) -> None:
        """Where attention gives nothing, a position's result must depend on its own input and its own place alone.

        In other rows: finds recurrences and convolutions, and places counted by row instead of read. Beside a position
        at the end of the context: finds rotations that follow the longest sequence. The inputs stay the same three, so
        that a mixture of experts does the same sums.
        """
        middle, late = min(3, self._last), min(5, self._last)
        # Scaled, because rows of an image or of another model are no token's embeddings.
        embeds = 1.25 * self._embedding(self._ids(0, 1, 2))
        seen = _tensors(*self._decode([late, 0, middle], embeds))
        in_other_rows = _tensors(*self._decode([middle, 0, late], embeds.flip(1)))
        beside_the_last = _tensors(*self._decode([self._last, 0, middle], embeds))
        same = all(close(a, b.flip(0)) for a, b in zip(seen, in_other_rows, strict=True))
        same = same and all(close(a[1:], b[1:]) for a, b in zip(seen, beside_the_last, strict=True))
        if not same:
            self._refuse("what it computes for a position depends on other positions in ways other than attention")

    def _ids(self, *ids: int) -> torch.Tensor:
        return torch.tensor([ids], device=self._model.device) % self._model.config.vocab_size

    def _decode(self, positions: list[int], embeds: torch.Tensor) -> tuple[list[AttentionCall], torch.Tensor]:
        """The attention calls, and hidden states [T, dim]."""
        # A copy, because there are families that scale their input in place.
        calls, out = self._run(self._decoder, positions, inputs_embeds=embeds.clone())
        return calls, out.last_hidden_state[0]

    def _run(
        self, module: PreTrainedModel, positions: list[int], **inputs: torch.Tensor
    ) -> tuple[list[AttentionCall], Any]:
        recorder = _Recorder()
        places = torch.tensor([positions], device=self._model.device)
        out = self._seam.run(recorder, module, position_ids=places, use_cache=False, **inputs)
        return recorder.calls, out

    def _spec(self, call: AttentionCall) -> AttentionSpec:
        unknown = sorted(k for k, v in call.arguments.items() if k not in _HARMLESS and v is not None)
        if unknown:
            self._refuse(f"its attention takes {', '.join(unknown)}, which is not served")
        scale = call.arguments.get("scaling")
        return AttentionSpec(
            scale=float(call.query.shape[-1] ** -0.5 if scale is None else scale),
            window=self._window(call.mask),
            softcap=call.arguments.get("softcap"),
        )

    def _window(self, mask: torch.Tensor | None) -> int | None:
        rule: MaskRule | None = mask.rule if isinstance(mask, RuledMask) else None
        if rule is None:
            self._refuse("it makes attention masks, or biases, of its own")
        if not rule.plain:
            self._refuse("its attention is neither causal nor causal within a sliding window")
        return None if rule.window is None or rule.window > self._last else rule.window

    def _refuse(self, reason: str) -> NoReturn:
        raise self._refusal(reason)

    def _refusal(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(self._model.config.model_type, reason)


def _tensors(calls: list[AttentionCall], hidden: torch.Tensor) -> list[torch.Tensor]:
    """All that a run made of its positions, each [T, ...]."""
    return [x for call in calls for x in (call.query, call.key, call.value)] + [hidden]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding, which grows over layers in low precision."""
    tolerance = 1e-3 if a.dtype == torch.float32 else 5e-2
    difference = (a - b).float().norm()
    return bool(difference <= tolerance * a.float().norm())
