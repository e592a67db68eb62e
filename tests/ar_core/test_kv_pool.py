import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ar_core.interfaces import KVShape
from ar_core.kv_pool import KVPool


def pool_of(num_slots: int) -> KVPool:
    return KVPool((KVShape(1, 2, 3),), num_slots, torch.float32, "cpu")


def test_shapes_and_padding_slot() -> None:
    pool = pool_of(10)
    assert pool.k[0].shape == (11, 1, 2)
    assert pool.v[0].shape == (11, 1, 3)
    assert sorted(pool.alloc(10).tolist()) == list(range(1, 11)), "slot 0 is padding's"


def test_follows_a_sequence_with_consecutive_slots() -> None:
    pool = pool_of(400)
    first = pool.alloc(10, room=20)
    other = pool.alloc(5, room=20)
    assert other[0] > first[-1] + 10, "the first sequence was left no room"
    assert pool.alloc(4, after=int(first[-1])).tolist() == list(range(int(first[-1]) + 1, int(first[-1]) + 5))


def test_sequences_with_one_last_slot_get_different_next_ones() -> None:
    """As those have that share a prompt to its end."""
    pool = pool_of(40)
    last = int(pool.alloc(5, room=20)[-1])
    slots = pool.extend(np.array([last, last, last], dtype=np.int32)).tolist()
    assert last + 1 in slots and len(set(slots)) == 3
    assert pool.num_free == 32 == int(pool.free_mask.sum())


def test_says_how_much_is_free_when_it_is_too_little() -> None:
    pool = pool_of(4)
    pool.alloc(3)
    with pytest.raises(MemoryError, match="2 KV slots wanted, 1 of 4"):
        pool.alloc(2)
    with pytest.raises(MemoryError, match="2 KV slots wanted, 1 of 4"):
        pool.extend(np.array([1, 2], dtype=np.int32))


def test_refuses_a_double_free() -> None:
    pool = pool_of(4)
    slots = pool.alloc(2)
    pool.free(slots)
    with pytest.raises(ValueError, match="free already"):
        pool.free(slots)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["alloc", "extend", "free"]), st.integers(1, 9)), max_size=40),
    st.integers(10, 60),
)
def test_no_slot_is_handed_out_twice_or_lost(actions: list[tuple[str, int]], size: int) -> None:
    pool = pool_of(size)
    owned: list[list[int]] = []
    for action, n in actions:
        if action == "alloc" and n <= pool.num_free:
            owned.append(pool.alloc(n, room=n).tolist())
        elif action == "extend" and owned and len(owned) <= pool.num_free:
            last = np.array([slots[-1] for slots in owned], dtype=np.int32)
            for slots, new in zip(owned, pool.extend(last).tolist(), strict=True):
                slots.append(new)
        elif action == "free" and owned:
            pool.free(np.array(owned.pop(n % len(owned)), dtype=np.int32))
        handed = [slot for slots in owned for slot in slots]
        assert len(set(handed)) == len(handed)
        assert all(1 <= slot <= size for slot in handed)
        assert pool.num_free == size - len(handed)
