"""The engine's bookkeeping on a simulated device: random arrivals, lengths, cancels and tiny pools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.request import FinishReason, QueueFull, Request, RequestError, SamplingParams
from tests.ar_core.simulated import EOS, SimulatedRunner, expected, random_prompt, simulated_engine, tokens


def config(**changes: object) -> EngineConfig:
    settings = {"device": "cpu", "max_running": 4, "kv_slots": 120, "max_step_tokens": 16, "overlap": False}
    return EngineConfig(**{**settings, **changes})  # type: ignore[arg-type]


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    return {output.request_id: output.tokens for output in engine.generate(requests)}


def assert_idle_and_whole(engine: Engine) -> None:
    assert not engine.has_work
    engine.scheduler.check()
    assert engine.tree.evictable_size == engine.tree.size, "a lock is left over"
    assert engine.pool.num_free + engine.tree.size == engine.pool.num_slots


@pytest.mark.parametrize("overlap", [False, True])
def test_sixteen_requests_compute_a_new_prefix_once(overlap: bool) -> None:
    engine, runner = simulated_engine(config(kv_slots=1000, max_running=16, max_step_tokens=32, overlap=overlap))
    prefix = list(range(10, 40)) * 3
    requests = [
        Request(str(i), tokens(*prefix, 1, i), SamplingParams(max_tokens=3, ignore_eos=True)) for i in range(16)
    ]
    results = run(engine, requests)
    assert all(results[request.id] == expected(request, 200) for request in requests)
    assert runner.computed <= len(prefix) + 1 + 16 * (1 + 2 + overlap)
    assert engine.stats().cached_tokens == 15 * (len(prefix) + 1)
    assert_idle_and_whole(engine)


def test_a_prefix_is_not_shared_across_salts() -> None:
    engine, _ = simulated_engine(config())
    prompt = tokens(*range(20))
    for salt in ("", "a", "b"):
        output = engine.generate([Request("r", prompt, SamplingParams(max_tokens=2), cache_salt=salt)])[0]
        assert output.cached_tokens == 0
    assert engine.generate([Request("r", prompt, SamplingParams(max_tokens=2), cache_salt="a")])[0].cached_tokens == 19


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    engine, _ = simulated_engine(config())
    first = Request("1", tokens(*range(20)), SamplingParams(max_tokens=10, ignore_eos=True))
    answer = run(engine, [first])["1"]
    second = Request("2", tokens(*range(20), *answer, 1, 2), SamplingParams(max_tokens=2))
    output = engine.generate([second])[0]
    assert output.cached_tokens == 29, "all but the last emitted token, whose KV was never needed"
    assert output.tokens == expected(second, 120)


def test_lower_priority_values_start_first() -> None:
    engine, _ = simulated_engine(config(max_running=1))
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for name, priority in (("late", 5), ("soon", 1), ("soonest", -1)):
        engine.add(Request(name, tokens(1, 2, 3), params, priority=priority))
    ended = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finish]
    assert ended == ["soonest", "soon", "late"]


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_sequences_resume_to_the_same_output(overlap: bool) -> None:
    engine, _ = simulated_engine(config(kv_slots=160, overlap=overlap))
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    requests = [Request(str(i), tokens(i, 1, 2), params) for i in range(6)]
    results = run(engine, requests)
    assert engine.stats().preempted > 0
    assert all(results[request.id] == expected(request, 160) for request in requests)
    assert_idle_and_whole(engine)


def test_refuses_what_can_never_be_served() -> None:
    engine, _ = simulated_engine(config())
    with pytest.raises(RequestError, match="prompt has 120 tokens; at most 119 fit"):
        engine.add(Request("long", tokens(*[1] * 120)))
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.add(Request("empty", tokens()))
    with pytest.raises(RequestError, match="token id 50 is not in the vocabulary"):
        engine.add(Request("id", tokens(50)))
    with pytest.raises(RequestError, match="logit_bias names token 50"):
        engine.add(Request("bias", tokens(1), SamplingParams(logit_bias={50: 1.0})))
    with pytest.raises(RequestError, match="takes no str"):
        engine.add(Request("kind", ["text"]))
    engine.add(Request("twice", tokens(1)))
    with pytest.raises(RequestError, match="'twice' is in use"):
        engine.add(Request("twice", tokens(1)))


def test_a_full_queue_refuses() -> None:
    engine, _ = simulated_engine(config(max_queue=2))
    for i in range(2):
        engine.add(Request(str(i), tokens(1)))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.add(Request("2", tokens(1)))


def test_stop_tokens_min_tokens_and_ignore_eos() -> None:
    engine, _ = simulated_engine(config(kv_slots=500))
    endings = set()
    for i in range(40):
        for params in (
            SamplingParams(max_tokens=40),
            SamplingParams(max_tokens=40, min_tokens=30),
            SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(i,)),
        ):
            request = Request("r", tokens(i, 3), params)
            output = engine.generate([request])[0]
            assert output.tokens == expected(request, 200)
            stopped = output.tokens[-1] in {i} if params.ignore_eos else output.tokens[-1] == EOS
            assert output.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            endings.add((params.min_tokens, params.ignore_eos, output.finish))
    assert len(endings) == 6, "each kind of ending was seen with each kind of request"


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kv_slots=st.integers(30, 150),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(1, 40),
    overlap=st.booleans(),
)
def test_random_traffic(seed: int, kv_slots: int, max_running: int, max_step_tokens: int, overlap: bool) -> None:
    """Every request ends, with what it would emit alone, and after every step each slot has one owner."""
    rng = np.random.default_rng(seed)
    engine, _ = simulated_engine(
        config(kv_slots=kv_slots, max_running=max_running, max_step_tokens=max_step_tokens, overlap=overlap)
    )
    requests = [_random_request(rng, i, kv_slots) for i in range(25)]
    emitted: dict[str, list[int]] = {request.id: [] for request in requests}
    finish: dict[str, FinishReason] = {}
    todo = list(requests)
    for _ in range(5000):
        while todo and rng.random() < 0.3:
            engine.add(todo.pop(0))
        if rng.random() < 0.03:
            engine.abort(str(rng.integers(len(requests))))
        for output in engine.step():
            assert output.request_id not in finish, "output after the end"
            emitted[output.request_id] += output.tokens
            if output.finish:
                finish[output.request_id] = output.finish
        engine.scheduler.check()
        if not todo and not engine.has_work:
            break
    assert len(finish) == len(requests), "a request was lost"
    for request in requests:
        alone = expected(request, engine.max_context)
        if finish[request.id] is FinishReason.ABORT:
            assert emitted[request.id] == alone[: len(emitted[request.id])]
        else:
            assert emitted[request.id] == alone
    assert_idle_and_whole(engine)


def _random_request(rng: np.random.Generator, i: int, kv_slots: int) -> Request:
    max_tokens = int(rng.integers(1, 60))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=int(rng.integers(0, max_tokens + 1)) if rng.random() < 0.3 else 0,
        ignore_eos=bool(rng.random() < 0.5),
    )
    prompt = random_prompt(rng, min(60, kv_slots - 2))
    salt = "tenant" if rng.random() < 0.2 else ""
    return Request(str(i), tokens(*prompt), params, priority=int(rng.integers(3)), cache_salt=salt)


def test_no_leak_after_thousands_of_requests() -> None:
    rng = np.random.default_rng(0)
    engine, _ = simulated_engine(config(kv_slots=300, max_running=8, max_step_tokens=64))
    for batch in range(20):
        requests = [_random_request(rng, i, 300) for i in range(batch * 200, (batch + 1) * 200)]
        results = run(engine, requests)
        assert all(results[request.id] == expected(request, 200) for request in requests)
        assert_idle_and_whole(engine)
    assert engine.stats().finished == 4000


def test_a_slot_given_to_two_sequences_is_noticed() -> None:
    """The check itself must be able to fail."""
    engine, _ = simulated_engine(config())
    engine.add(Request("a", tokens(1, 2, 3), SamplingParams(max_tokens=9, ignore_eos=True)))
    engine.step()
    engine.scheduler.check()
    seq = engine.scheduler.running[0]
    engine.pool._free[seq.slots[0]] = True
    engine.pool._num_free += 1
    with pytest.raises(AssertionError, match="several owners"):
        engine.scheduler.check()


def test_the_simulation_notices_a_wrong_slot() -> None:
    engine, runner = simulated_engine(config())
    request = Request("a", tokens(1, 2, 3), SamplingParams(max_tokens=9, ignore_eos=True))
    engine.add(request)
    emitted = [token for output in engine.step() for token in output.tokens]
    runner.digests[engine.scheduler.running[0].slots[2]] += 1
    while engine.has_work:
        emitted += [token for output in engine.step() for token in output.tokens]
    assert isinstance(runner, SimulatedRunner)
    assert emitted != expected(request, 120)
