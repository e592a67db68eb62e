"""How an engine is set up. None means: chosen from the device and the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    load_format: str = "auto"  # auto, dummy: random weights, config only
    attention: str = "auto"  # auto, torch, triton
    memory_fraction: float = 0.85  # of the device's memory, for weights and KV together
    max_running: int = 64  # sequences in one step
    max_queue: int = 1024  # requests that may wait
    max_step_tokens: int | None = None  # new positions in one step: the chunk of chunked prefill
    max_context: int | None = None  # positions of one sequence; at most what the model was made for
    kv_slots: int | None = None  # positions that the KV pool holds
    overlap: bool | None = None  # prepare step n + 1 while the device runs step n
