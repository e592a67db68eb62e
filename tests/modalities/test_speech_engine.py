"""The engine of a speech model: turns, aborts, full queues, preemption, recordings, on the tiny checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ar_core.config import EngineConfig
from ar_core.request import FinishReason, Output, QueueFull, Request, RequestError
from modalities.checkpoint import Checkpoint
from modalities.registry import build_speech_engine
from modalities.speech.engine import SpeechEngine
from modalities.speech.model import SpeechModel, SpeechOptions
from modalities.speech.segments import Codes, Recording
from tests.audio.tiny_codec import some_codes, some_sound, tiny_codec
from tests.modalities.conversations import Reference

TINY = Checkpoint(Path(__file__).parents[1] / "data" / "s2-tiny")
MODEL = SpeechModel(TINY)
TEXT = "The quick brown fox."
TRANSCRIPT = "Hello there, this is a reference."
LONG = "Some words are said. " * 9  # three parts of 64 bytes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(**config: Any) -> SpeechEngine:
    return build_speech_engine(TINY, EngineConfig(device="cpu", dtype="float32", **config))


@pytest.fixture(scope="module")
def shared() -> SpeechEngine:
    return build()


@pytest.fixture
def engine(shared: SpeechEngine) -> Iterator[SpeechEngine]:
    yield shared
    check_idle(shared)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(TINY.path / "golden.safetensors")


def ask(name: str, text: str = TEXT, voice: Sequence[Reference] = (), priority: int = 0, **options: Any) -> Request:
    options = {"temperature": 0, "max_frames": 8, "part_bytes": 64, **options}
    return MODEL.request(name, text, voice, SpeechOptions(priority=priority, **options))


def run(engine: SpeechEngine, *requests: Request) -> dict[str, list[Output]]:
    for request in requests:
        engine.add(request)
    return collect(engine)


def collect(engine: SpeechEngine, before: Sequence[Output] = ()) -> dict[str, list[Output]]:
    """All outputs to come, behind those that are given."""
    outputs: dict[str, list[Output]] = defaultdict(list)
    for output in before:
        outputs[output.request_id].append(output)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def rows(outputs: list[Output]) -> list[list[int]]:
    return [row for output in outputs for row in output.rows]


def samples(outputs: list[Output]) -> np.ndarray:
    return np.concatenate([np.frombuffer(output.payload or b"", np.float32) for output in outputs])


def decoded(frames: list[list[int]]) -> np.ndarray:
    return tiny_codec().decode(torch.tensor(frames)[None, :, 1:].transpose(1, 2))[0].numpy()


def check_idle(engine: SpeechEngine) -> None:
    assert not engine.has_work
    assert not (engine._speeches or engine._by_turn or engine._between or engine._stage._streams)
    assert engine._stage._free == len(engine._stage._decoder._slots.rows)
    engine.engine.scheduler.check()
    stats = engine.stats()
    assert stats.kv_slots_used == stats.kv_slots_cached


def test_greedy_frames_are_those_of_the_reference(engine: SpeechEngine, golden: dict[str, torch.Tensor]) -> None:
    voice = [Reference(TRANSCRIPT, golden["reference_codes"].numpy())]
    outputs = run(engine, ask("a", max_frames=24), ask("b", voice=voice, max_frames=24))
    assert rows(outputs["a"]) == golden["frames_noref"].tolist()
    assert rows(outputs["b"]) == golden["frames_ref"].tolist()
    assert [outputs[name][-1].prompt_tokens for name in "ab"] == [85, 182]
    spoken = load_file(TINY.path / "speech.safetensors")
    assert np.abs(samples(outputs["a"]) - spoken["audio_noref"].numpy()).max() < 1e-4
    assert np.abs(samples(outputs["b"]) - spoken["audio_ref"].numpy()).max() < 1e-4


def test_several_parts_are_one_stream_of_sound(engine: SpeechEngine) -> None:
    outputs = run(engine, ask("a", LONG))["a"]
    assert len(rows(outputs)) == 3 * 8
    assert np.abs(samples(outputs) - decoded(rows(outputs))).max() < 1e-4
    assert [output.finish for output in outputs if output.finish] == [FinishReason.LENGTH]
    assert outputs[-1].finish is FinishReason.LENGTH


def test_a_part_goes_on_from_the_ones_before_it_unless_it_is_alone(engine: SpeechEngine) -> None:
    together, alone = (rows(run(engine, ask("a", LONG, remember=remember))["a"]) for remember in (True, False))
    assert together[:8] == alone[:8]
    assert alone[8:16] == alone[:8]  # the same words, as if for the first time
    assert together[8:16] != alone[8:16]


def test_every_part_has_a_seed_of_its_own(engine: SpeechEngine) -> None:
    def said(seed: int) -> list[list[int]]:
        return rows(run(engine, ask("a", LONG, remember=False, temperature=1.0, seed=seed))["a"])

    assert said(1) == said(1) != said(2)
    assert said(1)[:8] != said(1)[8:16]
    assert said(-1) == said(-1)


def test_a_full_context_forgets_the_first_parts(engine: SpeechEngine) -> None:
    outputs = run(engine, ask("a", LONG * 2, max_frames=40))["a"]
    assert len(rows(outputs)) == 6 * 40  # none was cut short by what was said before it
    assert np.abs(samples(outputs) - decoded(rows(outputs))).max() < 1e-4


def test_what_each_says_does_not_depend_on_the_others(engine: SpeechEngine, golden: dict[str, torch.Tensor]) -> None:
    voice = [Reference(TRANSCRIPT, golden["reference_codes"].numpy())]
    requests = [ask("a", LONG), ask("b", voice=voice, temperature=0.9, seed=4), ask("c", latency="low", max_frames=13)]
    alone = {request.id: rows(run(engine, request)[request.id]) for request in requests}
    together = run(engine, *requests)
    assert {name: rows(outputs) for name, outputs in together.items()} == alone
    for outputs in together.values():
        assert np.abs(samples(outputs) - decoded(rows(outputs))).max() < 1e-4


def test_a_request_can_be_aborted_in_every_state() -> None:
    engine = build(max_running=1)
    engine.add(ask("a", LONG))
    engine.add(ask("b"))
    engine.abort("b")  # waiting
    outputs = engine.step()
    engine.abort("a")  # running
    last = {name: outputs[-1].finish for name, outputs in collect(engine, outputs).items()}
    assert last == {"a": FinishReason.ABORT, "b": FinishReason.ABORT}
    check_idle(engine)
    engine.add(ask("a", LONG))
    while not engine._between:
        assert engine.step()
    engine.abort("a")  # between two turns
    assert [output.finish for output in collect(engine)["a"]] == [FinishReason.ABORT]
    check_idle(engine)
    engine.abort("a")  # ended: ignored
    engine.abort("nobody")
    assert not engine.has_work
    engine.add(ask("a"))  # and the name is free again
    assert len(rows(collect(engine)["a"])) == 8
    check_idle(engine)


def test_a_full_queue_refuses_those_who_have_not_begun_and_delays_those_who_have() -> None:
    engine = build(max_running=1, max_queue=1)
    engine.add(ask("a", LONG))
    first = engine.step()
    engine.add(ask("b"))
    with pytest.raises(QueueFull):
        engine.add(ask("c"))
    outputs = collect(engine, first)
    assert sorted(outputs) == ["a", "b"]
    assert len(rows(outputs["a"])) == 24 and len(rows(outputs["b"])) == 8
    assert np.abs(samples(outputs["a"]) - decoded(rows(outputs["a"]))).max() < 1e-4
    check_idle(engine)


def test_who_has_begun_goes_on_before_others_begin() -> None:
    engine = build(max_running=1)
    engine.add(ask("a", LONG))
    engine.step()
    engine.add(ask("b", priority=-5))
    ended = [output.request_id for _ in range(200) for output in engine.step() if output.finish]
    assert ended == ["a", "b"]


def test_preemption_in_the_middle_changes_nothing() -> None:
    texts = {"a": TEXT, "b": "Another text that is spoken."}
    requests = [ask(name, text, max_frames=120) for name, text in texts.items()]
    plenty = run(build(), *requests)
    engine = build(kv_slots=300)
    scarce = run(engine, *requests)
    assert engine.stats().preempted > 0
    for name, outputs in scarce.items():
        assert rows(outputs) == rows(plenty[name])
        assert np.abs(samples(outputs) - decoded(rows(outputs))).max() < 1e-4
    check_idle(engine)


def test_chunked_prefill_and_a_warm_cache_change_nothing(golden: dict[str, torch.Tensor]) -> None:
    voice = [Reference(TRANSCRIPT, golden["reference_codes"].numpy())]
    engine = build(max_step_tokens=16, max_running=4)
    for cached in (0, 181):
        outputs = run(engine, ask("a", voice=voice, max_frames=24))["a"]
        assert rows(outputs) == golden["frames_ref"].tolist()
        assert outputs[-1].cached_tokens == cached


def test_voices_that_differ_in_one_residual_code_share_nothing_from_there(
    engine: SpeechEngine, golden: dict[str, torch.Tensor]
) -> None:
    codes = golden["reference_codes"].numpy()
    other = codes.copy()
    other[7, 4] = (other[7, 4] + 1) % 100
    first, second = (run(engine, ask("a", voice=[Reference("Of its own.", one)]))["a"][-1] for one in (codes, other))
    frames_before = 4
    assert second.cached_tokens == first.prompt_tokens - _after_frames() - codes.shape[1] + frames_before


def _after_frames() -> int:
    """Positions behind the frames of a voice: the end of the system message, and the turn."""
    tokens = MODEL.tokenizer
    return len([tokens.special("<|im_end|>"), *tokens.plain("\n")]) + len(
        [id for part in ask("x").segments[-1].opening for id in part.ids]
    )


def test_recordings_and_codes_pass_through_the_codec(engine: SpeechEngine) -> None:
    sound, codes = some_sound(10_000), some_codes(9)
    outputs = run(
        engine,
        Request("r", [Recording(sound.numpy())]),
        Request("c", [Codes(codes.numpy().astype(np.int32))]),
        ask("s"),
    )
    assert np.array_equal(MODEL.codes(outputs["r"][-1].payload), tiny_codec().encode(sound[None])[0].numpy())
    assert np.abs(samples(outputs["c"]) - tiny_codec().decode(codes[None])[0].numpy()).max() < 1e-5
    assert len(rows(outputs["s"])) == 8
    assert {outputs[name][-1].finish for name in "rc"} == {FinishReason.STOP}


def test_the_codecs_failures_end_the_request_alone(engine: SpeechEngine) -> None:
    outputs = run(engine, Request("c", [Codes(np.zeros((3, 4), np.int32))]), ask("s"))
    assert outputs["c"][-1].finish is FinishReason.ERROR
    assert "the codec failed" in (outputs["c"][-1].error or "")
    assert len(rows(outputs["s"])) == 8


def test_recordings_can_be_aborted_and_are_refused_when_too_many_wait() -> None:
    engine = build(max_queue=2)
    for name in "ab":
        engine.add(Request(name, [Recording(some_sound(30_000).numpy())]))
    with pytest.raises(QueueFull, match="2 recordings are waiting"):
        engine.add(Request("c", [Recording(some_sound(30_000).numpy())]))
    engine.abort("b")
    outputs = collect(engine)
    assert outputs["b"][-1].finish is FinishReason.ABORT and outputs["b"][-1].payload is None
    assert outputs["a"][-1].payload is not None
    check_idle(engine)


def test_what_can_never_be_spoken_is_refused_at_once(engine: SpeechEngine) -> None:
    with pytest.raises(RequestError, match="nothing to speak"):
        engine.add(Request("a", MODEL.request("a", "Hi.").segments[:-1]))
    voice = [Reference("x" * 500, some_codes(4).numpy())]
    with pytest.raises(
        RequestError, match=r"voice and part 1 of the text have \d+ positions together; at most 511 fit"
    ):
        engine.add(ask("a", voice=voice))
    engine.add(ask("a"))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add(ask("a"))
    collect(engine)
