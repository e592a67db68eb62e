"""The engine on a model whose positions are frames and embedding rows: nothing in it may assume token ids."""

import numpy as np
import pytest
import torch

from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.interfaces import row_keys
from ar_core.request import Output, Request, RequestError, SamplingParams, Tokens
from tests.ar_core.toy import (
    DIM,
    VOCAB,
    WIDTH,
    FrameEncoder,
    Frames,
    Picture,
    PictureEncoder,
    SumStage,
    ToyBackbone,
    ToyHead,
)


def toy_engine(output_stage: SumStage | None = None, **changes: object) -> Engine:
    options = {"device": "cpu", "kv_slots": 400, "max_running": 8, "max_step_tokens": 64, "overlap": False}
    backbone = ToyBackbone()
    return Engine(
        backbone,
        ToyHead(backbone),
        EngineConfig(**{**options, **changes}),  # type: ignore[arg-type]
        encoders={Frames: FrameEncoder(), Picture: PictureEncoder()},
        output_stage=output_stage,
    )


def prompts(n: int) -> list[Request]:
    """Requests that mix frames and pictures; every third begins like the one before."""
    rng = np.random.default_rng(5)
    requests, opening = [], []
    for i in range(n):
        if i % 3 != 1:
            opening = [Frames(rng.integers(0, VOCAB - 1, (int(rng.integers(1, 30)), WIDTH)))]
            if i % 2:
                rows = torch.from_numpy(rng.standard_normal((int(rng.integers(1, 20)), DIM)).astype(np.float32)) * 4
                opening.append(Picture(rows, digest=i))
        own = Frames(rng.integers(0, VOCAB - 1, (int(rng.integers(1, 6)), WIDTH)))
        params = SamplingParams(max_tokens=int(rng.integers(3, 25)), temperature=0.0 if i % 2 else 1.0, seed=i)
        requests.append(Request(str(i), [*opening, own], params))
    return requests


def rows(outputs: list[Output]) -> list[list[list[int]]]:
    return [output.rows for output in outputs]


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    """What each request emits in an engine of its own, unchunked."""
    return [toy_engine(max_step_tokens=256).generate([request])[0].rows for request in prompts(18)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"max_step_tokens": 8},
        {"max_step_tokens": 9, "overlap": True, "max_running": 3},
        {"kv_slots": 90},
        {"kv_slots": 90, "overlap": True},
    ],
    ids=str,
)
def test_batches_chunks_cache_and_preemption_change_nothing(
    options: dict[str, object], alone: list[list[list[int]]]
) -> None:
    engine = toy_engine(**options)
    assert rows(engine.generate(prompts(18))) == alone
    assert rows(engine.generate(prompts(18))) == alone, "with a warm cache"
    engine.scheduler.check()
    assert engine.stats().cached_tokens > 0
    assert all(len(row) == WIDTH for out in alone for row in out)


def test_frames_that_differ_in_one_residual_integer_share_nothing_from_there_on() -> None:
    engine = toy_engine()
    codes = np.ones((20, WIDTH), dtype=np.int64)
    params = SamplingParams(max_tokens=2)
    engine.generate([Request("a", [Frames(codes)], params)])
    assert engine.generate([Request("b", [Frames(codes)], params)])[0].cached_tokens == 19
    other = codes.copy()
    other[12, 3] = 2
    assert engine.generate([Request("c", [Frames(other)], params)])[0].cached_tokens == 12


def test_a_picture_is_cached_by_its_digest() -> None:
    engine = toy_engine()
    picture = torch.randn(10, DIM)
    params = SamplingParams(max_tokens=2, temperature=0)
    end = Frames(np.ones((1, WIDTH), dtype=np.int64))
    first = engine.generate([Request("a", [Picture(picture, 1), end], params)])[0]
    again = engine.generate([Request("b", [Picture(picture, 1), end], params)])[0]
    other = engine.generate([Request("c", [Picture(-picture, 2), end], params)])[0]
    assert (again.cached_tokens, other.cached_tokens) == (10, 0)
    assert first.rows == again.rows != other.rows


def test_the_output_stage_sees_each_row_once_and_in_batches() -> None:
    stage = SumStage()
    engine = toy_engine(output_stage=stage)
    outputs = engine.generate(prompts(12))
    assert [output.payload for output in outputs] == [sum(map(sum, output.rows)) for output in outputs]
    assert stage.largest_batch > 4
    assert not stage.sums


def test_keys_cover_all_integers_of_a_row() -> None:
    frames = np.zeros((WIDTH + 1, WIDTH), dtype=np.int64)
    frames[np.arange(WIDTH), np.arange(WIDTH)] = 1
    assert len(set(row_keys(frames).tolist())) == WIDTH + 1
    assert row_keys(np.array([[5], [6]])).tolist() == [5, 6]


def test_refuses_text_where_no_text_is_understood() -> None:
    with pytest.raises(RequestError, match="takes no Tokens; it takes Frames, Picture"):
        toy_engine().add(Request("a", [Tokens([1])]))
