"""Families in transformers' own code, in the engine: batches of 32, a warm cache, eviction and preemption."""

from __future__ import annotations

import pytest

from ar_core.models.transformers import TransformersBackbone
from tests.ar_core.against_transformers import Served, ask, assert_agree, make_engine, serve
from tests.ar_core.tiny_checkpoints import make_checkpoint

FAMILIES = (
    *("cohere", "falcon", "gemma2", "gemma3_text", "glm4", "gpt_neox"),
    *("granite", "olmo2", "phi3", "smollm3", "stablelm", "starcoder2"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    served = serve(make_checkpoint(tmp_path_factory.mktemp("model"), request.param))
    assert isinstance(served.backbone, TransformersBackbone)
    return served


def test_equals_transformers_in_a_batch_of_32_cold_and_warm(served: Served) -> None:
    engine = make_engine(served.backbone, max_running=32)
    assert_agree(ask(engine, served.prompts), served.answers)
    cold = engine.stats().cached_tokens
    assert_agree(ask(engine, served.prompts), served.answers)
    engine.scheduler.check()
    assert engine.stats().cached_tokens - cold == sum(len(ids) - 1 for ids in served.prompts)


def test_equals_transformers_through_eviction_and_preemption(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ar_core.scheduler._EXPECTED_GROWTH", 1)  # admits more than will fit
    engine = make_engine(served.backbone, max_running=16, max_step_tokens=20, kv_slots=90, overlap=True)
    assert_agree(ask(engine, served.prompts), served.answers)
    engine.scheduler.check()
    stats = engine.stats()
    assert stats.preempted > 0 and stats.evicted_tokens > 200
