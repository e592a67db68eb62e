"""What callers of the engine rely on, on a real if tiny model: sharing, log-probabilities, endings, seeds, aborts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.interfaces import Backbone
from ar_core.models import load_backbone
from ar_core.request import FinishReason, Output, Request, RequestError, SamplingParams, Tokens
from tests.ar_core.against_transformers import CPU, eager, greedy_answers, make_engine, shared_prompts
from tests.ar_core.tiny_checkpoints import MAX_CONTEXT, VOCAB_SIZE, make_checkpoint

EOS = 2
PROMPT = list(range(10, 50))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, PreTrainedModel]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    return load_backbone(folder, device=CPU, dtype="float32"), eager(folder)


@pytest.fixture
def backbone(models: tuple[Backbone, PreTrainedModel]) -> Backbone:
    return models[0]


@pytest.fixture
def reference(models: tuple[Backbone, PreTrainedModel]) -> PreTrainedModel:
    return models[1]


@torch.inference_mode()
def logprobs_of(reference: PreTrainedModel, prompt: list[int], emitted: list[int]) -> torch.Tensor:
    """The model's own distributions behind each emitted token: [n, vocab]."""
    logits = reference(torch.tensor([prompt + emitted]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def request(name: str, prompt: list[int] = PROMPT, **sampling: object) -> Request:
    return Request(name, [Tokens(prompt)], SamplingParams(**sampling))  # type: ignore[arg-type]


def greedy(name: str, prompt: list[int] = PROMPT, **sampling: object) -> Request:
    return request(name, prompt, **{"temperature": 0, "ignore_eos": True, "max_tokens": 8, **sampling})


def assert_idle_and_whole(engine: Engine) -> None:
    assert not engine.has_work
    engine.scheduler.check()
    assert engine.tree.evictable_size == engine.tree.size, "a lock is left over"
    assert engine.pool.num_free + engine.tree.size == engine.pool.num_slots


# Sharing


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_with_one_prompt_share_its_kv(backbone: Backbone, overlap: bool) -> None:
    engine = make_engine(backbone, overlap=overlap)
    for seed in range(8):
        engine.add(request(str(seed), max_tokens=4, seed=seed, temperature=2.0, ignore_eos=True))
    engine.step()
    assert len(engine.scheduler.running) == 8
    assert engine.stats().kv_slots_used == len(PROMPT)
    slots = [seq.slots[: len(PROMPT)].tolist() for seq in engine.scheduler.running]
    assert all(row == slots[0] for row in slots)
    engine.step()
    assert engine.stats().kv_slots_used == len(PROMPT) + 8, "each has one position of its own"
    assert engine.stats().cached_tokens == 7 * (len(PROMPT) - 1)
    while engine.has_work:
        engine.step()
    assert_idle_and_whole(engine)


def test_one_prompt_with_many_seeds_gives_each_its_own_answer(backbone: Backbone) -> None:
    requests = [request(str(seed), max_tokens=12, seed=seed, temperature=1.5, ignore_eos=True) for seed in range(12)]
    together = [output.tokens for output in make_engine(backbone).generate(requests)]
    alone = [make_engine(backbone).generate([single])[0].tokens for single in requests]
    assert together == alone
    assert len(set(map(tuple, together))) == 12


# Log-probabilities


@pytest.mark.parametrize("overlap", [False, True])
def test_logprobs_are_the_log_softmax_of_the_models_logits(
    backbone: Backbone, reference: PreTrainedModel, overlap: bool
) -> None:
    asked = [None, 0, 1, 5, 20, None, 3, 20]
    kinds: list[dict[str, object]] = [{"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "logit_bias": {9: 3.0}}]
    kinds += [{"temperature": 1.3, "repetition_penalty": 1.5}, {"temperature": 0, "logit_bias": {11: 50.0}}]
    prompts = shared_prompts(8)
    requests = [
        request(str(i), prompts[i], max_tokens=6, ignore_eos=True, logprobs=n, seed=i, **kinds[i % 4])
        for i, n in enumerate(asked)
    ]
    for output, prompt, n in zip(make_engine(backbone, overlap=overlap).generate(requests), prompts, asked):
        if n is None:
            assert output.logprobs is None
            continue
        assert output.logprobs is not None
        assert [entry.token for entry in output.logprobs] == output.tokens and len(output.tokens) == 6
        for entry, right in zip(output.logprobs, logprobs_of(reference, prompt, output.tokens), strict=True):
            assert entry.logprob == pytest.approx(float(right[entry.token]), abs=1e-4)
            best = right.topk(n)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# Aborts


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", range(13))
def test_an_abort_at_any_step_frees_slots_at_once_and_gives_one_last_output(
    backbone: Backbone, steps: int, overlap: bool
) -> None:
    """The prompt of 40 takes five steps and the answer would take six more, so every state is met."""
    engine = make_engine(backbone, max_step_tokens=8, max_running=2, kv_slots=200, overlap=overlap)
    engine.add(greedy("a", max_tokens=6))
    outputs = [output for _ in range(steps) for output in engine.step()]
    ended = [output for output in outputs if output.finish]
    engine.abort("a")
    engine.abort("a")
    engine.scheduler.check()
    assert engine.tree.evictable_size == engine.tree.size
    assert engine.pool.num_free + engine.tree.size == engine.pool.num_slots
    after = []
    while engine.has_work:
        after += engine.step()
    if ended:
        assert after == [] and ended[0].finish is FinishReason.LENGTH
        assert engine.stats().aborted == 0
    else:
        (last,) = after
        assert (last.request_id, last.rows, last.finish) == ("a", [], FinishReason.ABORT)
        assert (engine.stats().aborted, engine.stats().finished) == (1, 0)
    assert_idle_and_whole(engine)
    assert engine.step() == []


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 6, 9])
def test_an_abort_leaves_the_others_as_they_were(backbone: Backbone, steps: int, overlap: bool) -> None:
    prompts = shared_prompts(6)
    requests = [greedy(str(i), ids) for i, ids in enumerate(prompts)]
    right = {output.request_id: output.tokens for output in make_engine(backbone).generate(requests)}
    engine = make_engine(backbone, max_running=3, max_step_tokens=10, overlap=overlap)
    got: dict[str, list[int]] = {single.id: [] for single in requests}
    for single in requests:
        engine.add(single)
    outputs = [output for _ in range(steps) for output in engine.step()]
    victims = [engine.scheduler.running[0].id] if engine.scheduler.running else []
    victims.append(engine.scheduler.waiting[-1].id) if engine.scheduler.waiting else None
    for victim in victims:
        engine.abort(victim)
    while engine.has_work:
        outputs += engine.step()
    for output in outputs:
        got[output.request_id] += output.tokens
    aborted = [output.request_id for output in outputs if output.finish is FinishReason.ABORT]
    assert sorted(aborted) == sorted(victims) and victims
    for name, tokens in got.items():
        assert tokens == right[name][: len(tokens)] if name in victims else tokens == right[name]
    assert_idle_and_whole(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_waiting_request_is_aborted_without_having_run(backbone: Backbone, overlap: bool) -> None:
    engine = make_engine(backbone, max_running=1, overlap=overlap)
    engine.add(greedy("first"))
    engine.add(greedy("second", [5, 6, 7]))
    engine.step()
    engine.abort("second")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    last = [output for output in outputs if output.request_id == "second"]
    assert [(output.finish, output.rows, output.prompt_tokens) for output in last] == [(FinishReason.ABORT, [], 3)]
    assert engine.stats().prompt_tokens == len(PROMPT), "only what was started is counted"
    assert_idle_and_whole(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_id_is_free_again_as_soon_as_its_request_is_aborted(backbone: Backbone, overlap: bool) -> None:
    right = make_engine(backbone).generate([greedy("a", [7, 8, 9])])[0].tokens
    engine = make_engine(backbone, overlap=overlap)
    engine.add(greedy("a"))
    engine.step()
    engine.step()
    engine.abort("a")
    engine.add(greedy("a", [7, 8, 9]))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[0].finish is FinishReason.ABORT, "the end of the old one comes before anything of the new"
    assert [token for output in outputs[1:] for token in output.tokens] == right
    assert_idle_and_whole(engine)


def test_an_unknown_or_ended_request_is_not_aborted(backbone: Backbone) -> None:
    engine = make_engine(backbone)
    engine.abort("nobody")
    engine.generate([greedy("a")])
    engine.abort("a")
    assert not engine.has_work and engine.step() == [] and engine.stats().aborted == 0


# Endings


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_ids_end_a_request_where_they_first_come(
    backbone: Backbone, reference: PreTrainedModel, overlap: bool
) -> None:
    engine = make_engine(backbone, overlap=overlap)
    for prompt, answer in zip(shared_prompts(8), greedy_answers(reference, shared_prompts(8)), strict=True):
        stop = answer.tokens[4]
        first = answer.tokens.index(stop)
        output = engine.generate([greedy("a", prompt, max_tokens=10, stop_token_ids=(stop, VOCAB_SIZE - 1))])[0]
        assert (output.tokens, output.finish) == (answer.tokens[: first + 1], FinishReason.STOP)
    assert_idle_and_whole(engine)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eos_ends_a_request_unless_ignored_or_before_min_tokens(
    backbone: Backbone, temperature: float, overlap: bool
) -> None:
    likely = {"logit_bias": {EOS: 100.0}, "max_tokens": 9, "temperature": temperature, "seed": 3}
    outputs = make_engine(backbone, overlap=overlap).generate(
        [
            request("plain", **likely),
            request("ignored", ignore_eos=True, **likely),
            request("later", min_tokens=5, **likely),
            request("ignored and later", ignore_eos=True, min_tokens=5, **likely),
            request("all of them", min_tokens=9, **likely),
        ]
    )
    plain, ignored, later, both, whole = outputs
    assert (plain.tokens, plain.finish) == ([EOS], FinishReason.STOP)
    assert (ignored.tokens, ignored.finish) == ([EOS] * 9, FinishReason.LENGTH)
    assert len(later.tokens) == 6 and later.tokens.index(EOS) == 5 and later.finish is FinishReason.STOP
    assert (both.tokens, both.finish) == ([EOS] * 9, FinishReason.LENGTH)
    assert len(whole.tokens) == 9 and EOS not in whole.tokens and whole.finish is FinishReason.LENGTH


def test_min_tokens_keeps_stop_ids_away_too(backbone: Backbone, reference: PreTrainedModel) -> None:
    prompt = shared_prompts(3)[2]
    tokens = greedy_answers(reference, [prompt])[0].tokens
    output = make_engine(backbone).generate([greedy("a", prompt, min_tokens=3, stop_token_ids=(tokens[0],))])[0]
    second = logprobs_of(reference, prompt, [tokens[0]])[0].topk(2).indices[1]
    assert output.tokens[0] == int(second) and tokens[0] not in output.tokens[:3]


def test_an_answer_ends_where_the_context_does(backbone: Backbone) -> None:
    engine = make_engine(backbone, max_context=len(PROMPT) + 5)
    output = engine.generate([greedy("a", max_tokens=100)])[0]
    assert (len(output.tokens), output.finish) == (5, FinishReason.LENGTH)
    long = make_engine(backbone)
    assert long.max_context == MAX_CONTEXT
    output = long.generate([greedy("a", [5] * (MAX_CONTEXT - 1), max_tokens=100)])[0]
    assert (len(output.tokens), output.finish) == (1, FinishReason.LENGTH)


# Sampling in company


MIXED: list[dict[str, object]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"temperature": 1.0, "logit_bias": {5: 8.0, 6: -100.0}},
    {"temperature": 0.8, "min_tokens": 6, "stop_token_ids": tuple(range(60, 128))},
    {"temperature": 1.5, "logprobs": 3},
    {"temperature": 0, "frequency_penalty": 2.0, "logprobs": 0},
    {"temperature": 1.0, "ignore_eos": True, "logit_bias": {EOS: 6.0}},
]


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 16},
        {"max_running": 16, "overlap": True},
        {"max_running": 16, "max_step_tokens": 16, "overlap": True},
        {"max_running": 16, "max_step_tokens": 16, "kv_slots": 110},
        {"max_running": 16, "kv_slots": 110, "overlap": True},
    ],
    ids=["together", "overlap", "chunks", "preemption", "preemption and overlap"],
)
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(
    backbone: Backbone, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = shared_prompts(len(MIXED))
    requests = [
        request(str(i), ids, **{"max_tokens": 20, "seed": 100 + i, **params})
        for i, (ids, params) in enumerate(zip(prompts, MIXED, strict=True))
    ]
    alone = [make_engine(backbone).generate([single])[0] for single in requests]
    monkeypatch.setattr("ar_core.scheduler._EXPECTED_GROWTH", 1)
    engine = make_engine(backbone, **options)
    together = engine.generate(requests)
    assert [output.rows for output in together] == [output.rows for output in alone]
    assert [output.finish for output in together] == [output.finish for output in alone]
    for one, other in zip(together, alone):
        assert [entry.token for entry in one.logprobs or []] == [entry.token for entry in other.logprobs or []]
    assert (engine.stats().preempted > 2) is ("kv_slots" in options)
    assert_idle_and_whole(engine)


def test_without_a_seed_answers_differ(backbone: Backbone) -> None:
    requests = [request(str(i), temperature=1.5, max_tokens=10, ignore_eos=True) for i in range(6)]
    assert len({tuple(output.tokens) for output in make_engine(backbone).generate(requests)}) == 6


# Counting


@pytest.mark.parametrize("options", [{}, {"max_running": 4, "max_step_tokens": 9}], ids=["plain", "chunks"])
def test_statistics_add_up(backbone: Backbone, options: dict[str, object]) -> None:
    engine = make_engine(backbone, overlap=False, kv_slots=3000, **options)
    prompts = shared_prompts(20)
    requests = [greedy(str(i), ids, max_tokens=3 + i % 5) for i, ids in enumerate(prompts)]
    outputs = engine.generate(requests)
    stats = engine.stats()
    assert (stats.requests, stats.finished, stats.aborted, stats.preempted) == (20, 20, 0, 0)
    assert (stats.running, stats.waiting, stats.evicted_tokens) == (0, 0, 0)
    assert stats.prompt_tokens == sum(map(len, prompts)) == sum(output.prompt_tokens for output in outputs)
    assert stats.cached_tokens == sum(output.cached_tokens for output in outputs) > 0
    assert stats.generated_tokens == sum(len(output.rows) for output in outputs) == sum(3 + i % 5 for i in range(20))
    # The last token of an answer is not followed, so its position is never computed.
    assert stats.computed_tokens == stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens - stats.finished
    assert stats.kv_slots == 3000 and stats.kv_slots_used == stats.kv_slots_cached == engine.tree.size
    assert 0 < stats.steps <= stats.computed_tokens


def test_statistics_of_the_moment(backbone: Backbone) -> None:
    engine = make_engine(backbone, max_running=2, overlap=False)
    for i in range(5):
        engine.add(greedy(str(i), [i + 3] * 10))
    assert (engine.stats().running, engine.stats().waiting) == (0, 5)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    assert (engine.stats().kv_slots_used, engine.stats().kv_slots_cached) == (20, 0)
    engine.abort("0")
    assert (engine.stats().running, engine.stats().kv_slots_cached) == (1, 10)


# Many requests


def test_generate_takes_more_requests_than_the_queue_holds(backbone: Backbone) -> None:
    prompts = shared_prompts(30)
    requests = [greedy(str(i), ids) for i, ids in enumerate(prompts)]
    right = make_engine(backbone).generate(requests)
    streamed: dict[str, list[int]] = {}
    got = make_engine(backbone, max_queue=2, max_running=3).generate(
        iter(requests), lambda output: streamed.setdefault(output.request_id, []).extend(output.tokens)
    )
    assert [(output.request_id, output.tokens) for output in got] == [(str(i), right[i].tokens) for i in range(30)]
    assert streamed == {output.request_id: output.tokens for output in got}


def test_an_id_in_use_is_refused_and_free_afterwards(backbone: Backbone) -> None:
    engine = make_engine(backbone)
    engine.add(greedy("a"))
    with pytest.raises(RequestError, match="request id 'a' is in use") as error:
        engine.add(greedy("a"))
    assert error.value.param == "id"
    while engine.has_work:
        engine.step()
    assert len(engine.generate([greedy("a")])[0].tokens) == 8


@pytest.mark.parametrize("queue", [1, 100])
def test_generate_refuses_an_id_given_twice(backbone: Backbone, queue: int) -> None:
    engine = make_engine(backbone, max_queue=queue)
    with pytest.raises(RequestError, match="request id 'a' is given 2 times"):
        engine.generate([greedy("a", max_tokens=1), greedy("b"), greedy("a", max_tokens=1)])
    assert_idle_and_whole(engine)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("queue", [2, 100])
def test_a_request_that_cannot_be_served_leaves_no_others_behind(backbone: Backbone, queue: int, overlap: bool) -> None:
    engine = make_engine(backbone, max_queue=queue, max_running=2, overlap=overlap)
    requests = [greedy(str(i)) for i in range(8)]
    with pytest.raises(RequestError, match="token id 999 is not in the vocabulary"):
        engine.generate([*requests, greedy("bad", [999])])
    assert_idle_and_whole(engine)
    assert len(engine.generate(requests)) == 8


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_running", 0),
        ("max_queue", 0),
        ("max_step_tokens", 0),
        ("max_context", 1),
        ("kv_slots", -5),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.5),
    ],
)
def test_settings_that_no_engine_could_work_with_name_themselves(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        replace(EngineConfig(), **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"kv_slots": 2, "max_running": 1},
        {"max_context": 2, "kv_slots": 2, "max_running": 1},
        {"max_step_tokens": 1, "max_running": 1},
        {"max_queue": 1, "max_running": 1},
    ],
    ids=str,
)
def test_the_smallest_settings_work(backbone: Backbone, options: dict[str, object]) -> None:
    engine = make_engine(backbone, **options)
    outputs = engine.generate([greedy(str(i), [i + 5]) for i in range(3)])
    assert all(len(output.tokens) == min(8, engine.max_context - 1) for output in outputs)
    assert_idle_and_whole(engine)
