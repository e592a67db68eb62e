"""Which of transformers' architectures can be served, as far as their class and configuration tell."""

from __future__ import annotations

import functools
import inspect
import logging
import sys

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ar_core.models.transformers_seam import FAMILIES_WITH_CLASSES

# What neither a flag of the class nor the default configuration tells, though the examination of a loaded model would.
_KNOWN_REASONS = {
    "bert-generation": "it is an encoder, which reads in both directions",
    "diffllama": "each of its layers attends twice in a step",
    "doge": "it weighs and masks keys by their values",
    "gemma3n_text": "its layers read token ids beside the embeddings",
    "hrm_text": "its layers run several times in a step",
    "lfm2": "its layers include convolutions",
    "lfm2_moe": "its layers include convolutions",
}
_SERVED_LAYERS = {"full_attention", "sliding_attention"}


class UnsupportedModel(ValueError):
    """A model that cannot be served; says which, why, and what can."""

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(
            f"model type {model_type!r} is not supported: {reason}. Supported are: {', '.join(supported_model_types())}"
        )
        self.model_type = model_type
        self.reason = reason


def supported_model_types() -> list[str]:
    """The model types that pass `reason_against` with their default configuration.

    Takes seconds the first time: it imports their code.
    """
    return list(_supported())


@functools.cache
def _supported() -> tuple[str, ...]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)  # default configurations warn about themselves
    try:
        return tuple(name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if _default_works(name))
    finally:
        transformers.logging.set_verbosity(verbosity)


def _default_works(model_type: str) -> bool:
    try:
        config = CONFIG_MAPPING[model_type]()
    except (KeyError, ValueError, TypeError, StrictDataclassError):  # no defaults to go by
        return False
    return reason_against(config) is None


def reason_against(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot be served, or None if nothing in its class or configuration says so."""
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if class_name is None:
        return "transformers has no causal language model of that type"
    if config.model_type in _KNOWN_REASONS:
        return _KNOWN_REASONS[config.model_type]
    if config.is_encoder_decoder:
        return "it is an encoder and a decoder, and only decoders are served"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "it is an encoder, which reads in both directions"
    parts = sorted(
        name for name, kind in config.sub_configs.items() if kind is AutoConfig or kind.model_type in CONFIG_MAPPING
    )
    if parts:
        return f"it is made of several models ({', '.join(parts)})"
    model_class: type[PreTrainedModel] = getattr(transformers, class_name)
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "its layers read token ids beside the embeddings"
    layers = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS
    if layers:
        return f"it has layers of type {', '.join(sorted(layers))}, and only full and sliding attention are served"
    if model_class._is_stateful:
        return "it keeps a recurrent state beside, or instead of, keys and values"
    source = inspect.getsource(sys.modules[model_class.__module__])
    if "s_aux=" in source:
        return "its attention has sinks, which take a share of the attention and are not served"
    # The class's flag alone is not enough: some families that use the interface do not set it.
    uses_interface = model_class._supports_attention_backend or "ALL_ATTENTION_FUNCTIONS.get_interface(" in source
    if not uses_interface and config.model_type not in FAMILIES_WITH_CLASSES:
        return "its attention does not go through transformers' attention interface"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised in a way that only its own family's loader would know"
    return None
