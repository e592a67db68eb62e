"""Tiny dual-AR checkpoints of every kind, and a dual-AR model in the plainest torch there is, to compare with.

The plain model keeps no state: it computes everything again for every integer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

SEMANTIC_START, NUM_SEMANTIC, END = 20, 30, 7
VOCAB, CODEBOOKS, CODES = 60, 4, 24

_SLOW = {
    **{"vocab_size": VOCAB, "n_layer": 2, "n_head": 4, "n_local_heads": 2, "head_dim": 8, "dim": 24},
    **{"intermediate_size": 40, "rope_base": 1000, "norm_eps": 1e-6, "max_seq_len": 128},
    **{"tie_word_embeddings": True, "attention_qkv_bias": False, "attention_o_bias": False, "attention_qk_norm": True},
}
_FAST = {
    **{"n_layer": 2, "n_head": 2, "n_local_heads": -1, "head_dim": 12, "dim": 24, "intermediate_size": 32},
    **{"attention_qkv_bias": False, "attention_o_bias": False, "attention_qk_norm": False},
}


def make_nested(folder: Path, slow: dict[str, Any] | None = None, fast: dict[str, Any] | None = None) -> Path:
    """A checkpoint like S2's."""
    slow, fast = {**_SLOW, **(slow or {})}, {**_FAST, **(fast or {})}
    config = {
        "model_type": "fish_qwen3_omni",
        "semantic_start_token_id": SEMANTIC_START,
        "semantic_end_token_id": SEMANTIC_START + NUM_SEMANTIC - 1,
        "text_config": slow,
        "audio_decoder_config": {**fast, "vocab_size": CODES, "num_codebooks": CODEBOOKS, "text_dim": slow["dim"]},
    }
    specials = [{"id": END, "content": "<|im_end|>"}]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": specials}))
    prefix = "audio_decoder."
    tensors = _random_tensors(slow, fast, "text_model.model.", prefix, f"{prefix}codebook_embeddings")
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_flat(folder: Path, **changes: Any) -> Path:
    """A checkpoint like S1-mini's."""
    config = {
        **{"model_type": "dual_ar", "n_fast_layer": 2, "codebook_size": CODES, "num_codebooks": CODEBOOKS},
        **_SLOW,
        "tie_word_embeddings": False,
        **{f"fast_{key}": value for key, value in _FAST.items() if key != "n_layer"},
        **changes,
    }
    specials = {f"<|semantic:{i}|>": SEMANTIC_START + i for i in range(NUM_SEMANTIC)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "special_tokens.json").write_text(json.dumps({"<|im_end|>": END, **specials}))
    fast = {key.removeprefix("fast_"): value for key, value in config.items() if key.startswith("fast_")}
    tensors = _random_tensors(config, {**fast, "n_layer": 2}, "", "fast_", "codebook_embeddings")
    torch.save({"state_dict": tensors}, folder / "model.pth")
    return folder


def _random_tensors(slow: dict[str, Any], fast: dict[str, Any], s: str, f: str, codebooks: str) -> Tensors:
    generator = torch.Generator().manual_seed(11)
    tensors: Tensors = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * 1.5 / columns**0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.3

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = 1 + torch.randn(size, generator=generator) * 0.2

    def stack(prefix: str, c: dict[str, Any]) -> None:
        kv_heads = c["n_head"] if c["n_local_heads"] == -1 else c["n_local_heads"]
        for at in (f"{prefix}layers.{layer}" for layer in range(c["n_layer"])):
            rows = (c["n_head"] + 2 * kv_heads) * c["head_dim"]
            matrix(f"{at}.attention.wqkv", rows, c["dim"], c["attention_qkv_bias"])
            matrix(f"{at}.attention.wo", c["dim"], c["n_head"] * c["head_dim"], c["attention_o_bias"])
            if c["attention_qk_norm"]:
                norm(f"{at}.attention.q_norm", c["head_dim"])
                norm(f"{at}.attention.k_norm", c["head_dim"])
            norm(f"{at}.attention_norm", c["dim"])
            norm(f"{at}.ffn_norm", c["dim"])
            matrix(f"{at}.feed_forward.w1", c["intermediate_size"], c["dim"])
            matrix(f"{at}.feed_forward.w3", c["intermediate_size"], c["dim"])
            matrix(f"{at}.feed_forward.w2", c["dim"], c["intermediate_size"])
        norm(f"{prefix}norm", c["dim"])

    stack(s, slow)
    matrix(f"{s}embeddings", VOCAB, slow["dim"])
    matrix(codebooks, CODEBOOKS * CODES, slow["dim"])
    if not slow["tie_word_embeddings"]:
        matrix(f"{s}output", VOCAB, slow["dim"])
    stack(f, fast)
    matrix(f"{f}embeddings", CODES, fast["dim"])
    matrix(f"{f}output", CODES, fast["dim"])
    if fast["dim"] != slow["dim"]:
        matrix(f"{f}project_in", fast["dim"], slow["dim"], True)
    return tensors


