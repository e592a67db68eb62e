"""The radix tree against the obvious model of it: a set of (salt, prefix) -> slot."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ar_core.radix import Match, RadixTree


def keys(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def slots(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_matches_the_longest_prefix() -> None:
    tree = RadixTree()
    tree.insert(keys(1, 2, 3, 4), slots(11, 12, 13, 14))
    assert tree.match(keys(1, 2, 3, 4, 5)).slots.tolist() == [11, 12, 13, 14]
    assert tree.match(keys(1, 2, 9)).slots.tolist() == [11, 12]
    assert tree.match(keys(9)).slots.tolist() == []
    tree.check()


def test_insertion_keeps_the_slots_it_has() -> None:
    tree = RadixTree()
    tree.insert(keys(1, 2, 3), slots(11, 12, 13))
    inserted = tree.insert(keys(1, 2, 7, 8), slots(21, 22, 23, 24))
    assert inserted.present == 2
    assert inserted.slots.tolist() == [11, 12, 23, 24]
    assert tree.size == 5
    tree.check()


def test_salts_share_nothing() -> None:
    tree = RadixTree()
    tree.insert(keys(1, 2), slots(11, 12), salt="a")
    assert tree.match(keys(1, 2), salt="b").node is None
    assert tree.match(keys(1, 2)).node is None


def test_a_locked_prefix_survives_eviction_and_splitting() -> None:
    tree = RadixTree()
    node = tree.insert(keys(1, 2, 3, 4), slots(1, 2, 3, 4)).node
    tree.lock(node)
    tree.insert(keys(1, 2, 8), slots(5, 6, 7))
    assert sorted(tree.evict(100).tolist()) == [7]
    assert tree.match(keys(1, 2, 3, 4)).slots.tolist() == [1, 2, 3, 4]
    tree.unlock(node)
    assert len(tree.clear()) == 4
    assert tree.size == tree.evictable_size == 0
    tree.check()


def test_evicts_what_was_used_longest_ago_from_its_tail() -> None:
    tree = RadixTree()
    tree.insert(keys(1, 2, 3), slots(1, 2, 3))
    tree.insert(keys(5, 6, 7), slots(5, 6, 7))
    tree.match(keys(1, 2, 3))
    assert tree.evict(2).tolist() == [6, 7]
    assert tree.match(keys(5, 6, 7)).slots.tolist() == [5]
    tree.check()


_PREFIXES = st.lists(st.integers(0, 2), min_size=1, max_size=8)
_SALTS = st.sampled_from(["", "tenant"])


class TreeMachine(RuleBasedStateMachine):
    """Random inserts, matches, locks and evictions, checked against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree()
        self.held: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locked: list[tuple[str, list[int], Match]] = []
        self.next_slot = 1

    @rule(prefix=_PREFIXES, salt=_SALTS)
    def insert(self, prefix: list[int], salt: str) -> None:
        fresh = np.arange(self.next_slot, self.next_slot + len(prefix), dtype=np.int32)
        self.next_slot += len(prefix)
        present = len(self._expected(prefix, salt))
        inserted = self.tree.insert(keys(*prefix), fresh, salt)
        assert inserted.present == present
        for n in range(present, len(prefix)):
            self.held[salt, tuple(prefix[: n + 1])] = int(fresh[n])
        assert inserted.slots.tolist() == self._expected(prefix, salt)

    @rule(prefix=_PREFIXES, salt=_SALTS)
    def match(self, prefix: list[int], salt: str) -> None:
        assert self.tree.match(keys(*prefix), salt).slots.tolist() == self._expected(prefix, salt)

    @rule(prefix=_PREFIXES, salt=_SALTS)
    def lock(self, prefix: list[int], salt: str) -> None:
        match = self.tree.match(keys(*prefix), salt)
        self.tree.lock(match.node)
        self.locked.append((salt, prefix, match))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.locked) - 1))
        self.tree.unlock(self.locked.pop(at)[2].node)

    @rule(n=st.integers(1, 10))
    def evict(self, n: int) -> None:
        could = self.tree.evictable_size
        freed = set(self.tree.evict(n).tolist())
        assert len(freed) == min(n, could)
        self.held = {prefix: slot for prefix, slot in self.held.items() if slot not in freed}

    @invariant()
    def consistent(self) -> None:
        self.tree.check()
        assert self.tree.size == len(self.held)
        for salt, prefix, match in self.locked:
            assert self._expected(prefix, salt)[: len(match.slots)] == match.slots.tolist()

    def _expected(self, prefix: list[int], salt: str) -> list[int]:
        found = []
        for n in range(len(prefix)):
            slot = self.held.get((salt, tuple(prefix[: n + 1])))
            if slot is None:
                break
            found.append(slot)
        return found


TestTreeMachine = pytest.mark.filterwarnings("ignore")(TreeMachine.TestCase)
TestTreeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
