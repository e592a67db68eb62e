"""GGUF files of every kind of tensor, read and served as transformers would serve the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ar_core.gguf_weights import KINDS
from ar_core.models import load_backbone
from ar_core.models.llama import Llama
from ar_core.quantized import Packed4Linear
from ar_core.weights import WeightError
from tests.ar_core.against_transformers import CPU, prefill_logits
from tests.ar_core.gguf_files import Tensor, gguf_config, matrix, random_tensors, reference, write_gguf

TOKENS = np.random.default_rng(1).integers(3, 128, 24).tolist()


def load(path: Path, dtype: str = "float32") -> Llama:
    model = load_backbone(path, device=CPU, dtype=dtype)
    assert isinstance(model, Llama)
    return model


def expected(config: PreTrainedConfig, tensors: dict[str, Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        logits = reference(config, tensors)(torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert logits.std() > 0.3, "a wrong layer would hardly show"
    return logits


def assert_same(path: Path, right: torch.Tensor) -> None:
    torch.testing.assert_close(prefill_logits(load(path), TOKENS), right, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stands_for_the_weights_that_gguf_says(kind: str, tmp_path: Path) -> None:
    config = gguf_config("llama")
    tensors = random_tensors(config, kind)
    assert_same(write_gguf(tmp_path / "m.gguf", config, tensors), expected(config, tensors))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 96}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
    ids=str,
)
def test_architectures(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = gguf_config(architecture, **changes)
    tensors = random_tensors(config, "Q8_0")
    assert ("lm_head.weight" in tensors) is not config.tie_word_embeddings
    assert_same(write_gguf(tmp_path / "m.gguf", config, tensors), expected(config, tensors))


def test_rows_of_q_and_k_are_put_back_in_order_for_llama_alone(tmp_path: Path) -> None:
    """Each file holds the other architecture's order, so neither may come to the same."""
    llama, qwen3 = gguf_config("llama"), gguf_config("qwen3")
    tensors = random_tensors(qwen3, "F32")
    right = expected(qwen3, tensors)
    assert_same(write_gguf(tmp_path / "qwen3.gguf", qwen3, tensors), right)
    swapped = dict(tensors)
    rows = [2 * i + side for side in (0, 1) for i in range(32)]
    name = "model.layers.0.self_attn.q_proj.weight"
    swapped[name] = Tensor(tensors[name].stored.reshape(4, 64, 256)[:, rows].reshape(256, 256), "F32")
    moved = prefill_logits(load(write_gguf(tmp_path / "swapped.gguf", qwen3, swapped)), TOKENS)
    assert (moved - right).abs().max() > 0.1
    plain = {name: tensor for name, tensor in tensors.items() if "q_norm" not in name and "k_norm" not in name}
    assert_same(write_gguf(tmp_path / "llama.gguf", llama, plain), expected(llama, plain))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_4_bit_weights_stay_packed_and_give_what_the_dequantised_ones_give(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    config = gguf_config(architecture)
    tensors = random_tensors(config, kind)
    model = load(write_gguf(tmp_path / "m.gguf", config, tensors), "bfloat16")
    assert isinstance(model._blocks[0]._down, Packed4Linear) and isinstance(model._blocks[1]._gate_up, Packed4Linear)
    right = expected(config, tensors)
    with torch.inference_mode():
        plain = reference(config, tensors).bfloat16()(torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    rounding = (plain - right).norm()
    assert (prefill_logits(model, TOKENS) - right).norm() < 1.5 * rounding < 0.1 * right.norm()


def test_layers_of_mixed_kinds_are_right(tmp_path: Path) -> None:
    """As in files that keep some matrices at more bits: what is read as one product may be of several kinds."""
    config = gguf_config("llama")
    tensors = random_tensors(config, "Q4_0")
    rng = np.random.default_rng(2)
    for name, kind in (("layers.0.self_attn.v_proj", "Q6_K"), ("layers.1.mlp.gate_proj", "Q4_1"), ("lm_head", "Q8_0")):
        (full,) = (full for full in tensors if name in full)
        tensors[full] = matrix(rng, *tensors[full].values.shape, kind)
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    right = expected(config, tensors)
    assert_same(path, right)
    model = load(path, "bfloat16")
    assert not isinstance(model._blocks[0]._attention._qkv, Packed4Linear)
    assert isinstance(model._blocks[1]._gate_up, Packed4Linear)
    assert (prefill_logits(model, TOKENS) - right).norm() < 0.05 * right.norm()


def test_llama3s_rotation_is_stored_as_factors(tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    }
    config = gguf_config("llama", rope_parameters=rope)
    tensors = random_tensors(config, "F32")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    factors = 10000.0 ** (-np.arange(0, 64, 2) / 64) / scaled.numpy()
    assert factors.max() > 7.9 and factors.min() < 1.1
    right = expected(config, tensors)
    assert_same(write_gguf(tmp_path / "m.gguf", config, tensors, rope_factors=factors), right)
    plain = prefill_logits(load(write_gguf(tmp_path / "plain.gguf", config, tensors)), TOKENS)
    assert (plain - right).abs().max() > 0.05


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"rope.scaling.type": RopeScalingType.LINEAR, "rope.scaling.factor": 4.0},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {
                "rope.scaling.type": RopeScalingType.YARN,
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 16,
            },
        ),
        ({"rope_type": "default"}, {"rope.scaling.type": RopeScalingType.NONE, "rope.scaling.factor": 4.0}),
    ],
    ids=["linear", "yarn", "none"],
)
def test_rotary_scaling_is_read_from_its_fields(rope: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    config = gguf_config("qwen2", rope_parameters={"rope_theta": 10000.0, **rope})
    tensors = random_tensors(config, "F32")
    assert_same(write_gguf(tmp_path / "m.gguf", config, tensors, fields=fields), expected(config, tensors))


def test_unknown_rotary_scaling_names_itself(tmp_path: Path) -> None:
    config = gguf_config("llama")
    fields = {"rope.scaling.type": RopeScalingType.LONGROPE, "rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, "F16"), fields=fields)
    with pytest.raises(
        ValueError, match=r"m\.gguf scales its rotary embedding by 'longrope'; supported are none, linear"
    ):
        load(path)


def test_heads_and_bases_that_are_not_said_have_the_usual_values(tmp_path: Path) -> None:
    config = gguf_config("llama", num_key_value_heads=4)
    tensors = random_tensors(config, "F16")
    fields = {"attention.head_count_kv": None, "rope.freq_base": None, "rope.dimension_count": None}
    assert_same(write_gguf(tmp_path / "m.gguf", config, tensors, fields=fields), expected(config, tensors))


def test_configuration_and_end_tokens_are_read(tmp_path: Path) -> None:
    config = gguf_config("qwen3")
    fields = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.bos_token_id": 1}
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, "Q8_0"), fields=fields)
    model = load(path)
    assert model.eos_token_ids == (5, 7)
    assert (model.vocab_size, model.max_context, len(model.kv_layout)) == (128, 256, 2)
    assert load_backbone(path, device=CPU, max_context=50).max_context == 50