class PlainDualAR:
    """Reads a checkpoint folder; computes in float32."""

    def __init__(self, folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        self.nested = raw["model_type"] == "fish_qwen3_omni"
        if self.nested:
            self.slow = raw["text_config"]
            self.fast = {key: self.slow[key] for key in ("rope_base", "norm_eps")} | raw["audio_decoder_config"]
            self.codes, self.codebooks = self.fast["vocab_size"], self.fast["num_codebooks"]
            tensors = load_file(folder / "model.safetensors")
            self.s, self.f, self.table = "text_model.model.", "audio_decoder.", "audio_decoder.codebook_embeddings"
            self.normed = True
            self.start = raw["semantic_start_token_id"]
            self.num_semantic = raw["semantic_end_token_id"] - self.start + 1
            added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
            self.end = next(token["id"] for token in added if token["content"] == "<|im_end|>")
        else:
            self.slow = raw
            own = {key.removeprefix("fast_"): value for key, value in raw.items() if key.startswith("fast_")}
            self.fast = {**raw, **own, "n_layer": raw["n_fast_layer"]}
            self.codes, self.codebooks = raw["codebook_size"], raw["num_codebooks"]
            tensors = torch.load(folder / "model.pth", weights_only=True)["state_dict"]
            self.s, self.f, self.table = "", "fast_", "codebook_embeddings"
            self.normed = raw["norm_fastlayer_input"]
            self.start, self.num_semantic, self.end = SEMANTIC_START, NUM_SEMANTIC, END
        self.t = {name: tensor.float() for name, tensor in tensors.items()}

    def frames(self, prompt: torch.Tensor, n: int, pick: Callable[[torch.Tensor, list[int]], int]) -> list[list[int]]:
        """n rows that follow the rows int64 [T, K + 1].

        pick: from logits float32 [vocab] and the row so far to the next integer (of the id: its column among the
        semantic tokens and the end).
        """
        rows = prompt
        emitted: list[list[int]] = []
        while len(emitted) < n and (not emitted or emitted[-1][0] != self.end):
            state = self._stack(self._embed(rows), self.s, self.slow)
            normed = self._norm(state, f"{self.s}norm", self.slow)[-1]
            head = self.t[
                f"{self.s}embeddings.weight" if self.slow["tie_word_embeddings"] else f"{self.s}output.weight"
            ]
            ids = [*range(self.start, self.start + self.num_semantic), self.end]
            column = pick((head @ normed)[ids], [])
            first = min(column, self.codes - 1) if ids[column] != self.end else 0
            row = [ids[column], first]
            begin = normed if self.normed else state[-1]
            while len(row) <= self.codebooks:
                row.append(pick(self._fast_logits(begin, row[1:]), row))
            emitted.append(row)
            rows = torch.cat((rows, torch.tensor([row])))
        return emitted

    def _fast_logits(self, begin: torch.Tensor, codes: list[int]) -> torch.Tensor:
        if f"{self.f}project_in.weight" in self.t:
            begin = self.t[f"{self.f}project_in.weight"] @ begin + self.t[f"{self.f}project_in.bias"]
        x = torch.cat((begin[None], self.t[f"{self.f}embeddings.weight"][codes]))
        x = self._norm(self._stack(x, self.f, self.fast), f"{self.f}norm", self.fast)
        return self.t[f"{self.f}output.weight"] @ x[-1]

    def _embed(self, rows: torch.Tensor) -> torch.Tensor:
        out = []
        for row in rows.tolist():
            x = self.t[f"{self.s}embeddings.weight"][row[0]]
            if self.start <= row[0] < self.start + self.num_semantic:
                for k, code in enumerate(row[1:]):
                    x = x + self.t[f"{self.table}.weight"][k * self.codes + code]
                if self.nested:
                    x = x / (self.codebooks + 1) ** 0.5
            out.append(x)
        return torch.stack(out)

    def _norm(self, x: torch.Tensor, name: str, c: dict[str, Any]) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c["norm_eps"]).sqrt() * self.t[f"{name}.weight"]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.t[f"{name}.weight"].T
        return y + self.t[f"{name}.bias"] if f"{name}.bias" in self.t else y

    def _stack(self, x: torch.Tensor, prefix: str, c: dict[str, Any]) -> torch.Tensor:
        for at in (f"{prefix}layers.{layer}" for layer in range(c["n_layer"])):
            x = x + self._attention(self._norm(x, f"{at}.attention_norm", c), f"{at}.attention", c)
            y = self._norm(x, f"{at}.ffn_norm", c)
            gate = self._linear(y, f"{at}.feed_forward.w1")
            x = x + self._linear(
                gate * gate.sigmoid() * self._linear(y, f"{at}.feed_forward.w3"), f"{at}.feed_forward.w2"
            )
        return x

    def _attention(self, x: torch.Tensor, at: str, c: dict[str, Any]) -> torch.Tensor:
        heads, dim = c["n_head"], c["head_dim"]
        kv_heads = heads if c["n_local_heads"] == -1 else c["n_local_heads"]
        q, k, v = self._linear(x, f"{at}.wqkv").split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        outs = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            qh, kh, vh = (part[:, i * dim : (i + 1) * dim] for part, i in ((q, head), (k, kv), (v, kv)))
            if c["attention_qk_norm"]:
                qh, kh = self._norm(qh, f"{at}.q_norm", c), self._norm(kh, f"{at}.k_norm", c)
            scores = _rotate(qh, c["rope_base"]) @ _rotate(kh, c["rope_base"]).T / dim**0.5
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            outs.append(scores.softmax(-1) @ vh)
        return self._linear(torch.cat(outs, -1), f"{at}.wo")


def _rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    out = torch.empty_like(x)
    for i in range(0, x.shape[1], 2):
        angle = torch.arange(len(x)) * base ** (-i / x.shape[1])
        cos, sin = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
        out[:, i] = x[:, i] * cos - x[:, i + 1] * sin
        out[:, i + 1] = x[:, i + 1] * cos + x[:, i] * sin
    return out
