"""Families in transformers' own code, served by our attention, against transformers' eager forward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ar_core.attention.base import AttentionSpec
from ar_core.batch import Batch
from ar_core.interfaces import KVShape
from ar_core.kv_pool import KVPool
from ar_core.models.transformers import (
    TransformersBackbone,
    UnsupportedModel,
    load_transformers_backbone,
    supported_model_types,
)
from ar_core.models.transformers_seam import SERVING
from tests.ar_core.tiny_checkpoints import MAX_CONTEXT, VOCAB_SIZE, WINDOW, make_checkpoint, tiny_config

CPU = torch.device("cpu")
WINDOWED = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gemma4_unified_text", "mixtral", "phi3", "starcoder2")
FAMILIES = (
    *WINDOWED,
    *("cohere", "deepseek_v3", "ernie4_5", "falcon", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "granite", "helium"),
    *("nemotron", "olmo", "olmo2", "olmoe", "opt", "phi", "qwen3_moe", "smollm3", "stablelm"),
)


class NaiveAttention:
    """Attention as its definition says, one sequence after another."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def plan(self, batch: Batch) -> None:
        self._batch = batch

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        batch = self._batch
        self._pool.k[layer][batch.slots] = k
        self._pool.v[layer][batch.slots] = v
        queries, places = q.split(batch.query_lens), batch.positions.split(batch.query_lens)
        lanes = zip(queries, places, batch.lanes.tolist(), batch.context_lens)
        return torch.cat(
            [self._sequence(q, at, batch.slot_table[lane, :n].long(), layer, spec) for q, at, lane, n in lanes]
        )

    def _sequence(
        self, q: torch.Tensor, at: torch.Tensor, slots: torch.Tensor, layer: int, spec: AttentionSpec
    ) -> torch.Tensor:
        k, v = self._pool.k[layer][slots], self._pool.v[layer][slots]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        ages = at[:, None] - torch.arange(len(slots))
        hidden = (ages < 0) | (ages >= (spec.window or MAX_CONTEXT))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)


class Sequences:
    """Runs a backbone over sequences whose slots lie anywhere in the pool."""

    def __init__(self, backbone: TransformersBackbone, lanes: int = 3, context: int = 64) -> None:
        self._backbone = backbone
        self._pool = KVPool(backbone.kv_layout, lanes * context, backbone.dtype, CPU)
        self._attention = NaiveAttention(self._pool)
        shuffled = torch.randperm(lanes * context, generator=torch.Generator().manual_seed(1)) + 1
        self._slots = shuffled.view(lanes, context).int()
        self._lengths = [0] * lanes

    @torch.inference_mode()
    def step(self, work: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """New tokens of some sequences, by lane -> their logits [n, vocab]."""
        lens = [len(tokens) for tokens in work.values()]
        starts = [self._lengths[lane] for lane in work]
        for lane, n in zip(work, lens):
            self._lengths[lane] += n
        batch = Batch(
            inputs=torch.tensor([token for tokens in work.values() for token in tokens])[:, None],
            positions=torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lens)]),
            slots=torch.cat(
                [self._slots[lane, start : start + n] for lane, start, n in zip(work, starts, lens)]
            ).long(),
            query_start=torch.tensor([0, *lens]).cumsum(0).int(),
            context_len=torch.tensor([self._lengths[lane] for lane in work]).int(),
            slot_table=self._slots,
            lanes=torch.tensor(list(work)),
            select=torch.arange(sum(lens)),
            query_lens=lens,
            context_lens=[self._lengths[lane] for lane in work],
            first_slots=[-1] * len(work),
        )
        self._attention.plan(batch)
        hidden = self._backbone.forward(self._backbone.embed(batch.inputs), batch, self._attention)
        return dict(zip(work, self._backbone.logits(hidden).split(lens)))


@dataclass(frozen=True)
class Family:
    name: str
    folder: Path
    backbone: TransformersBackbone
    reference: PreTrainedModel

    @torch.inference_mode()
    def expected(self, tokens: list[int]) -> torch.Tensor:
        return self.reference(torch.tensor([tokens]), use_cache=False).logits[0]


def load(folder: Path, **options: Any) -> TransformersBackbone:
    return load_transformers_backbone(folder, device=CPU, **options)


