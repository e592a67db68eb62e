"""A device without arithmetic, that tells whether the engine read and wrote the right slots.

What it "computes" for a position is a digest of everything that feeds it: the position's input and the digest
in the slot of the position before. So any mistake about slots, sharing or order changes what is emitted, and
`expected` says what is right.
"""

from __future__ import annotations

import numpy as np
import torch

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.interfaces import Emitted, KVShape
from ar_core.request import Request, Tokens
from ar_core.runner import Launched
from ar_core.scheduler import Work

VOCAB = 50
EOS = 7
_MASK = (1 << 61) - 1


def _digest(before: int, value: int) -> int:
    return (before * 1000003 + value * 7919 + 12345) % _MASK


def _emit(digest: int, banned: tuple[int, ...]) -> int:
    token = digest % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def expected(request: Request, max_context: int) -> list[int]:
    """What a request emits when served alone."""
    params = request.sampling
    ids = [token for segment in request.segments for token in segment.ids]
    digest = 0
    for token in ids:
        digest = _digest(digest, token)
    limit = min(params.max_tokens, max_context - len(ids))
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    emitted: list[int] = []
    while len(emitted) < limit:
        token = _emit(digest, tuple(stops) if len(emitted) < params.min_tokens else ())
        emitted.append(token)
        if token in stops:
            break
        digest = _digest(digest, token)
    return emitted


class SimulatedBackbone:
    kv_layout = (KVShape(1, 1, 1),)
    max_context = 200
    vocab_size = VOCAB
    eos_token_ids = (EOS,)
    dtype = torch.float32


class _Head:
    width = 1


class SimulatedRunner:
    def __init__(self, num_slots: int) -> None:
        self.digests = [0] * (num_slots + 1)
        self.last_rows: dict[int, int] = {}
        self.computed = 0

    def launch(self, work: list[Work], banned: dict[str, tuple[int, ...]]) -> Launched:
        emitting, rows = [], []
        for item in work:
            seq = item.seq
            self.computed += item.count
            for position in range(item.start, item.start + item.count):
                before = self.digests[seq.slots[position - 1]] if position else 0
                value = int(seq.inputs[position, 0]) if position < seq.known else self.last_rows[seq.lane]
                self.digests[seq.slots[position]] = _digest(before, value)
            if item.emits:
                token = _emit(self.digests[seq.slots[item.start + item.count - 1]], banned.get(seq.id, ()))
                self.last_rows[seq.lane] = token
                emitting.append(seq)
                rows.append([token])
        return Launched(emitting, Emitted(torch.tensor(rows, dtype=torch.int64).reshape(-1, 1)), None)


def simulated_engine(config: EngineConfig) -> tuple[Engine, SimulatedRunner]:
    engine = Engine(SimulatedBackbone(), _Head(), config)  # type: ignore[arg-type]
    runner = SimulatedRunner(engine.pool.num_slots)
    engine._runner = runner  # type: ignore[assignment]
    return engine, runner


def tokens(*ids: int) -> list[Tokens]:
    return [Tokens(list(ids))]


def random_prompt(rng: np.random.Generator, longest: int) -> list[int]:
    """Few different ids and a few fixed openings, so that prefixes are shared often, and now and then whole prompts."""
    opening = [[1, 2, 3, 4, 5, 6, 8, 9] * 3, [1, 2, 3, 4, 10, 11], []][rng.integers(3)]
    if opening and rng.random() < 0.2:
        return opening[:longest]
    rest = rng.integers(0, 4, size=rng.integers(1, max(2, longest - len(opening)))).tolist()
    return (opening + rest)[:longest]
