# SPDX-License-Identifier: Apache-2.0
"""Inode numbers of the mounter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import LimitExceeded
from soci_mounter import numbers


@given(st.integers(1, numbers.MAX_SLOT), st.integers(0, numbers.MAX_NODE))
def test_a_number_gives_back_its_slot_and_node(slot: int, node: int) -> None:
    """Slot and node can be read off an inode number, which is never that of the FUSE root."""
    ino = numbers.inode(slot, node)
    assert numbers.split(ino) == (slot, node)
    assert ino != numbers.ROOT
    assert ino < 1 << 63


def test_the_root_belongs_to_no_layer() -> None:
    """Slot 0 is never handed out, so that the FUSE root cannot be a layer's file."""
    assert numbers.split(numbers.ROOT)[0] == 0
    assert numbers.Slots().take() == 1


def test_slots_are_never_handed_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots ascend, and when they run out the mounter refuses instead of starting again."""
    monkeypatch.setattr(numbers, "MAX_SLOT", 3)
    slots = numbers.Slots()
    assert [slots.take() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(LimitExceeded):
        slots.take()


def test_numbers_in_little_memory() -> None:
    """Four bytes each where all fit, else eight; the values stay."""
    for values, size in (([], 4), ([0, 2**32 - 1], 4), ([1, 2**32], 8), ([-1, 1], 8)):
        made = numbers.compact(values)
        assert (list(made), made.itemsize) == (values, size)
