"""Who computes what in the next step: continuous batching with chunked prefill, on accounted memory."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from ar_core.kv_pool import KVPool
from ar_core.radix import Node, RadixTree
from ar_core.request import FinishReason, QueueFull
from ar_core.sequence import Sequence, State
from ar_core.stats import EngineStats

# Positions that each running sequence is expected to grow by before others end. Counting all that it may emit
# would leave most of the pool idle; counting none would preempt often.
_EXPECTED_GROWTH = 64
# Waiting requests looked at past one that waits for a prefix.
_LOOK_PAST = 64


@dataclass(slots=True)
class Work:
    """`count` new positions of a sequence, from position `start` on."""

    seq: Sequence
    start: int
    count: int
    emits: bool  # its last position is the sequence's last, so the head emits a row


class Scheduler:
    """Owns the waiting and the running sequences, and moves slots between pool, sequences and tree.

    A chunk of a prompt enters the tree when it is scheduled, not when it is computed: attention stores a step's
    KV before it reads any, and steps run in order, so whoever matches it later, even in the same step, reads
    what is there by then. That is how requests share a prefix that is being computed right now.
    """

    def __init__(
        self, pool: KVPool, tree: RadixTree, *, max_running: int, max_queue: int, max_step_tokens: int
    ) -> None:
        self.pool = pool
        self.tree = tree
        self.max_queue = max_queue
        self.max_running = max_running
        self.max_step_tokens = max(max_step_tokens, max_running)  # a decode step must fit
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self.stats = EngineStats(kv_slots=pool.num_slots)
        self._lanes = list(range(max_running, 0, -1))  # lane 0 is padding's

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises QueueFull."""
        if len(self.waiting) >= self.max_queue:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already, and no more than {self.max_queue} may")
        self.stats.requests += 1
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence in whatever state it is, and leave what it computed to the tree."""
        if seq.state is State.RUNNING:
            self._stop(seq)
        else:
            self.waiting.remove(seq)
        seq.state = State.FINISHED
        seq.finish = reason
        if reason is FinishReason.ABORT:
            self.stats.aborted += 1
        else:
            self.stats.finished += 1

    def schedule(self, may_preempt: bool) -> list[Work]:
        """The next step.

        Without `may_preempt` (rows are in flight, so not every sequence could be resumed from what is known) a
        lack of slots gives an empty step: handle the rows in flight and ask again.
        """
        decoding = self._room_to_decode(may_preempt)
        if decoding is None:
            return []
        work = self._plan_decode(decoding)
        budget = self.max_step_tokens - len(work)
        for seq in self.running:
            if seq.known > seq.computed:
                budget -= self._plan_chunk(seq, budget, work)
        self._admit(budget, work)
        if not work and may_preempt and len(self.running) > 1:
            self._preempt(self.running[-1])
            return self.schedule(may_preempt)
        self.stats.steps += bool(work)
        self.stats.computed_tokens += sum(item.count for item in work)
        return work

    def snapshot(self) -> EngineStats:
        """The statistics with this moment's figures filled in."""
        stats = self.stats
        stats.running, stats.waiting = len(self.running), len(self.waiting)
        stats.kv_slots_used = self.pool.num_slots - self.pool.num_free
        stats.kv_slots_cached = self.tree.evictable_size
        stats.evicted_tokens = self.tree.evicted
        return stats

    def check(self) -> None:
        """Raise AssertionError unless every slot has exactly one owner and every lock a sequence."""
        self.tree.check()
        owners = np.zeros(self.pool.num_slots + 1, dtype=np.int64)
        owners[self.pool.free_mask] += 1
        locks: dict[int, int] = {}
        for held in self.tree.nodes():
            np.add.at(owners, held.slots, 1)
            locks[id(held)] = 0
        for seq in self.running:
            np.add.at(owners, seq.slots[seq.tree_len : seq.computed], 1)
            node: Node | None = seq.node
            while node is not None and node.parent is not None:
                locks[id(node)] += 1
                node = node.parent
        assert self.pool.num_free == int(self.pool.free_mask.sum())
        assert (owners[1:] == 1).all(), (
            f"slots without or with several owners: {np.flatnonzero(owners[1:] != 1)[:8] + 1}"
        )
        assert all(node.locks == locks[id(node)] for node in self.tree.nodes()), "a lock without a sequence"
        lanes = [seq.lane for seq in self.running] + self._lanes
        assert sorted(lanes) == list(range(1, self.max_running + 1)), "a lane was lost or given twice"

    # Decode

    def _room_to_decode(self, may_preempt: bool) -> list[Sequence] | None:
        """The sequences that compute their last row's position, with slots free for all; None if only a
        preemption could free those.
        """
        decoding = [seq for seq in self.running if seq.length - seq.computed == 1 and seq.wants_step]
        while not self._make_room(len(decoding)):
            if not may_preempt:
                return None
            self._preempt(self.running[-1])
            decoding = [seq for seq in decoding if seq.state is State.RUNNING]
        return decoding

    def _plan_decode(self, decoding: list[Sequence]) -> list[Work]:
        if not decoding:
            return []
        last = np.array([seq.slots[seq.computed - 1] for seq in decoding], dtype=np.int32)
        slots = self.pool.extend(last)[:, None]
        work = []
        for seq, slot in zip(decoding, slots, strict=True):
            work.append(Work(seq, seq.computed, 1, emits=True))
            seq.take_slots(slot)
            seq.in_flight += 1
        return work

    # Prefill

    def _admit(self, budget: int, work: list[Work]) -> None:
        coming = sum(self._coming(seq) for seq in self.running)
        for seq in self.waiting[: len(self._lanes) + _LOOK_PAST]:
            if budget <= 0 or not self._lanes:
                return
            match = self.tree.match(seq.keys[: seq.known - 1], seq.request.cache_salt)
            if self._prefix_is_coming(seq, len(match.slots)):
                continue
            self.tree.lock(match.node)
            needed = seq.known - len(match.slots) + _EXPECTED_GROWTH
            if self.running and needed + coming > self.pool.num_free + self.tree.evictable_size:
                self.tree.unlock(match.node)
                return
            seq.share_slots(match.slots, match.node)
            self._start(seq)
            budget -= self._plan_chunk(seq, budget, work)
            coming += self._coming(seq)

    @staticmethod
    def _coming(seq: Sequence) -> int:
        """Slots that a running sequence is about to need."""
        return max(0, seq.known - seq.computed) + min(seq.limit - seq.length, _EXPECTED_GROWTH)

    def _prefix_is_coming(self, seq: Sequence, matched: int) -> bool:
        """Whether a running sequence is about to compute more of this one's prompt than the tree has:

        waiting for it computes it once.
        """
        return any(
            other.computed <= matched < min(other.known, seq.known - 1)
            and other.keys[matched] == seq.keys[matched]
            and other.request.cache_salt == seq.request.cache_salt
            and np.array_equal(other.keys[:matched], seq.keys[:matched])
            for other in self.running
        )

    def _start(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=lambda s: s.order)
        seq.state = State.RUNNING
        seq.lane = self._lanes.pop()
        if seq.cached is None:
            seq.cached = seq.tree_len
            self.stats.prompt_tokens += seq.prompt_len
            self.stats.cached_tokens += seq.cached

    def _plan_chunk(self, seq: Sequence, budget: int, work: list[Work]) -> int:
        """Schedule as many of a prompt's missing positions as budget and memory allow; returns how many."""
        count = min(budget, seq.known - seq.computed)
        if not self._make_room(count):
            count = self.pool.num_free
        if count <= 0:
            return 0
        start = seq.computed
        after = int(seq.slots[start - 1]) if start else 0
        seq.take_slots(self.pool.alloc(count, after, room=seq.limit - start - count))
        emits = seq.computed == seq.known
        work.append(Work(seq, start, count, emits))
        self._give_to_tree(seq)
        seq.in_flight += emits
        return count

    # Slots

    def _make_room(self, n: int) -> bool:
        """Evict until n slots are free; False if that cannot be."""
        if self.pool.num_free < n:
            self.pool.free(self.tree.evict(n - self.pool.num_free))
        return self.pool.num_free >= n

    def _give_to_tree(self, seq: Sequence) -> None:
        """Hand the sequence's computed positions to the tree and read them there, under a lock."""
        n = min(seq.computed, seq.known)
        inserted = self.tree.insert(seq.keys[:n], seq.slots[:n], seq.request.cache_salt)
        self.tree.lock(inserted.node)
        self.tree.unlock(seq.node)
        # What the tree had before this sequence computed it again is read there too, and the copy freed: a step
        # in flight may still use the copy, but whoever gets those slots writes to them only in a later step.
        self.pool.free(seq.slots[seq.tree_len : inserted.present])
        seq.share_slots(inserted.slots, inserted.node)

    def _stop(self, seq: Sequence) -> None:
        """Take a sequence out of the running ones; its KV stays in the tree until evicted."""
        self._give_to_tree(seq)
        self.pool.free(seq.slots[seq.tree_len : seq.computed])
        self.tree.unlock(seq.node)
        self.running.remove(seq)
        self._lanes.append(seq.lane)
        seq.lane = 0
        seq.leave()

    def _preempt(self, seq: Sequence) -> None:
        """Send a running sequence back to the queue. All its rows are known, so it later resumes where it was."""
        self._stop(seq)
        seq.state = State.WAITING
        bisect.insort(self.waiting, seq, key=lambda s: s.order)
        self.stats.preempted += 1
