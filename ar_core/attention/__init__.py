"""Attention backends, behind the interface of `base.py`."""

from __future__ import annotations

from ar_core.attention.base import AttentionBackend
from ar_core.attention.torch_sdpa import TorchAttention
from ar_core.kv_pool import KVPool

BACKENDS = ("auto", "torch", "triton")


def make_backend(name: str, pool: KVPool) -> AttentionBackend:
    """The attention backend called `name`; "auto" is triton on a GPU, else torch.

    Raises ValueError for a name that is not one of BACKENDS.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if name == "auto":
        name = "triton" if pool.k[0].device.type == "cuda" else "torch"
    if name == "torch":
        return TorchAttention(pool)
    from ar_core.attention.triton import TritonAttention

    return TritonAttention(pool)