def eager(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def random_tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    yield Family(request.param, folder, load(folder), eager(folder))


def test_whole_prefill(family: Family) -> None:
    tokens = random_tokens(40, seed=1)
    expected = family.expected(tokens)
    assert expected.std() > 0.05
    torch.testing.assert_close(Sequences(family.backbone).step({0: tokens})[0], expected, atol=1e-3, rtol=0)


def test_chunks_ragged_batches_and_decode_steps(family: Family) -> None:
    long, short, late = random_tokens(40, seed=1), random_tokens(15, seed=2), random_tokens(21, seed=3)
    sequences = Sequences(family.backbone)
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for work in (
        {0: long[:17]},
        {1: short[:9], 0: long[17:33]},
        {0: long[33:34], 1: short[9:10]},
        {1: short[10:11], 2: late[:20], 0: long[34:35]},
        *({0: long[35 + i : 36 + i], 1: short[11 + i : 12 + i]} for i in range(4)),
        {2: late[20:], 0: long[39:]},
    ):
        for lane, logits in sequences.step(work).items():
            got[lane].append(logits)
    for lane, tokens in enumerate((long, short, late)):
        torch.testing.assert_close(torch.cat(got[lane]), family.expected(tokens), atol=1e-3, rtol=0)


def test_greedy_tokens(family: Family) -> None:
    prompts = {0: random_tokens(13, seed=4), 1: random_tokens(6, seed=5)}
    expected = {lane: list(tokens) for lane, tokens in prompts.items()}
    got = {lane: list(tokens) for lane, tokens in prompts.items()}
    for _ in range(8):
        for tokens in expected.values():
            tokens.append(int(family.expected(tokens)[-1].argmax()))
    sequences, work = Sequences(family.backbone), prompts
    for _ in range(8):
        logits = sequences.step(work)
        work = {lane: [int(rows[-1].argmax())] for lane, rows in logits.items()}
        for lane, tokens in work.items():
            got[lane] += tokens
    assert got == expected


def test_a_family_is_listed_as_supported(family: Family) -> None:
    assert family.name in supported_model_types()


@pytest.mark.parametrize("model_type", WINDOWED)
def test_windows_are_found(model_type: str, tmp_path: Path) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    seen: list[AttentionSpec] = []

    class Spy(NaiveAttention):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, spec: AttentionSpec
        ) -> torch.Tensor:
            seen.append(spec)
            return super().attend(q, k, v, layer, spec)

    sequences = Sequences(load(tmp_path, load_format="dummy", dtype="float32"))
    sequences._attention = Spy(sequences._pool)
    sequences.step({0: [3, 4]})
    layer_types = getattr(tiny_config(model_type), "layer_types", None) or ["sliding_attention"] * 3
    assert [spec.window for spec in seen] == [WINDOW if kind == "sliding_attention" else None for kind in layer_types]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("phi3", {"sliding_window": None}),
    ],
)
def test_variants_within_a_family(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, model_type, **changes)
    tokens = random_tokens(20, seed=1)
    sequences = Sequences(load(folder))
    got = torch.cat([sequences.step({0: tokens[:11]})[0], sequences.step({0: tokens[11:]})[0]])
    with torch.inference_mode():
        expected = eager(folder)(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_kv_layout_is_what_each_layer_stores(tmp_path: Path) -> None:
    tiny_config("deepseek_v3").save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").kv_layout == (KVShape(4, 32, 8),) * 3
    tiny_config("gemma4_unified_text").save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").kv_layout == (KVShape(2, 16, 16), KVShape(2, 16, 16), KVShape(2, 32, 32))
    tiny_config("falcon").save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").kv_layout == (KVShape(2, 16, 16),) * 3


def test_two_models_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    tokens = random_tokens(12, seed=6)
    folders = [make_checkpoint(tmp_path / str(seed), "gemma2", seed=seed) for seed in (1, 2)]
    backbones = [load(folder) for folder in folders]
    alone = [Sequences(backbone).step({0: tokens})[0] for backbone in backbones]

    def run(which: int) -> torch.Tensor:
        sequences = Sequences(backbones[which])
        return torch.cat([sequences.step({0: [token]})[0] for token in tokens])

    with ThreadPoolExecutor(2) as threads:
        for which, got in enumerate(threads.map(run, (0, 1))):
            torch.testing.assert_close(got, alone[which], atol=1e-4, rtol=0)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_rotations_do_not_follow_the_longest_sequence(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "sliding_window": None}
    folder = make_checkpoint(tmp_path, "phi3", rope_parameters=rope, **lengths)
    reference, long, short = eager(folder), random_tokens(40, seed=1), random_tokens(10, seed=2)
    with torch.inference_mode():
        expected_long = reference(torch.tensor([long]), use_cache=False).logits[0]
        expected_short = reference(torch.tensor([short]), use_cache=False).logits[0]
    sequences = Sequences(load(folder))
    alone = sequences.step({0: short})[0]
    torch.testing.assert_close(sequences.step({1: long})[1], expected_long, atol=1e-3, rtol=0)
    torch.testing.assert_close(sequences.step({2: short})[2], alone, atol=1e-4, rtol=0)
    within = Sequences(load(folder, max_context=16)).step({0: short})[0]
    torch.testing.assert_close(within, expected_short, atol=1e-3, rtol=0)
    assert not torch.allclose(within, alone, atol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "attention interface"),
        ("mpt", "attention interface"),
        ("mamba", "linear_attention"),
        ("rwkv", "recurrent state"),
        ("qwen3_next", "linear_attention"),
        ("llama4_text", "chunked_attention"),
        ("lfm2", "convolutions"),
        ("t5", "no causal language model"),
        ("bart", "encoder"),
        ("bert", "both directions"),
        ("gemma3", "several models"),
        ("gemma3n_text", "token ids"),
        ("gpt_oss", "sinks"),
        ("diffllama", "twice"),
    ],
)
def test_other_architectures_are_refused(model_type: str, reason: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        load(tmp_path)
    assert repr(model_type) in str(refusal.value)
    assert "Supported are: " in str(refusal.value) and "gemma2" in str(refusal.value)
    assert model_type not in supported_model_types()


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "quux"}')
    with pytest.raises(UnsupportedModel, match=r"'quux'.*does not know"):
        load(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    config = tiny_config("olmo2").to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="quantised"):
        load(tmp_path)


