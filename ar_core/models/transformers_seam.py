"""Where transformers' attention modules hand over to ours: one entry in its registry, one receiver per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.models.falcon import modeling_falcon as falcon

from ar_core.attention.base import AttentionBackend, AttentionSpec

SERVING = "triptych"
# The same attention, but known to the mask registry too: under this name a model asks for its masks, which tells what
# each layer may see. Under SERVING it never asks, so no mask is ever built.
EXAMINING = "triptych_examining"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What an attention module asks for.

    query [T, heads, head_dim], key [T, kv_heads, head_dim], value [T, kv_heads, value_dim]; `layer_idx` as transformers
    counts layers.
    """

    layer_idx: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]


class Receiver(Protocol):
    def receive(self, call: AttentionCall) -> torch.Tensor:
        """What the call comes to: [T, heads, value_dim]."""
        ...


class Seam:
    """The receiver of one model's attention calls, there only while that model's forward runs.

    It hangs on the model's own modules, because not every family passes keyword arguments down to them. Two models
    never share one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.receiver: Receiver | None = None
        for module in model.modules():
            object.__setattr__(module, "triptych_seam", self)

    def run(self, receiver: Receiver, forward: Callable[..., Any], **inputs: Any) -> Any:
        """Call `forward(**inputs)` with the model's attention going to `receiver`."""
        self.receiver = receiver
        try:
            return forward(**inputs)
        finally:
            self.receiver = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer: its place in the KV pool, and how it attends."""

    index: int
    spec: AttentionSpec


@dataclass(frozen=True, slots=True)
class Serving:
    """Sends the attention of one step to a backend. `layers` is keyed by transformers' layer index."""

    backend: AttentionBackend
    layers: dict[int, Layer]

    def receive(self, call: AttentionCall) -> torch.Tensor:
        layer = self.layers[call.layer_idx]
        return self.backend.attend(call.query, call.key, call.value, layer.index, layer.spec)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: [1, heads, T, dim] each -> [1, T, heads, value_dim]."""
    # Some families leave queries and keys in float32 after rotating them; values have the model's own format.
    dtype = value.dtype
    call = AttentionCall(
        layer_idx=module.layer_idx,
        query=query[0].transpose(0, 1).to(dtype),
        key=key[0].transpose(0, 1).to(dtype),
        value=value[0].transpose(0, 1),
        mask=attention_mask,
        arguments=arguments,
    )
    receiver: Receiver = module.triptych_seam.receiver
    return receiver.receive(call)[None], None


@dataclass(frozen=True, slots=True)
class MaskRule:
    """What a mask lets a position see.

    If `plain`, itself and all (or, with a window, the window - 1) before it. If not, something else.
    """

    window: int | None
    plain: bool


class RuledMask(torch.Tensor):
    """A mask that carries its rule. What a model makes of it by changing it carries none."""

    rule: MaskRule | None = None


def _ruled_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """What transformers calls for a mask: zeros, and the rule."""
    mask = torch.zeros(1, 1, q_length, kv_length).as_subclass(RuledMask)
    mask.rule = _read_rule(mask_function, local_size)
    return mask


def _read_rule(mask_function: Callable[..., torch.Tensor], local_size: int | None) -> MaskRule:
    """Compare a mask function with a causal one, windowed by `local_size`, on both sides of where they could differ."""
    reach = local_size or 8192
    query = torch.tensor([0, 1, reach - 1, reach, reach + 1, 2 * reach, 3 * reach - 1])[:, None]
    key = torch.arange(3 * reach)[None]
    first = torch.tensor(0)
    try:
        seen = mask_function(first, first, query, key).broadcast_to(len(query), key.shape[1])
    except IndexError:  # it looks up its answer in a table of this step's positions
        return MaskRule(None, plain=False)
    plain = (key <= query) & (key > query - local_size) if local_size else key <= query
    return MaskRule(local_size, plain=torch.equal(seen, plain))


class _FalconAttention(falcon.FalconAttention):
    """Falcon's attention, which finds its kernel by its class. Keys and values are not repeated for every head."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **named: Any) -> tuple[torch.Tensor, None]:
        split = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (heads.transpose(1, 2) for heads in split)
        if named["alibi"] is None:
            query, key = falcon.apply_rotary_pos_emb(query, key, *named["position_embeddings"])
        scale = self.head_dim**-0.5
        mask, alibi = named["attention_mask"], named["alibi"]
        attended, _none = _attention(self, query, key, value, mask, scaling=scale, alibi=alibi)
        return self.dense(attended.flatten(2)), None

    def _split_heads(self, fused_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.new_decoder_architecture:
            return super()._split_heads(fused_qkv)
        groups = fused_qkv.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        query, key, value = groups.split([groups.shape[-2] - 2, 1, 1], dim=-2)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


# Families that look up a class of attention, rather than a function.
FAMILIES_WITH_CLASSES = frozenset({"falcon"})

AttentionInterface.register(SERVING, _attention)
AttentionInterface.register(EXAMINING, _attention)
AttentionMaskInterface.register(EXAMINING, _ruled_mask)
falcon.FALCON_ATTENTION_CLASSES[SERVING] = _FalconAttention
