"""Whole models on a GPU, a step ahead of the host: the tokens and frames of the references."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.models import load_model
from ar_core.request import Request, SamplingParams, Tokens
from audio.codec import Codec
from modalities.speech.codec_stage import CodecStage
from modalities.speech.engine import SpeechEngine
from modalities.speech.segments import Turn
from tests.ar_core.against_transformers import assert_agree, eager, greedy_answers, shared_prompts
from tests.ar_core.test_dual_ar import segments
from tests.ar_core.tiny_checkpoints import make_checkpoint

TINY = Path(__file__).parents[1] / "data" / "s2-tiny"
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("attention", ["triton", "torch"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma2", "gpt_neox"])
def test_equals_transformers_through_chunks_cache_and_preemption(
    model_type: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ar_core.scheduler._EXPECTED_GROWTH", 1)  # admits more than will fit
    folder = make_checkpoint(tmp_path / "model", model_type)
    prompts = shared_prompts(32)
    answers = greedy_answers(eager(folder), prompts)
    model = load_model(folder, device=CUDA, dtype="float32")
    config = EngineConfig(device="cuda:0", attention=attention, max_running=32, max_step_tokens=48, kv_slots=140)
    engine = Engine(model.backbone, model.head, config)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, logprobs=20)
    for _ in range(2):
        requests = [Request(str(i), [Tokens(ids)], params) for i, ids in enumerate(prompts)]
        assert_agree(engine.generate(requests), answers)
        engine.scheduler.check()
    assert engine.stats().preempted > 0 and engine.stats().cached_tokens > 100


def test_seeded_requests_are_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "model", "llama"), device=CUDA, dtype="float32")

    def engine() -> Engine:
        return Engine(model.backbone, model.head, EngineConfig(device="cuda:0", max_running=16, kv_slots=2000))

    params = [SamplingParams(max_tokens=12, seed=i, top_p=0.9, top_k=i, presence_penalty=i % 3) for i in range(16)]
    requests = [Request(str(i), [Tokens(ids)], params[i]) for i, ids in enumerate(shared_prompts(16))]
    together = [output.tokens for output in engine().generate(requests)]
    assert together == [engine().generate([request])[0].tokens for request in requests]


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 37}, {"kv_slots": 330}], ids=str)
def test_greedy_speech_is_that_of_the_reference(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames exactly, and samples to 1e-4, streamed out of a batch, twice."""
    monkeypatch.setattr("ar_core.scheduler._EXPECTED_GROWTH", 2)
    golden, speech = load_file(TINY / "golden.safetensors"), load_file(TINY / "speech.safetensors")
    config = EngineConfig(device="cuda:0", **{"max_running": 8, "kv_slots": 2000, **options})
    model = load_model(TINY, device=CUDA, dtype="float32")
    codec = Codec.load(TINY, CUDA, torch.float32)
    stage = CodecStage(codec, slots=8)
    engine = Engine(model.backbone, model.head, config, encoders=model.encoders, output_stage=stage)
    speaking = SpeechEngine(engine, stage, codec)
    greedy = SamplingParams(temperature=0)
    for _ in range(2):
        rows: dict[str, list[list[int]]] = {}
        sound: dict[str, list[bytes]] = {}
        for i, voice in enumerate(["ref", "noref", "ref", "noref"]):
            name = "prompt" if voice == "ref" else "prompt_noref"
            prompt = tuple(segments(golden[name].T, range(272, 528)))
            speaking.add(Request(f"{i} {voice}", [Turn(prompt, (), 24, "low")], greedy))
        while speaking.has_work:
            for output in speaking.step():
                rows.setdefault(output.request_id, []).extend(output.rows)
                sound.setdefault(output.request_id, []).append(output.payload or b"")
        for request_id, emitted in rows.items():
            voice = request_id.split()[1]
            assert emitted == golden[f"frames_{voice}"].tolist()
            samples = np.frombuffer(b"".join(sound[request_id]), np.float32)
            np.testing.assert_allclose(samples, speech[f"audio_{voice}"].numpy(), atol=1e-4)
        engine.scheduler.check()