def test_an_unknown_architecture_names_itself(tmp_path: Path) -> None:
    config = gguf_config("llama")
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, "F16"), architecture="gptneox")
    with pytest.raises(
        ValueError, match=r"m\.gguf is of architecture 'gptneox'; GGUF files can be of llama, qwen2, qwen3"
    ):
        load(path)


def test_an_unsupported_kind_names_itself_and_its_tensor(tmp_path: Path) -> None:
    config = gguf_config("llama")
    tensors = random_tensors(config, "Q8_0")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = matrix(np.random.default_rng(0), 256, 256, "TQ2_0")
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(
            ValueError, match=r"tensor blk\.1\.ffn_up\.weight of .*m\.gguf is TQ2_0; supported are F32, F16"
        ):
            load(path, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_that_do_not_fit_are_named_all_at_once(dtype: str, tmp_path: Path) -> None:
    config = gguf_config("llama")
    tensors = random_tensors(config, "Q4_0")
    del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = matrix(np.random.default_rng(0), 256, 128, "Q4_0")
    tensors["blk.1.ffn_gate_inp.weight"] = matrix(np.random.default_rng(0), 4, 256, "F32")
    with pytest.raises(WeightError) as error:
        load(write_gguf(tmp_path / "m.gguf", config, tensors), dtype)
    assert str(error.value) == (
        "the checkpoint does not fit its configuration: model.layers.0.self_attn.k_proj.weight is missing; "
        "model.layers.1.mlp.down_proj.weight is [256, 128], not [256, 256]; model.norm.weight is missing; "
        "blk.1.ffn_gate_inp.weight is not part of this model"
    )


def test_a_file_without_embeddings_or_a_field_says_so(tmp_path: Path) -> None:
    config = gguf_config("llama")
    tensors = random_tensors(config, "F16")
    path = write_gguf(tmp_path / "field.gguf", config, tensors, fields={"attention.head_count": None})
    with pytest.raises(ValueError, match=r"field\.gguf does not say llama\.attention\.head_count"):
        load(path)
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"embedding\.gguf has no tensor token_embd\.weight"):
        load(write_gguf(tmp_path / "embedding.gguf", config, tensors))


def test_files_that_are_no_gguf_or_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.gguf"):
        load(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("hello, this is no such file" * 10)
    with pytest.raises(ValueError, match=r"text\.gguf is no whole GGUF file"):
        load(tmp_path / "text.gguf")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    config = gguf_config("llama")
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, "Q8_0"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"m\.gguf is no whole GGUF file"):
        load(path)
