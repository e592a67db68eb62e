"""What an engine says about itself. Counters only grow; the others are of this moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    running: int = 0
    waiting: int = 0
    kv_slots: int = 0
    kv_slots_used: int = 0  # by running sequences and by the tree
    kv_slots_cached: int = 0  # those of the tree that could be evicted
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt positions found in the cache
    computed_tokens: int = 0  # positions that went through the backbone
    generated_tokens: int = 0
    evicted_tokens: int = 0
    stage_batches: int = 0  # calls of the output stage that found work, and the streams in them
    stage_items: int = 0
