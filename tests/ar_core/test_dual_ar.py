"""Dual-AR models against a released checkpoint's reference (tests/data/s2-tiny) and a plain model written for this."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ar_core.attention.base import AttentionSpec
from ar_core.config import EngineConfig
from ar_core.engine import Engine
from ar_core.models import LoadedModel, load_model
from ar_core.models.dual_ar import FastTransformer, SlowTransformer
from ar_core.models.dual_ar_config import DualARConfig
from ar_core.parallel import Parallel
from ar_core.request import Frames, Output, Request, RequestError, SamplingParams, Tokens
from ar_core.sampling import row_uniforms
from ar_core.weights import SafetensorsWeights, WeightError
from tests.ar_core.plain_dual_ar import CODES, END, NUM_SEMANTIC, SEMANTIC_START, PlainDualAR, make_flat, make_nested

TINY = Path(__file__).parents[1] / "data" / "s2-tiny"
CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=24, temperature=0)
# As speech is asked for.
LIVELY = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "temperature_last": True, "avoid_repeats": 10}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are not worth sharing out, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(TINY, device=CPU, dtype="float32")


def engine_of(model: LoadedModel, **changes: Any) -> Engine:
    options = {"device": "cpu", "kv_slots": 2000, "max_running": 16, "overlap": False, **changes}
    return Engine(model.backbone, model.head, EngineConfig(**options), encoders=model.encoders)


def segments(rows: torch.Tensor | np.ndarray, semantic: range) -> list[Tokens | Frames]:
    """Rows [n, K + 1] as segments."""
    rows = np.asarray(rows, dtype=np.int64)
    is_frame = (rows[:, 0] >= semantic.start) & (rows[:, 0] < semantic.stop)
    parts = np.split(rows, np.flatnonzero(np.diff(is_frame)) + 1)
    return [Frames(part) if part[0, 0] in semantic else Tokens(part[:, 0].tolist()) for part in parts]


@pytest.fixture(scope="module")
def prompts(golden: dict[str, torch.Tensor], model: LoadedModel) -> dict[str, list[Tokens | Frames]]:
    semantic = range(272, 528)
    return {"ref": segments(golden["prompt"].T, semantic), "noref": segments(golden["prompt_noref"].T, semantic)}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests start without regard to what the running ones will need, so that a small pool preempts some of them."""
    monkeypatch.setattr("ar_core.scheduler._EXPECTED_GROWTH", 2)


