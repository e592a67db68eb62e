"""Batched sampling: every sequence with its own parameters, the same draw whatever else is in the batch.

A draw inverts the cumulative distribution at one uniform number per sequence and step, which the host derives
from the seed and the number of rows emitted so far. So a seeded request does not depend on its neighbours, on
chunking, or on having been preempted.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch

from ar_core.interfaces import Emitted
from ar_core.request import MAX_AVOID_REPEATS, SamplingParams

# On a CPU sorting a vocabulary costs milliseconds; the likeliest few thousand tokens nearly always hold all that
# top-p keeps.
_LIKELIEST = 4096
# What the second draw of `avoid_repeats` keeps of the distribution.
_SECOND_TOP_P = 0.9
_STRIDE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Draw:
    """What one sequence brings to a step in which it emits."""

    params: SamplingParams
    lane: int
    seed: int
    index: int  # rows emitted before
    banned: tuple[int, ...] = ()  # ids that may not be emitted now


@dataclass(frozen=True, slots=True)
class Penalties:
    """Presence, frequency [S] on the emitted rows' first integers; repetition [S] on these and the prompt's."""

    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    counts: torch.Tensor  # float32 [S, vocab]: how often each id was emitted
    seen: torch.Tensor  # bool [S, vocab]: in the prompt or emitted


@dataclass(frozen=True, slots=True)
class Bias:
    """Amounts float32 [n] added to the logits at (rows int64 [n], ids int64 [n])."""

    rows: torch.Tensor
    ids: torch.Tensor
    amounts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Late:
    """Temperatures that apply to what top-k, top-p and min-p leave: float32 [S], where `rows`, bool [S], says so."""

    rows: torch.Tensor
    temperature: torch.Tensor


@dataclass(frozen=True, slots=True)
class Repeats:
    """The second draw of what repeats itself: within top_p, float32 [S], at numbers `uniform`, float32 [S].

    recent: int64 [S, n], the ids that count as repeated; -1 stands for none.
    """

    recent: torch.Tensor
    uniform: torch.Tensor
    top_p: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingState:
    """The parameters of S sequences as tensors; what nobody asked for is None."""

    greedy: torch.Tensor | None = None  # bool [S]; None: all are, or none is
    temperature: torch.Tensor | None = None  # float32 [S]; 1 where greedy or late
    uniform: torch.Tensor | None = None  # float32 [S], in [0, 1); None: all are greedy
    top_k: torch.Tensor | None = None  # int64 [S]; the vocabulary's size where there is no limit
    top_p: torch.Tensor | None = None  # float32 [S]
    min_p: torch.Tensor | None = None  # float32 [S]
    max_top_k: int = 0  # largest limit if every sampled sequence has one, else 0
    late: Late | None = None
    repeats: Repeats | None = None
    # float32 [S, width - 1], in [0, 1): for the rest of a row that has more than one integer; None: all are greedy
    rest_uniform: torch.Tensor | None = None
    penalties: Penalties | None = None
    bias: Bias | None = None
    num_logprobs: int | None = None


def uniforms(seeds: Seq[int], indices: Seq[int]) -> np.ndarray:
    """One number in [0, 1) for each (seed, index): float32 [S]. The mixing is splitmix64 (Steele et al., 2014)."""
    return _to_unit(_mixed(seeds, indices))


def row_uniforms(seeds: Seq[int], indices: Seq[int], width: int) -> np.ndarray:
    """As `uniforms`, a number for each integer of a row: float32 [S, width]. The first is that of `uniforms`."""
    first = _mixed(seeds, indices)[:, None]
    rest = _mix(first + np.arange(1, width, dtype=np.uint64) * _STRIDE)
    return _to_unit(np.concatenate((first, rest), axis=1))


def _mixed(seeds: Seq[int], indices: Seq[int]) -> np.ndarray:
    x = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    return _mix(_mix(x) + np.array(indices, dtype=np.uint64) * _STRIDE)


def _to_unit(x: np.ndarray) -> np.ndarray:
    # 23 bits, so that a number times any total stays below that total after rounding (see `_invert`).
    return (x >> np.uint64(41)).astype(np.float32) / np.float32(1 << 23)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Builds each step's SamplingState and keeps, per lane, the counts that penalties need and what came last."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device, width: int = 1) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._width = width  # of the rows that are emitted
        self._num_lanes = num_lanes
        self._counts: torch.Tensor | None = None  # float32 [lanes, vocab], made when first needed
        self._seen: torch.Tensor | None = None  # bool [lanes, vocab]
        # What was emitted last, the newest at the end; -1 before the first.
        self._recent = torch.full((num_lanes, MAX_AVOID_REPEATS), -1, dtype=torch.int64, device=device)

    def start(self, params: SamplingParams, lane: int, prompt: np.ndarray, emitted: np.ndarray) -> None:
        """A sequence begins or resumes in `lane`, with its prompt's and so far emitted ids (int64)."""
        if params.avoid_repeats:
            last = torch.from_numpy(emitted[-MAX_AVOID_REPEATS:].copy()).to(self.device)
            self._recent[lane] = -1
            self._recent[lane, MAX_AVOID_REPEATS - len(last) :] = last
        if not _penalised(params):
            return
        counts, seen = self._tables()
        ids = torch.from_numpy(np.ascontiguousarray(emitted)).to(self.device)
        counts[lane] = torch.bincount(ids, minlength=self.vocab_size)[: self.vocab_size].float()
        seen[lane] = counts[lane] > 0
        seen[lane, torch.from_numpy(np.ascontiguousarray(prompt)).to(self.device)] = True

    def state(self, draws: Seq[Draw]) -> SamplingState:
        params = [draw.params for draw in draws]
        bias = self._bias(draws)
        penalties = self._penalties(draws) if any(map(_penalised, params)) else None
        num_logprobs = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        if all(p.greedy for p in params):
            return SamplingState(penalties=penalties, bias=bias, num_logprobs=num_logprobs)
        sampled = [p for p in params if not p.greedy]
        limits = [p.top_k for p in sampled]
        # The second integer's number is free for a second draw of the first: heads derive that integer from the first.
        numbers = torch.from_numpy(
            row_uniforms([d.seed for d in draws], [d.index for d in draws], max(self._width, 2))
        ).to(self.device)
        return SamplingState(
            greedy=self._tensor([p.greedy for p in params], torch.bool) if len(sampled) < len(params) else None,
            temperature=self._tensor([1.0 if p.temperature_last else p.temperature or 1.0 for p in params]),
            uniform=numbers[:, 0],
            top_k=self._tensor([p.top_k or self.vocab_size for p in params], torch.int64) if any(limits) else None,
            top_p=self._tensor([p.top_p for p in params]) if any(p.top_p < 1 for p in sampled) else None,
            min_p=self._tensor([p.min_p for p in params]) if any(p.min_p > 0 for p in sampled) else None,
            max_top_k=min(max(limits), self.vocab_size) if all(limits) else 0,
            late=self._late(params) if any(p.temperature_last for p in sampled) else None,
            repeats=self._repeats(draws, numbers[:, 1]) if any(p.avoid_repeats for p in sampled) else None,
            rest_uniform=numbers[:, 1 : self._width],
            penalties=penalties,
            bias=bias,
            num_logprobs=num_logprobs,
        )

    def note(self, draws: Seq[Draw], rows: torch.Tensor) -> None:
        """Take note of what the step emitted (int64 [S, width]) for the sequences to which it matters."""
        at = [i for i, draw in enumerate(draws) if draw.params.avoid_repeats]
        if at:
            lanes = self._tensor([draws[i].lane for i in at], torch.int64)
            newest = rows[self._tensor(at, torch.int64), :1]
            self._recent[lanes] = torch.cat((self._recent[lanes, 1:], newest), dim=1)
        if self._counts is None or self._seen is None:
            return
        at = [i for i, draw in enumerate(draws) if _penalised(draw.params)]
        if at:
            lanes = self._tensor([draws[i].lane for i in at], torch.int64)
            ids = rows[self._tensor(at, torch.int64), 0]
            self._counts[lanes, ids] += 1
            self._seen[lanes, ids] = True

    def _late(self, params: Seq[SamplingParams]) -> Late:
        return Late(
            rows=self._tensor([p.temperature_last for p in params], torch.bool),
            temperature=self._tensor([p.temperature if p.temperature_last and p.temperature else 1.0 for p in params]),
        )

    def _repeats(self, draws: Seq[Draw], uniform: torch.Tensor) -> Repeats:
        recent = self._recent[self._tensor([draw.lane for draw in draws], torch.int64)]
        asked = self._tensor([draw.params.avoid_repeats for draw in draws], torch.int64)[:, None]
        age = torch.arange(MAX_AVOID_REPEATS, 0, -1, device=self.device)
        return Repeats(
            recent=torch.where(age <= asked, recent, -1),
            uniform=uniform,
            top_p=torch.full_like(uniform, _SECOND_TOP_P),
        )

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._counts is None or self._seen is None:
            shape = (self._num_lanes, self.vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.float32, device=self.device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return self._counts, self._seen

    def _penalties(self, draws: Seq[Draw]) -> Penalties:
        counts, seen = self._tables()
        asked = self._tensor([_penalised(draw.params) for draw in draws], torch.bool)
        lanes = self._tensor([draw.lane for draw in draws], torch.int64)
        return Penalties(
            presence=self._tensor([d.params.presence_penalty for d in draws]),
            frequency=self._tensor([d.params.frequency_penalty for d in draws]),
            repetition=self._tensor([d.params.repetition_penalty for d in draws]),
            counts=counts[lanes] * asked[:, None],  # a lane that nobody penalises holds what another left there
            seen=seen[lanes] & asked[:, None],
        )

    def _bias(self, draws: Seq[Draw]) -> Bias | None:
        entries = [
            (row, token, amount)
            for row, draw in enumerate(draws)
            if draw.params.logit_bias or draw.banned
            for token, amount in (
                *draw.params.logit_bias.items(),
                *((token, -torch.inf) for token in draw.banned),
            )
        ]
        if not entries:
            return None
        rows, ids, amounts = zip(*entries, strict=True)
        return Bias(self._tensor(rows, torch.int64), self._tensor(ids, torch.int64), self._tensor(amounts))

    def _tensor(self, values: Seq[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def emit(logits: torch.Tensor, state: SamplingState) -> Emitted:
    """One id per row of logits, float32 [S, vocab] (overwritten), with log-probabilities if a sequence wants them."""
    logprobs = torch.log_softmax(logits, dim=-1) if state.num_logprobs is not None else None
    ids = sample(logits, state)
    if logprobs is None:
        return Emitted(rows=ids[:, None])
    top = logprobs.topk(min(state.num_logprobs or 0, logprobs.shape[1]), dim=-1)
    return Emitted(ids[:, None], logprobs.gather(1, ids[:, None])[:, 0], top.indices, top.values)


def sample(logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """One id per row of logits, float32 [S, vocab] (overwritten): int64 [S]."""
    if state.penalties is not None:
        logits = _penalise(logits, state.penalties)
    if state.bias is not None:
        logits.index_put_((state.bias.rows, state.bias.ids), state.bias.amounts, accumulate=True)
    if state.uniform is None or state.temperature is None:
        return _argmax(logits)
    second = None if state.repeats is None else _second_draw(logits, state.repeats, state)
    drawn = _draw(torch.softmax(logits.div_(state.temperature[:, None]), dim=-1), state.uniform, state)
    if state.repeats is not None and second is not None:
        drawn = torch.where((state.repeats.recent == drawn[:, None]).any(dim=-1), second, drawn)
    return drawn if state.greedy is None else torch.where(state.greedy, _argmax(logits), drawn)


def _second_draw(logits: torch.Tensor, repeats: Repeats, state: SamplingState) -> torch.Tensor:
    """What takes the place of an id that repeats itself: int64 [S]."""
    late = None if state.late is None else replace(state.late, temperature=torch.ones_like(repeats.top_p))
    return _draw(torch.softmax(logits, dim=-1), repeats.uniform, replace(state, top_p=repeats.top_p, late=late))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cpu":  # numpy's is eight times as fast there
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _penalise(logits: torch.Tensor, p: Penalties) -> torch.Tensor:
    factor = p.repetition[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(p.seen, repeated, logits)
    return logits - p.frequency[:, None] * p.counts - p.presence[:, None] * (p.counts > 0)


def _draw(probs: torch.Tensor, uniform: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Draw from probs, float32 [S, vocab] (overwritten), within top-k, top-p and min-p: int64 [S].

    The limits become the least probability that each row keeps, and the draw is made in the order of the ids. So it
    does not depend on how others in the batch are limited, nor on how equal probabilities are sorted.
    """
    if state.top_k is not None or state.top_p is not None or state.min_p is not None:
        probs.masked_fill_(probs < _least_kept(probs, state), 0.0)
    if state.late is not None:
        # Powers of what is at most 1 and 1 somewhere, so that a low temperature leaves something.
        scaled = (probs / probs.amax(dim=-1, keepdim=True)).pow_(1 / state.late.temperature[:, None])
        probs = torch.where(state.late.rows[:, None], scaled, probs)
    return _invert(probs, uniform)


def _least_kept(probs: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """The least probability within the limits of each row of probs, float32 [S, vocab]: [S, 1]."""
    likeliest = _likeliest(probs, state)
    least = likeliest.new_zeros(len(probs), 1)
    sums = likeliest.cumsum(dim=-1)
    total = torch.ones_like(least)
    if state.top_k is not None:
        limited = state.top_k[:, None] < probs.shape[1]
        last = (state.top_k[:, None] - 1).clamp(max=likeliest.shape[1] - 1)
        least = torch.where(limited, likeliest.gather(1, last), least)
        within = limited if state.late is None else limited & ~state.late.rows[:, None]
        total = torch.where(within, sums.gather(1, last), total)
    if state.top_p is not None:
        # Over what top-k left, or all of an untempered distribution; the token that crosses the border stays in.
        top_p = state.top_p[:, None]
        kept = (sums - likeliest < top_p * total).sum(dim=-1, keepdim=True)
        least = torch.where(top_p < 1, torch.maximum(least, likeliest.gather(1, kept - 1)), least)
    if state.min_p is not None:
        least = torch.maximum(least, state.min_p[:, None] * likeliest[:, :1])
    return least


def _likeliest(probs: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Each row's probabilities in falling order, as far as the limits need them: [S, n]."""
    if state.max_top_k:
        return torch.topk(probs, min(state.max_top_k, probs.shape[1]), dim=-1).values
    if probs.device.type == "cpu":
        likeliest = _sorted(probs, _LIKELIEST)
        return likeliest if _is_enough(likeliest, probs.shape[1], state) else _sorted(probs, probs.shape[1])
    return torch.sort(probs, dim=-1, descending=True).values


def _sorted(probs: torch.Tensor, n: int) -> torch.Tensor:
    """The n largest of each row on a CPU, in falling order: numpy's sort is tens of times as fast as torch's."""
    largest = probs.numpy()
    if n < probs.shape[1]:
        largest = np.partition(largest, -n, axis=-1)[:, -n:]
    return torch.from_numpy(np.sort(largest, axis=-1)[:, ::-1].copy())


def _is_enough(likeliest: torch.Tensor, vocab_size: int, state: SamplingState) -> bool:
    """Whether every row's top-k and top-p end within its `likeliest` probabilities, [S, n]."""
    n = likeliest.shape[1]
    enough = torch.ones(len(likeliest), dtype=torch.bool)
    if state.top_p is not None:
        enough = (state.top_p == 1) | (likeliest.sum(dim=-1) >= state.top_p)
    if state.top_k is not None:
        enough = torch.where(state.top_k < vocab_size, state.top_k <= n, enough)
    return bool(enough.all())


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which each row's running sum of weights, float32 [S, n], passes its share `uniform`: int64 [S]."""
    sums = weights.cumsum(dim=-1)
    return torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
