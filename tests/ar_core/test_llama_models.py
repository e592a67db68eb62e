"""The written-out families in the engine against transformers: however batched, chunked, cached, evicted, preempted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ar_core.models import load_backbone
from ar_core.models.llama import Llama
from tests.ar_core.against_transformers import CPU, Served, ask, assert_agree, make_engine, serve
from tests.ar_core.tiny_checkpoints import MAX_CONTEXT, WINDOW, make_checkpoint, tiny_config

LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with llama3's rotation": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama with yarn's rotation": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama with a slowed rotation": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a bias on attention": ("llama", {"attention_bias": True}),
    "smollm2": (
        "llama",
        {"tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "mistral with a window": ("mistral", {}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows in upper layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 with windows and biases": (
        "qwen3",
        {"use_sliding_window": True, "max_window_layers": 2, "attention_bias": True, "tie_word_embeddings": True},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    model_type, changes = FAMILIES[request.param]
    served = serve(make_checkpoint(tmp_path_factory.mktemp("model"), model_type, **changes))
    assert isinstance(served.backbone, Llama)
    return served


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (6, {"max_running": 1, "kv_slots": 1000}),
        (32, {"max_running": 32}),
        (12, {"max_running": 4, "max_step_tokens": 7}),
        (16, {"max_running": 8, "max_step_tokens": 24, "overlap": True}),
    ],
    ids=["alone", "batch of 32", "chunks", "chunks and overlap"],
)
def test_equals_transformers_cold_and_warm(served: Served, count: int, options: dict[str, Any]) -> None:
    prompts, answers = served.prompts[:count], served.answers[:count]
    engine = make_engine(served.backbone, **options)
    assert_agree(ask(engine, prompts), answers)
    cold = engine.stats().cached_tokens
    assert_agree(ask(engine, prompts), answers)
    engine.scheduler.check()
    assert engine.stats().cached_tokens - cold == sum(len(ids) - 1 for ids in prompts)


def test_equals_transformers_through_eviction_and_preemption(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ar_core.scheduler._EXPECTED_GROWTH", 1)  # admits more than will fit
    engine = make_engine(served.backbone, max_running=32, max_step_tokens=48, kv_slots=120, overlap=True)
    for _ in range(2):
        assert_agree(ask(engine, served.prompts), served.answers)
    engine.scheduler.check()
    stats = engine.stats()
    assert stats.preempted > 5 and stats.evicted_tokens > 500 and stats.cached_tokens > 100


def test_windows_are_those_of_the_layer_types(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for model_type, changes, windows in (
        ("llama", {}, (None, None, None)),
        ("mistral", {}, (WINDOW, WINDOW, WINDOW)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("qwen2", {"max_window_layers": 1}, (None, None, None)),
        ("qwen2", {"max_window_layers": 1, "use_sliding_window": True}, (None, WINDOW, WINDOW)),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (None, None, None)),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "use_sliding_window": True},
            (None, WINDOW, None),
        ),
    ):
        tiny_config(model_type, **changes).save_pretrained(folder)  # type: ignore[arg-type]
        model = load_backbone(folder, device=CPU, dtype="float32", load_format="dummy")
        assert isinstance(model, Llama)
        assert tuple(block._attention._spec.window for block in model._blocks) == windows


def test_an_older_configuration_means_the_same(tmp_path: Path) -> None:
    """As checkpoints of before `rope_parameters` have it."""
    folder = make_checkpoint(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    new = serve(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    old = load_backbone(folder, device=CPU, dtype="float32")
    assert_agree(ask(make_engine(old), new.prompts), new.answers)


def test_context_is_at_most_what_the_model_was_made_for(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    for asked, given in ((None, MAX_CONTEXT), (100, 100), (1000, MAX_CONTEXT), (1, 1)):
        model = load_backbone(tmp_path, device=CPU, dtype="float32", load_format="dummy", max_context=asked)
        assert model.max_context == given


def test_a_bias_that_the_family_does_not_have_is_ignored_as_transformers_does(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", attention_bias=True)
    right = serve(folder)
    assert_agree(ask(make_engine(right.backbone, max_running=32), right.prompts), right.answers)


def test_another_activation_is_refused(tmp_path: Path) -> None:
    tiny_config("llama", hidden_act="gelu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        load_backbone(tmp_path, device=CPU, load_format="dummy")