def test_biases_on_attention_are_refused(tmp_path: Path) -> None:
    tiny_config("falcon", alibi=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="takes alibi"):
        load(tmp_path, load_format="dummy")


def _llama() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation=SERVING, dtype=torch.float32)


def test_a_path_between_positions_beside_attention_is_refused() -> None:
    model = _llama()
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, out: out + out.roll(1, dims=1))
    with pytest.raises(UnsupportedModel, match="other positions in ways other than attention"):
        TransformersBackbone(model, 64, ())


def test_positions_counted_by_row_are_refused() -> None:
    model = _llama()
    rows = torch.arange(3)[None]
    model.model.rotary_emb.register_forward_pre_hook(
        lambda _module, inputs, named: (inputs[:1], named | {"position_ids": rows}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModel, match="other positions in ways other than attention"):
        TransformersBackbone(model, 64, ())


def test_a_layer_that_attends_twice_is_refused() -> None:
    model = _llama()
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModel, match="layer 0 attends more than once"):
        TransformersBackbone(model, 64, ())


def test_a_head_that_reads_more_than_hidden_states_is_refused() -> None:
    model = _llama()
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, out: out * (2 if hasattr(model.model, "layers") else 1)
    )
    with pytest.raises(UnsupportedModel, match="last hidden states alone"):
        TransformersBackbone(model, 64, ())


def test_context_is_at_most_what_the_model_was_made_for(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").max_context == MAX_CONTEXT
    assert load(tmp_path, load_format="dummy", max_context=100).max_context == 100
    assert load(tmp_path, load_format="dummy", max_context=1000).max_context == MAX_CONTEXT
    # The shortest there is: what looks at a loaded model must not look beyond it.
    assert load(tmp_path, load_format="dummy", max_context=1).max_context == 1


def test_number_formats(tmp_path: Path) -> None:
    tiny_config("olmo2", dtype="bfloat16").save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").dtype == torch.bfloat16
    backbone = load(tmp_path, load_format="dummy", dtype="float16")
    assert backbone.dtype == torch.float16
    assert backbone.logits(torch.zeros(2, 64, dtype=torch.float16)).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be"):
        load(tmp_path, load_format="dummy", dtype="int8")


def test_end_tokens_are_those_of_generation(tmp_path: Path) -> None:
    tiny_config("olmo2").save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(tmp_path, load_format="dummy").eos_token_ids == (2, 7)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = make_checkpoint(tmp_path, "olmo2") / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    load(tmp_path)
    assert "model.extra" in caplog.text
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["model.norm.weight"] = torch.zeros(63)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight is missing; model\.norm\.weight is \[63\], not \[64\]"):
        load(tmp_path)
    assert lost.shape == (96, 64)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
