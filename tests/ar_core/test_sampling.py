"""Sampling against transformers' logits processors: the share of draws each token gets over evenly spread uniforms."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ar_core.request import RequestError, SamplingParams
from ar_core.sampling import Draw, Sampler, SamplingState, emit, row_uniforms, sample, uniforms

VOCAB = 600
DRAWS = 4000


def shares(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """How often each token is drawn from logits [vocab]."""
    sampler = Sampler(DRAWS + 1, VOCAB, torch.device("cpu"))
    state = sampler.state([Draw(params, i, 0, 0) for i in range(DRAWS)])
    spread = (torch.arange(DRAWS) + 0.5) / DRAWS
    state = SamplingState(**{name: getattr(state, name) for name in state.__slots__} | {"uniform": spread})
    ids = sample(logits.expand(DRAWS, -1).clone(), state)
    return torch.bincount(ids, minlength=VOCAB) / DRAWS


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None]).softmax(-1)[0]


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(top_p=0.999),
        SamplingParams(min_p=0.2),
        SamplingParams(min_p=0.001),
        SamplingParams(top_k=40, top_p=0.7, temperature=1.3),
        SamplingParams(top_k=400, top_p=0.9),
        SamplingParams(top_k=30, top_p=0.9, min_p=0.05, temperature=0.8),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_draws_follow_the_limited_distribution(params: SamplingParams, spread: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    assert (shares(logits, params) - reference(logits, params)).abs().max() < 1.5 / DRAWS


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.5])
def test_a_late_temperature_applies_to_what_the_limits_leave_of_the_untempered_distribution(temperature: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    params = SamplingParams(temperature=temperature, top_k=30, top_p=0.6, temperature_last=True)
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = min(30, int((probs.cumsum(0) - probs < 0.6).sum()))
    right = torch.zeros(VOCAB)
    right[order[:kept]] = (logits[order[:kept]] / temperature).softmax(-1)
    assert 1 < kept < 30
    assert (shares(logits, params) - right).abs().max() < 1.5 / DRAWS


def test_a_repeated_id_is_drawn_again_and_the_second_draw_stands() -> None:
    """Within the window, within top-p 0.9, untempered, and whatever it brings."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    params = SamplingParams(temperature=0.5, avoid_repeats=2)
    sampler = Sampler(DRAWS + 1, 4, torch.device("cpu"))
    draws = [Draw(params, i, i, 7) for i in range(DRAWS)]
    for i in range(DRAWS):
        sampler.start(params, i, np.array([1, 1]), np.array([2, 2, 3]))
    sampler.note(draws, torch.zeros(DRAWS, 1, dtype=torch.int64))
    first = (probs.log() / 0.5).softmax(-1)
    second = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    repeated = torch.tensor([True, False, False, True])  # 2 is too long ago, 1 only in the prompt
    right = torch.where(repeated, 0.0, first) + first[repeated].sum() * second
    ids = sample(probs.log().expand(DRAWS, -1).clone(), sampler.state(draws))
    assert (torch.bincount(ids, minlength=4) / DRAWS - right).abs().max() < 0.025


