# SPDX-License-Identifier: Apache-2.0
"""Memory for a range: filled from its front, given away once, without a copy."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from soci_registry.room import Room


@pytest.mark.parametrize("pieces", [[], [b"a"], [b"ab", b"", b"cde"], [b"x" * 100_000, b"y"]])
def test_what_is_put_in_comes_out(pieces: list[bytes]) -> None:
    """The content is the pieces in their order, however they were put in."""
    whole = b"".join(pieces)
    one, two = Room(len(whole)), Room(len(whole))
    for piece in pieces:
        one.put(piece)
        place = two.rest()
        place[: len(piece)] = piece
        two.count += len(piece)
        place.release()
    assert one.content() == two.content() == whole
    assert one.missing == 0


def test_more_than_there_is_room_for() -> None:
    """Bytes beyond the end are an error of the caller, and change nothing."""
    room = Room(3)
    room.put(b"ab")
    with pytest.raises(ValueError):
        room.put(b"cd")
    assert room.missing == 1
    with pytest.raises(RuntimeError):
        room.content()


def test_memory_is_taken_once_and_late() -> None:
    """A room that waits for its turn takes nothing; a full one gives its memory away and takes no more for that."""
    size = 32 << 20
    tracemalloc.start()
    try:
        room = Room(size)
        assert tracemalloc.get_traced_memory()[1] < size // 100
        room.rest().release()
        room.count = size
        content = room.content()
        assert len(content) == size
        assert tracemalloc.get_traced_memory()[1] < size * 1.1
    finally:
        tracemalloc.stop()


def test_a_room_that_was_left_ends_quietly() -> None:
    """A room whose range failed is gone without a word, also where a traceback and the room hold each other."""

    def fails() -> None:
        with Room(1000) as room:
            room.put(b"x")
            held = [room]
            held.append(held)  # type: ignore[arg-type]
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            fails()
        gc.collect()
