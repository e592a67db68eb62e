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

    def __post_init__(self) -> None:
        """Raises ValueError for a number that no engine could work with."""
        for name, least in (
            ("max_running", 1),
            ("max_queue", 1),
            ("max_step_tokens", 1),
            ("max_context", 2),  # a token, and one in answer
            ("kv_slots", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"memory_fraction is {self.memory_fraction}; it must be above 0 and at most 1")
