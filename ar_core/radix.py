"""The radix tree: which keys have their KV in which slots.

A node holds a run of keys and one slot per key; a path from a root spells a prefix. Each cache salt has a root
of its own, so requests with different salts share nothing.

Who owns a slot (see also `sequence.py`):

    free list ──alloc──▶ running sequence ──insert──▶ tree ──evict──▶ free list
                              │                         ▲
                              └── lock: "I read these" ─┘

`insert` hands slots over to the tree; the sequence goes on reading them under a lock. A locked node, and all
above it, cannot be evicted.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_EMPTY_KEYS = np.empty(0, dtype=np.int64)
_EMPTY_SLOTS = np.empty(0, dtype=np.int32)


class Node:
    __slots__ = ("children", "keys", "last_used", "locks", "offered", "parent", "salt", "slots")

    def __init__(self, keys: np.ndarray, slots: np.ndarray, parent: Node | None, salt: str) -> None:
        self.keys = keys  # int64 [n]
        self.slots = slots  # int32 [n]
        self.parent = parent
        self.children: dict[int, Node] = {}  # by first key
        self.salt = salt
        self.locks = 0  # sequences that read this node or one below it
        self.last_used = 0
        self.offered = False  # has an entry in the heap of leaves

    @property
    def evictable(self) -> bool:
        return self.parent is not None and self.locks == 0 and not self.children


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix that the tree holds: its slots, int32 [n], and the node that it ends in (None if n is 0)."""

    slots: np.ndarray
    node: Node | None


@dataclass(frozen=True, slots=True)
class Insertion:
    """`slots` [n] are the tree's for all the inserted keys; the first `present` of them it held before."""

    node: Node | None
    slots: np.ndarray
    present: int


class RadixTree:
    def __init__(self) -> None:
        self.size = 0  # slots held
        self.evictable_size = 0  # of these, not locked
        self.evicted = 0  # slots evicted so far
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._tick = itertools.count()  # breaks ties in the heap
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (last use, tick, node), one entry a node at most

    def match(self, keys: np.ndarray, salt: str = "") -> Match:
        """The longest prefix of `keys` (int64 [n]) in the tree.

        A node that matches in part is split, so that the prefix ends with a node.
        """
        path, _ = self._walk(keys, salt)
        if not path:
            return Match(_EMPTY_SLOTS, None)
        return Match(np.concatenate([node.slots for node in path]), path[-1])

    def insert(self, keys: np.ndarray, slots: np.ndarray, salt: str = "") -> Insertion:
        """Put keys (int64 [n]) and slots (int32 [n]) into the tree, which from now on owns the slots that it keeps.

        For the first `present` keys the tree has slots already: it goes on with those, and the given ones stay
        the caller's.
        """
        if len(keys) == 0:
            return Insertion(None, _EMPTY_SLOTS, 0)
        path, present = self._walk(keys, salt)
        if present < len(keys):
            parent = path[-1] if path else self._roots.setdefault(salt, Node(_EMPTY_KEYS, _EMPTY_SLOTS, None, salt))
            leaf = Node(keys[present:].copy(), slots[present:].copy(), parent, salt)
            parent.children[int(leaf.keys[0])] = leaf
            self.size += len(leaf.slots)
            self.evictable_size += len(leaf.slots)
            path.append(leaf)
            self._touch(leaf)
        return Insertion(path[-1], np.concatenate([node.slots for node in path]), present)

    def lock(self, node: Node | None) -> None:
        """Keep `node` and all above it from being evicted."""
        while node is not None:
            if node.locks == 0:
                self.evictable_size -= len(node.slots)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Undo one `lock`."""
        while node is not None:
            node.locks -= 1
            if node.locks == 0:
                self.evictable_size += len(node.slots)
                self._offer(node)
            node = node.parent

    def evict(self, n: int) -> np.ndarray:
        """Give up n slots, or all that are not locked if these are fewer: int32.

        They are the tails of the leaves used longest ago.
        """
        freed: list[np.ndarray] = []
        missing = n
        while missing > 0 and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            node.offered = False
            if not node.evictable:
                continue
            if last_used != node.last_used:  # used since it was offered
                self._offer(node)
                continue
            freed.append(self._cut_tail(node, missing))
            missing -= len(freed[-1])
        slots = np.concatenate(freed) if freed else _EMPTY_SLOTS
        self.evicted += len(slots)
        return slots

    def clear(self) -> np.ndarray:
        """Evict everything that is not locked."""
        return self.evict(self.size)

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before their children."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Walk the whole tree and raise AssertionError where it is inconsistent."""
        size = evictable = 0
        held: list[np.ndarray] = []
        for node in self.nodes():
            assert node.parent is not None and node.parent.children[int(node.keys[0])] is node
            assert len(node.keys) == len(node.slots) > 0
            assert node.locks >= sum(child.locks for child in node.children.values())
            size += len(node.slots)
            evictable += len(node.slots) if node.locks == 0 else 0
            held.append(node.slots)
        assert size == self.size and evictable == self.evictable_size
        assert all(root.children for root in self._roots.values()), "an empty namespace was kept"
        offered = [id(node) for _, _, node in self._leaves]
        assert len(set(offered)) == len(offered) <= sum(1 for _ in self.nodes())
        assert all(id(node) in offered for node in self.nodes() if node.evictable), "a leaf cannot be evicted"
        if held:
            slots = np.concatenate(held)
            assert len(np.unique(slots)) == len(slots), "two nodes hold one slot"

    def _walk(self, keys: np.ndarray, salt: str) -> tuple[list[Node], int]:
        """The nodes that spell the longest held prefix of `keys`, and its length."""
        node = self._roots.get(salt)
        path: list[Node] = []
        at = 0
        while node is not None and at < len(keys):
            child = node.children.get(int(keys[at]))
            if child is None:
                break
            common = _common_prefix(child.keys, keys[at:])
            if common < len(child.keys):
                child = self._split(child, common)
            path.append(child)
            at += common
            node = child
        now = next(self._clock)
        for used in path:
            used.last_used = now
        return path, at

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node with the first `at` keys above `node`; handles on `node` go on meaning the whole prefix."""
        assert node.parent is not None
        upper = Node(node.keys[:at], node.slots[:at], node.parent, node.salt)
        upper.locks, upper.last_used = node.locks, node.last_used
        upper.parent.children[int(upper.keys[0])] = upper  # type: ignore[union-attr]
        node.keys, node.slots, node.parent = node.keys[at:], node.slots[at:], upper
        upper.children[int(node.keys[0])] = node
        return upper

    def _cut_tail(self, node: Node, most: int) -> np.ndarray:
        """Take up to `most` slots off the end of a leaf; a leaf left empty is removed."""
        keep = max(0, len(node.slots) - most)
        cut = node.slots[keep:]
        node_first = int(node.keys[0])
        node.keys, node.slots = node.keys[:keep], node.slots[:keep]
        self.size -= len(cut)
        self.evictable_size -= len(cut)
        if keep:
            self._offer(node)
        else:
            parent = node.parent
            assert parent is not None
            del parent.children[node_first]
            self._offer(parent)
            if parent.parent is None and not parent.children:
                del self._roots[parent.salt]
        return cut

    def _touch(self, node: Node) -> None:
        node.last_used = next(self._clock)
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Note that a node may be evicted, if it may. An entry that is out of date is put right when it is popped."""
        if node.evictable and not node.offered:
            node.offered = True
            heapq.heappush(self._leaves, (node.last_used, next(self._tick), node))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n