class Dense:
    """Attention over a whole sequence that is computed at once."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale).transpose(
            0, 1
        )


@pytest.mark.parametrize("voice", ["ref", "noref"])
def test_logits_are_those_of_the_reference(golden: dict[str, torch.Tensor], voice: str) -> None:
    config = DualARConfig.read(TINY)
    weights = SafetensorsWeights(TINY, CPU, torch.float32, Parallel())
    slow, fast = SlowTransformer(config, weights), FastTransformer(config, weights)
    weights.finish()
    prompt = golden["prompt" if voice == "ref" else "prompt_noref"].T.long()
    frames = golden[f"frames_{voice}"][:6].long()
    rows = torch.cat((prompt, frames))
    batch: Any = SimpleNamespace(positions=torch.arange(len(rows)))
    hidden = slow.forward(slow.embed(rows), batch, Dense())[len(prompt) - 1 : -1]  # type: ignore[arg-type]
    right = golden[f"slow_logits_{voice}"]
    torch.testing.assert_close(slow.logits(hidden), right, atol=1e-3, rtol=0)
    allowed = [*config.semantic, config.end_id]
    torch.testing.assert_close(slow.frame_logits(hidden), right[:, allowed], atol=1e-3, rtol=0)
    logits, cache = fast.start(hidden, frames[:, 1])
    found = [logits] + [fast.step(frames[:, k], cache) for k in range(2, 10)]
    torch.testing.assert_close(torch.stack(found, 1), golden[f"fast_logits_{voice}"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 16},
        {"max_step_tokens": 37, "overlap": True},
        {"overlap": True},
        {"max_running": 2},
        {"kv_slots": 330},
        {"kv_slots": 330, "overlap": True, "max_step_tokens": 50},
    ],
    ids=str,
)
@pytest.mark.usefixtures("hasty")
def test_greedy_frames_are_those_of_the_reference(
    golden: dict[str, torch.Tensor], model: LoadedModel, prompts: dict[str, list[Any]], options: dict[str, Any]
) -> None:
    """In a batch with others, some of them sampled; with the cache cold and warm; whatever the chunks."""
    engine = engine_of(model, **options)
    for state in ("cold", "warm"):
        requests = [
            Request(f"{i}", prompts[voice], GREEDY if i % 3 else SamplingParams(max_tokens=30, seed=i, **LIVELY))
            for i, voice in enumerate(["ref", "noref", "ref", "ref", "noref", "noref"])
        ]
        outputs = engine.generate(requests)
        for i, voice in ((1, "noref"), (2, "ref"), (4, "noref"), (5, "noref")):
            assert outputs[i].rows == golden[f"frames_{voice}"].tolist(), f"{voice}, {state}"
        engine.scheduler.check()
    assert engine.stats().cached_tokens > 500
    assert (engine.stats().preempted > 0) == ("kv_slots" in options)


# Sampling


@pytest.mark.usefixtures("hasty")
def test_seeded_frames_do_not_depend_on_what_else_runs(model: LoadedModel, prompts: dict[str, list[Any]]) -> None:
    def requests() -> list[Request]:
        return [
            Request(
                f"{i}",
                prompts["ref" if i % 2 else "noref"],
                SamplingParams(
                    max_tokens=30, seed=i, **{**LIVELY, "temperature": 0.5 + i / 8, "top_k": (0, 30, 5)[i % 3]}
                ),
            )
            for i in range(6)
        ]

    alone = [engine_of(model).generate([request])[0].rows for request in requests()]
    assert len({tuple(map(tuple, rows)) for rows in alone}) == 6
    for options in ({}, {"kv_slots": 330}, {"kv_slots": 330, "overlap": True, "max_step_tokens": 48}):
        engine = engine_of(model, **options)
        assert [output.rows for output in engine.generate(requests())] == alone
        assert (engine.stats().preempted > 0) == ("kv_slots" in options)


def limited(probs: torch.Tensor, top_k: int, top_p: float, temperature: float) -> torch.Tensor:
    """By the letter: top-k and top-p of the untempered distribution, then temperature."""
    order = probs.argsort(descending=True, stable=True)
    before = probs[order].cumsum(0) - probs[order]
    keep = torch.zeros_like(probs, dtype=torch.bool)
    keep[order[:top_k][before[:top_k] < top_p]] = True
    weights = torch.where(keep, probs.double() ** (1 / temperature), 0.0)
    return weights / weights.sum()


class PlainSampler:
    """Draws integer after integer as documented, one sequence at a time."""

    def __init__(self, seed: int, width: int, num_semantic: int, temperature: float, avoid_repeats: int) -> None:
        self.seed, self.width, self.num_semantic = seed, width, num_semantic
        self.temperature, self.avoid_repeats = temperature, avoid_repeats
        self.columns: list[int] = []
        self.replaced = 0

    def __call__(self, logits: torch.Tensor, row: list[int]) -> int:
        probs = logits.softmax(0)
        if row:
            numbers = row_uniforms([self.seed], [len(self.columns) - 1], self.width)[0]
            return self._draw(limited(probs, 30, 0.9, self.temperature), float(numbers[len(row)]))
        numbers = row_uniforms([self.seed], [len(self.columns)], self.width)[0]
        column = self._draw(limited(probs, 30, 0.9, self.temperature), float(numbers[0]))
        if column < self.num_semantic and column in self.columns[-self.avoid_repeats :]:
            column = self._draw(limited(probs, 30, 0.9, 1.0), float(numbers[1]))
            self.replaced += 1
        self.columns.append(column)
        return column

    @staticmethod
    def _draw(probs: torch.Tensor, number: float) -> int:
        return int((probs.cumsum(0) > number).nonzero()[0])


@pytest.mark.usefixtures("hasty")
def test_sampled_frames_follow_the_documented_rule(model: LoadedModel, prompts: dict[str, list[Any]]) -> None:
    """Also where a draw repeats one of the last ten and is made again."""
    plain = PlainDualAR(TINY)
    params = SamplingParams(max_tokens=25, seed=3, **LIVELY)
    sampler = PlainSampler(3, 11, 256, params.temperature, params.avoid_repeats)
    prompt = torch.from_numpy(
        np.concatenate([model.encoders[type(part)].encode(part).inputs for part in prompts["noref"]])
    )
    right = plain.frames(prompt, 25, sampler)
    assert sampler.replaced >= 3
    # With fewer slots than three need, some are preempted on the way.
    others = [Request(f"{i}", prompts["ref"], SamplingParams(max_tokens=40, seed=i, **LIVELY)) for i in range(2)]
    for options in ({}, {"kv_slots": 290, "overlap": True}):
        engine = engine_of(model, **options)
        assert engine.generate([*others, Request("it", prompts["noref"], params)])[2].rows == right
        assert (engine.stats().preempted > 0) == ("kv_slots" in options)
    without = engine_of(model).generate(
        [Request("it", prompts["noref"], SamplingParams(max_tokens=25, seed=3, **{**LIVELY, "avoid_repeats": 0}))]
    )
    assert without[0].rows != right


# What requests may ask for besides


def test_banned_and_biased_ids_are_ids_of_the_vocabulary(model: LoadedModel, prompts: dict[str, list[Any]]) -> None:
    end = model.backbone.eos_token_ids[0]
    bias = {end: 1000.0, 5: 1000.0}  # 5 is text and cannot be spoken
    engine = engine_of(model)
    requests = [
        Request("a", prompts["noref"], SamplingParams(max_tokens=9, temperature=0, logit_bias=bias)),
        Request("b", prompts["noref"], SamplingParams(max_tokens=9, temperature=0, logit_bias={300: 1000.0})),
        Request("c", prompts["noref"], SamplingParams(max_tokens=9, temperature=0, logit_bias=bias, min_tokens=4)),
    ]
    ended, biased, late = engine.generate(requests)
    assert (ended.tokens, ended.finish) == ([end], "stop")
    assert biased.tokens == [300] * 9 and [row[1] for row in biased.rows] == [300 - 272] * 9
    assert len(late.rows) == 5 and late.tokens[-1] == end and end not in late.tokens[:-1]


def test_penalties_count_emitted_ids(model: LoadedModel, prompts: dict[str, list[Any]]) -> None:
    engine = engine_of(model)
    plain = engine.generate([Request("a", prompts["noref"], GREEDY)])[0]
    params = SamplingParams(
        max_tokens=24, temperature=0, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=9.0
    )
    penalised = engine.generate([Request("b", prompts["noref"], params)])[0]
    assert len(set(plain.tokens)) < 24 and len(set(penalised.tokens)) == 24


def test_frames_of_the_prompt_are_not_penalised(golden: dict[str, torch.Tensor], model: LoadedModel) -> None:
    frames = golden["frames_noref"]
    n = next(n for n in range(24) if frames[n, 0] in frames[:n, 0])
    prompt = segments(torch.cat((golden["prompt_noref"].T, frames[:n])), range(272, 528))
    params = SamplingParams(max_tokens=1, temperature=0, repetition_penalty=10.0)
    assert engine_of(model).generate([Request("a", prompt, params)])[0].rows == [frames[n].tolist()]


def test_logprobs_are_of_the_id_among_those_allowed(
    golden: dict[str, torch.Tensor], model: LoadedModel, prompts: dict[str, list[Any]]
) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=2)
    output = engine_of(model).generate([Request("a", prompts["noref"], params)])[0]
    allowed = [*range(272, 528), model.backbone.eos_token_ids[0]]
    right = golden["slow_logits_noref"][:, allowed].log_softmax(-1).topk(2)
    assert output.logprobs is not None
    for at, found in enumerate(output.logprobs):
        assert found.token == output.tokens[at]
        assert [token for token, _ in found.top] == [allowed[i] for i in right.indices[at].tolist()]
        assert [value for _, value in found.top] == pytest.approx(right.values[at].tolist(), abs=1e-3)


# Cache keys


def test_references_that_differ_in_one_residual_code_share_nothing_from_there_on(
    golden: dict[str, torch.Tensor], model: LoadedModel
) -> None:
    rows = golden["prompt"].T.long()
    first = int((rows[:, 0] >= 272).nonzero()[0])
    engine = engine_of(model)
    params = SamplingParams(max_tokens=2, temperature=0)

    def cached(changed: torch.Tensor, id: str) -> Output:
        return engine.generate([Request(id, segments(changed, range(272, 528)), params)])[0]

    cached(rows, "a")
    assert cached(rows, "b").cached_tokens == len(rows) - 1
    other = rows.clone()
    other[first + 5, 10] = (other[first + 5, 10] + 1) % 256
    assert (other[:, :10] == rows[:, :10]).all()
    assert cached(other, "c").cached_tokens == first + 5


def test_emitted_frames_are_cached_for_the_conversation_that_goes_on_from_them(
    golden: dict[str, torch.Tensor], model: LoadedModel, prompts: dict[str, list[Any]]
) -> None:
    engine = engine_of(model)
    rows = engine.generate([Request("a", prompts["noref"], GREEDY)])[0].rows
    longer = [*prompts["noref"], Frames(np.array(rows)), Tokens([259, 198])]
    assert engine.generate([Request("b", longer, GREEDY)])[0].cached_tokens == 85 + 23  # the last was not computed


def test_a_text_token_and_a_frame_never_have_the_same_key(model: LoadedModel) -> None:
    tokens = model.encoders[Tokens].encode(Tokens(list(range(576))))
    rng = np.random.default_rng(0)
    rows = np.concatenate((rng.integers(272, 528, (2000, 1)), rng.integers(0, 256, (2000, 10))), axis=1)
    frames = model.encoders[Frames].encode(Frames(rows))
    assert (tokens.keys >= 0).all() and (frames.keys < 0).all()
    assert tokens.inputs.shape == (576, 11) and not tokens.inputs[:, 1:].any()
    assert len(set(frames.keys.tolist())) == 2000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, 10)), r"frames have the shape \[3, 10\]; it must be \[n, 11\]"),
        (np.array([[271] + [0] * 10]), "the first integer of a frame is 271; it goes from 272 to 527"),
        (np.array([[272] + [0] * 9 + [256]]), "a code of a frame is 256; it goes from 0 to 255"),
    ],
)
def test_frames_out_of_range_are_refused(model: LoadedModel, rows: np.ndarray, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine_of(model).add(Request("a", [Tokens([1]), Frames(rows)]))


# The family's other members


_VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nested": (make_nested, {}),
    "narrow fast transformer": (make_nested, {"fast": {"dim": 16, "head_dim": 8}}),
    "biases": (
        make_nested,
        {
            "slow": {"attention_qkv_bias": True, "attention_o_bias": True},
            "fast": {"attention_qkv_bias": True, "attention_o_bias": True, "attention_qk_norm": True},
        },
    ),
    "untied head, all heads": (make_nested, {"slow": {"tie_word_embeddings": False, "n_local_heads": -1}}),
    "another base": (make_nested, {"fast": {"rope_base": 50, "norm_eps": 1e-2, "n_local_heads": 1}}),
    "flat, before the norm": (make_flat, {"norm_fastlayer_input": False}),
    "flat, after the norm": (make_flat, {"norm_fastlayer_input": True, "fast_dim": 32}),
    "flat, tied": (make_flat, {"norm_fastlayer_input": True, "tie_word_embeddings": True, "fast_n_local_heads": 1}),
}


@pytest.mark.parametrize("variant", _VARIANTS)
def test_every_kind_of_checkpoint_speaks_like_the_plain_model(tmp_path: Path, variant: str) -> None:
    make, options = _VARIANTS[variant]
    make(tmp_path, **options)
    rng = np.random.default_rng(1)
    # Codes that fill their tables to the last entry, ids beyond the codebook's size, and text between frames.
    frames = np.concatenate(
        (rng.integers(SEMANTIC_START, SEMANTIC_START + NUM_SEMANTIC, (12, 1)), rng.integers(0, CODES, (12, 4))), axis=1
    )
    text = np.zeros((6, 5), dtype=np.int64)
    text[:, 0] = rng.integers(8, 20, 6)
    prompt = np.concatenate((text[:3], frames, text[3:]))
    right = PlainDualAR(tmp_path).frames(torch.from_numpy(prompt), 12, lambda logits, row: int(logits.argmax()))
    engine = engine_of(load_model(tmp_path, device=CPU, dtype="float32"), max_step_tokens=10, kv_slots=200)
    semantic = range(SEMANTIC_START, SEMANTIC_START + NUM_SEMANTIC)
    requests = [
        Request("a", segments(prompt, semantic), SamplingParams(max_tokens=12, temperature=0)),
        Request("b", segments(prompt[2:], semantic), SamplingParams(max_tokens=5, seed=1)),
    ]
    assert engine.generate(requests)[0].rows == right


def test_bfloat16_stays_close(golden: dict[str, torch.Tensor]) -> None:
    config = DualARConfig.read(TINY)
    weights = SafetensorsWeights(TINY, CPU, torch.bfloat16, Parallel())
    slow = SlowTransformer(config, weights)
    rows = torch.cat((golden["prompt"].T, golden["frames_ref"][:6])).long()
    batch: Any = SimpleNamespace(positions=torch.arange(len(rows)))
    hidden = slow.forward(slow.embed(rows), batch, Dense())[-7:-1]  # type: ignore[arg-type]
    assert hidden.dtype == torch.bfloat16
    assert (slow.logits(hidden) - golden["slow_logits_ref"]).abs().mean() < 0.1
    model = load_model(TINY, device=CPU, dtype="bfloat16")
    output = engine_of(model).generate([Request("a", segments(golden["prompt"].T, config.semantic), GREEDY)])[0]
    assert len(output.rows) == 24


# Loading


def test_random_weights_need_no_weights_on_disk(tmp_path: Path) -> None:
    make_nested(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = load_model(tmp_path, device=CPU, load_format="dummy")
    output = engine_of(model).generate([Request("a", [Tokens([1, 2])], SamplingParams(max_tokens=5))])[0]
    assert len(output.rows) == 5 or output.tokens[-1] == END


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    make_nested(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "model.safetensors").unlink()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load_model(tmp_path, device=CPU).head.width == 5


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_nested(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["audio_decoder.norm.weight"]
    tensors["text_model.model.norm.weight"] = torch.ones(5)
    tensors["audio_decoder.project_in.weight"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError) as caught:
        load_model(tmp_path, device=CPU)
    for part in (
        "audio_decoder.norm.weight is missing",
        "text_model.model.norm.weight is [5], not [24]",
        "audio_decoder.project_in.weight is not part of this model",
    ):
        assert part in str(caught.value)


class Unwelcome:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code in a pickle ran",))


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_flat(tmp_path, norm_fastlayer_input=True)
    torch.save({"embeddings.weight": Unwelcome()}, tmp_path / "model.pth")
    with pytest.raises(WeightError, match="is not a plain file of tensors"):
        load_model(tmp_path, device=CPU)
    assert not capsys.readouterr().out


def test_configurations_that_lack_something_say_what(tmp_path: Path) -> None:
    make_nested(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"neither the tokenizer \(<\|im_end\|>\) nor config.json \(eos_token_id\)"):
        load_model(tmp_path, device=CPU)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": END}))
    assert load_model(tmp_path, device=CPU).backbone.eos_token_ids == (END,)
    del raw["text_config"]["n_layer"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": END}))
    with pytest.raises(ValueError, match="has no 'n_layer', which this model needs"):
        load_model(tmp_path, device=CPU)
