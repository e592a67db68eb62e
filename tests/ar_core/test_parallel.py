"""Tensor parallelism: two processes that share a model must compute what one computes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ar_core.models import load_backbone
from ar_core.models.llama import Llama
from ar_core.parallel import Parallel
from ar_core.weights import DummyWeights, SafetensorsWeights
from tests.ar_core.against_transformers import CPU, prefill_logits
from tests.ar_core.gguf_files import gguf_config, random_tensors, write_gguf
from tests.ar_core.tiny_checkpoints import make_checkpoint, tiny_config

RANKS = 2
TOKENS = list(range(3, 40))
MODELS = (
    "llama",
    "llama with biases",
    "tied",
    "qwen2 with a window",
    "qwen3",
    "dummy",
    "gguf",
)


def make_models(folder: Path) -> None:
    make_checkpoint(folder / "llama", "llama")
    make_checkpoint(folder / "llama with biases", "llama", attention_bias=True, mlp_bias=True)
    make_checkpoint(folder / "tied", "llama", tie_word_embeddings=True, num_attention_heads=2)
    make_checkpoint(folder / "qwen2 with a window", "qwen2", use_sliding_window=True, max_window_layers=1)
    make_checkpoint(folder / "qwen3", "qwen3")
    tiny_config("qwen3", num_key_value_heads=4).save_pretrained(folder / "dummy")
    config = gguf_config("llama")
    write_gguf(folder / "gguf.gguf", config, random_tensors(config, "Q4_0"))


def load(folder: Path, name: str, parallel: Parallel) -> Llama:
    source = folder / name if name != "gguf" else folder / "gguf.gguf"
    load_format = "dummy" if name == "dummy" else "auto"
    model = load_backbone(source, device=CPU, dtype="float32", load_format=load_format, parallel=parallel)
    assert isinstance(model, Llama)
    return model


def run_rank(rank: int, folder: Path) -> None:
    """What one of the processes does: every model's logits, into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    parallel = Parallel(rank, RANKS, dist.group.WORLD)
    results = {}
    for name in MODELS:
        model = load(folder, name, parallel)
        results[name] = (prefill_logits(model, TOKENS), model.kv_layout[0].num_heads)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the models and, by rank, what two processes made of them."""
    folder = tmp_path_factory.mktemp("parallel")
    make_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(run_rank, (folder,), nprocs=RANKS)  # type: ignore[attr-defined]
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_the_logits_of_one_process_alone(folder: Path, name: str) -> None:
    alone = load(folder, name, Parallel())
    right = prefill_logits(alone, TOKENS)
    for rank in range(RANKS):
        logits, kv_heads = torch.load(folder / f"rank{rank}.pt")[name]
        torch.testing.assert_close(logits, right, atol=1e-4, rtol=0)
        assert kv_heads * RANKS == alone.kv_layout[0].num_heads, "each rank stores its share of the KV heads"
    assert right.std() > 0.005, "what is near nothing would agree with anything"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}, "the number of KV heads is 1"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, "the number of KV heads is 3"),
        ({"intermediate_size": 97}, r"a dimension of \[97, 64\]"),
        ({"vocab_size": 127}, r"a dimension of \[127, 64\]"),
    ],
)
def test_what_ranks_cannot_share_evenly_is_refused_with_its_number(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_config("llama", **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*, which 2 tensor-parallel ranks cannot share evenly"):
        load_backbone(tmp_path, device=CPU, dtype="float32", load_format="dummy", parallel=Parallel(0, 2))


def test_heads_must_divide_among_the_ranks(tmp_path: Path) -> None:
    tiny_config("llama", num_attention_heads=4, num_key_value_heads=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="heads is 4, which 3 tensor-parallel ranks cannot share evenly"):
        load_backbone(tmp_path, device=CPU, dtype="float32", load_format="dummy", parallel=Parallel(0, 3))
    assert Parallel(2, 4).share(12, "the number of heads") == 3


def test_shares_side_by_side_are_the_whole(tmp_path: Path) -> None:
    """Of layers that are read as one product, each rank has its share of each."""
    folder = make_checkpoint(tmp_path, "llama", attention_bias=True)
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def outputs(parallel: Parallel) -> torch.Tensor:
        weights = SafetensorsWeights(folder, CPU, torch.float32, parallel)
        return weights.column_linear(names, [64, 32, 32], 64, True)(x)

    q, k, v = outputs(Parallel()).split([64, 32, 32], dim=1)
    for rank in range(RANKS):
        got = outputs(Parallel(rank, RANKS)).split([32, 16, 16], dim=1)
        for part, whole in zip(got, (q, k, v), strict=True):
            torch.testing.assert_close(part, whole.chunk(RANKS, dim=1)[rank])


def test_dummy_weights_are_shares_of_the_same_ones_on_every_rank() -> None:
    whole = DummyWeights(CPU, torch.float32, Parallel()).tensor("a.weight", (8, 6))
    shares = [DummyWeights(CPU, torch.float32, Parallel(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([w.parallel.slice(w.tensor("a.weight", (8, 6)), 0) for w in shares]), whole)


def test_one_process_needs_no_group() -> None:
    alone, x = Parallel(), torch.randn(3, 4)
    assert alone.sum(x) is x and alone.gather(x) is x and alone.slice(x, 0) is x
