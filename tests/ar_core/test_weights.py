"""Checkpoint folders: what is read, what is refused and how it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ar_core.models import load_backbone
from ar_core.models.llama import Llama
from ar_core.parallel import Parallel
from ar_core.weights import DummyWeights, WeightError
from tests.ar_core.against_transformers import CPU, prefill_logits
from tests.ar_core.tiny_checkpoints import make_checkpoint, tiny_config

TOKENS = list(range(3, 23))


def load(folder: Path, **options: Any) -> Llama:
    model = load_backbone(folder, device=CPU, **{"dtype": "float32", **options})
    assert isinstance(model, Llama)
    return model


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return prefill_logits(load(folder, **options), TOKENS)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into a checkpoint, or with None take them out; double underscores in the names are dots."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, tensor in tensors.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


def test_shards_are_read_as_one(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(sharded), logits(folder))


def test_a_shard_that_is_not_there_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model-1-of-3.safetensors", "b": "model-3-of-3.safetensors", "c": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match=r"has no model-1-of-3\.safetensors, model-3-of-3\.safetensors; weights"
    ):
        load(folder)


def test_a_folder_without_weights_says_what_would_do(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        FileNotFoundError, match=r"has no model\.safetensors; weights must be safetensors, or load_format"
    ):
        load(tmp_path)


def test_all_that_does_not_fit_is_named_at_once(folder: Path) -> None:
    change(
        folder,
        model__layers__1__mlp__up_proj__weight=None,
        model__norm__weight=torch.zeros(63),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(64),
    )
    with pytest.raises(WeightError) as error:
        load(folder)
    assert str(error.value) == (
        "the checkpoint does not fit its configuration: model.layers.1.mlp.up_proj.weight is missing; "
        "model.norm.weight is [63], not [64]; model.layers.0.self_attn.q_proj.bias is not part of this model"
    )


def test_of_many_that_do_not_fit_the_rest_is_counted(folder: Path) -> None:
    change(folder, **{f"extra_{i}": torch.zeros(1) for i in range(11)})
    with pytest.raises(WeightError, match=r"extra_0 is not part of this model.*; and 3 more$") as error:
        load(folder)
    assert str(error.value).count("is not part of this model") == 8


def test_rotary_tables_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    right = logits(folder)
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert torch.equal(logits(folder), right)


def test_a_tied_checkpoint_may_store_its_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    right = logits(folder)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    change(folder, lm_head__weight=weights["model.embed_tokens.weight"].clone())
    assert torch.equal(logits(folder), right)


def test_a_head_that_is_not_tied_must_be_there(folder: Path) -> None:
    change(folder, lm_head__weight=None)
    with pytest.raises(WeightError, match=r"lm_head\.weight is missing$"):
        load(folder)


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_dummy_weights_need_no_files(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if "safetensors" in file.name] == []
    model = load_backbone(tmp_path, device=CPU, dtype="float32", load_format="dummy")
    assert prefill_logits(model, TOKENS).isfinite().all()


def test_dummy_weights_are_the_same_each_time_and_differ_among_themselves(tmp_path: Path) -> None:
    tiny_config("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path)
    first = logits(tmp_path, load_format="dummy")
    torch.manual_seed(12345)
    assert torch.equal(logits(tmp_path, load_format="dummy"), first)
    assert first.std() > 0.01 and first.std(dim=0).min() > 0, "tokens are told apart"
    weights = DummyWeights(CPU, torch.float32, Parallel())
    assert not torch.equal(weights.tensor("a.weight", (8, 8)), weights.tensor("b.weight", (8, 8)))
    assert weights.tensor("norm.weight", (4,)).tolist() == [1.0] * 4
    assert weights.tensor("q_proj.bias", (4,)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("asked", "given"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_the_dtype_asked_for_is_that_of_weights_hidden_states_and_kv(
    folder: Path, asked: str, given: torch.dtype
) -> None:
    model = load(folder, dtype=asked)
    assert model.dtype is given
    assert model.embed(torch.tensor([[3]])).dtype is given
    got, right = prefill_logits(model, TOKENS), logits(folder)
    assert got.dtype is torch.float32
    assert (got - right).norm() <= {"bfloat16": 3e-2, "float16": 4e-3, "float32": 0.0}[asked] * right.norm()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("fast", "given"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_on_a_cpu_auto_is_what_it_multiplies_quickly(
    model_type: str, stored: str, fast: bool, given: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ar_core.models.multiplies_bfloat16", lambda: fast)
    tiny_config(model_type, dtype=stored).save_pretrained(tmp_path)
    assert load_backbone(tmp_path, device=CPU, load_format="dummy").dtype is given


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; a model is a folder with one, or a \.gguf file"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        load(tmp_path / "nowhere")


def test_a_family_in_transformers_code_is_refused_for_several_ranks(tmp_path: Path) -> None:
    tiny_config("olmo2").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="type olmo2 runs on one device; tensor parallelism, here over 2 ranks, is for"
    ):
        load_backbone(tmp_path, device=CPU, load_format="dummy", parallel=Parallel(rank=0, size=2))


def test_unknown_options_name_themselves(folder: Path) -> None:
    with pytest.raises(ValueError, match="load_format is 'pt'; it must be one of auto, dummy"):
        load(folder, load_format="pt")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of auto, bfloat16, float16, float32"):
        load(folder, dtype="int8")


def test_end_tokens_are_those_of_both_configurations(tmp_path: Path) -> None:
    for own, generation, expected in (
        (2, None, (2,)),
        (None, None, ()),
        ([7, 2], None, (2, 7)),
        (2, {"eos_token_id": [2, 9]}, (2, 9)),
        (2, {"eos_token_id": 9}, (2, 9)),
        (0, {"eos_token_id": 5}, (0, 5)),
        (2, {"temperature": 0.6}, (2,)),
        (None, {"eos_token_id": 4}, (4,)),
    ):
        tiny_config("llama", eos_token_id=own).save_pretrained(tmp_path)
        file = tmp_path / "generation_config.json"
        if generation is not None:
            file.write_text(json.dumps(generation))
        assert load(tmp_path, load_format="dummy").eos_token_ids == expected
        file.unlink(missing_ok=True)