def test_every_integer_of_a_row_has_a_number_of_its_own() -> None:
    seeds, indices = list(range(40)) * 25, [i // 40 for i in range(1000)]
    numbers = row_uniforms(seeds, indices, 11)
    assert (numbers[:, 0] == uniforms(seeds, indices)).all()
    assert (numbers >= 0).all() and (numbers < 1).all() and len(np.unique(numbers)) > 10_900
    assert abs(np.corrcoef(numbers.T) - np.eye(11)).max() < 0.12


def test_penalties_and_bias() -> None:
    rng = np.random.default_rng(0)
    prompt, emitted = rng.integers(0, VOCAB, 20), rng.integers(0, 30, 40)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={3: 5.0, 4: -5.0}
    )
    sampler = Sampler(4, VOCAB, torch.device("cpu"))
    sampler.start(params, 2, prompt, emitted[:-1])
    draws = [Draw(params, 2, 0, 40), Draw(SamplingParams(temperature=0), 3, 0, 0)]
    sampler.note(draws, torch.tensor([[emitted[-1]], [5]]))
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2)) * 0.2
    ids = torch.from_numpy(np.concatenate([prompt, emitted]))[None]
    right = RepetitionPenaltyLogitsProcessor(1.4)(ids, logits[:1].clone())[0]
    counts = torch.bincount(torch.from_numpy(emitted), minlength=VOCAB)
    right -= 0.2 * counts + 0.3 * (counts > 0)
    right[3] += 5.0
    right[4] -= 5.0
    # What is left of the state shows in the scores' order: compare it whole, by banning the best one after the other.
    order = right.argsort(descending=True).tolist()
    for n in range(0, 60, 7):
        banned = Draw(params, 2, 0, 40, banned=tuple(order[:n]))
        got = sample(logits.clone(), sampler.state([banned, draws[1]])).tolist()
        assert got == [order[n], int(logits[1].argmax())]


def test_a_lane_forgets_who_was_there_before() -> None:
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    sampler = Sampler(3, VOCAB, torch.device("cpu"))
    sampler.start(params, 1, np.array([1]), np.array([7, 7]))
    sampler.start(params, 1, np.array([1]), np.array([], dtype=np.int64))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 1.0
    assert sample(logits, sampler.state([Draw(params, 1, 0, 0)])).tolist() == [7]


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))
    params = [
        SamplingParams(seed=1),
        SamplingParams(temperature=0),
        SamplingParams(seed=2, top_p=0.5),
        SamplingParams(seed=3, top_k=3),
        SamplingParams(seed=4, min_p=0.1, temperature=2.0),
    ]
    sampler = Sampler(9, VOCAB, torch.device("cpu"))
    draws = [Draw(p, i + 1, p.seed or 0, 17) for i, p in enumerate(params)]
    together = sample(logits.clone(), sampler.state(draws)).tolist()
    alone = [int(sample(logits[i : i + 1].clone(), sampler.state([draws[i]]))) for i in range(5)]
    assert together == alone


def test_uniforms_are_uniform_and_differ() -> None:
    u = np.concatenate([uniforms([seed] * 500, range(500)) for seed in range(20)])
    assert u.dtype == np.float32 and (u >= 0).all() and (u < 1).all()
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12**-0.5) < 0.01
    assert len(np.unique(u)) > 9_900
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.05


def test_never_draws_what_has_no_probability() -> None:
    """Also not at the very ends of the uniform range."""
    sampler = Sampler(3, VOCAB, torch.device("cpu"))
    state = sampler.state([Draw(SamplingParams(), 1, 0, 0), Draw(SamplingParams(), 2, 0, 0)])
    edges = torch.tensor([0.0, 1.0 - 2**-23])
    state = SamplingState(**{name: getattr(state, name) for name in state.__slots__} | {"uniform": edges})
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, 100:200] = torch.randn(100)
    assert all(100 <= token < 200 for token in sample(logits, state).tolist())


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(2, VOCAB)
    params = [SamplingParams(temperature=0, logprobs=3, logit_bias={9: 100.0}), SamplingParams(temperature=0.3, seed=1)]
    sampler = Sampler(3, VOCAB, torch.device("cpu"))
    got = emit(logits.clone(), sampler.state([Draw(params[0], 1, 0, 0), Draw(params[1], 2, 1, 0)]))
    right = logits.log_softmax(-1)
    assert got.logprob is not None and got.top_ids is not None and got.top_logprobs is not None
    assert got.rows[0, 0] == 9
    torch.testing.assert_close(got.logprob, right.gather(1, got.rows)[:, 0])
    torch.testing.assert_close(got.top_logprobs, right.topk(3).values)
    assert got.top_ids.tolist() == right.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 999),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("avoid_repeats", 65),
    ],
)
def test_out_of_range_parameters_name_themselves(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"{field} is {value}; it must be") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
