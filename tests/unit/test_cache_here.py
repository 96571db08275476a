# SPDX-License-Identifier: Apache-2.0
"""What the presence map alone tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci_cache import LayerStore
from soci_cache.presence import AHEAD, FILLED, HEADER, NEEDED, boot_id, new_map
from soci_cache.store import Here

LAYER, ZTOC = sha256_digest(b"layer"), sha256_digest(b"ztoc")


@pytest.mark.parametrize(
    ("marks", "present", "runs"),
    [("0000", 0, 0), ("1111", 4, 1), ("1011", 3, 2), ("0110", 2, 1), ("1010101", 4, 4), ("", 0, 0)],
)
def test_counts(tmp_path: Path, marks: str, present: int, runs: int) -> None:
    """Spans in all, spans here, and in how many runs of neighbours."""
    store = LayerStore(tmp_path)
    place = store.directory(LAYER, ZTOC)
    place.mkdir(parents=True)
    content = bytearray(new_map(len(marks), boot_id()))
    content[HEADER:] = bytes(int(mark) for mark in marks)
    (place / "spans").write_bytes(content)
    here = store.here(LAYER, ZTOC)
    assert here == Here(len(marks), present, runs, present)
    assert here.share == (present / len(marks) if marks else 1.0)


def test_a_map_that_is_not_to_be_trusted_is_none(tmp_path: Path) -> None:
    """No map, a damaged one, and one of an earlier boot tell nothing."""
    store = LayerStore(tmp_path)
    assert store.here(LAYER, ZTOC) is None
    place = store.directory(LAYER, ZTOC)
    place.mkdir(parents=True)
    for content in (b"", b"x" * 100, new_map(4, "0" * 36)):
        (place / "spans").write_bytes(content)
        assert store.here(LAYER, ZTOC) is None


def test_spans_that_nobody_wanted_are_no_need(tmp_path: Path) -> None:
    """What was filled in the background is here, but tells nothing of what launches need."""
    store = LayerStore(tmp_path)
    place = store.directory(LAYER, ZTOC)
    place.mkdir(parents=True)
    content = bytearray(new_map(8, boot_id()))
    content[HEADER:] = bytes([NEEDED, AHEAD, FILLED, FILLED, NEEDED, 0, AHEAD, FILLED])
    (place / "spans").write_bytes(content)
    here = store.here(LAYER, ZTOC)
    assert here == Here(8, 4, 3, 7)
    assert (here.share, here.share_here) == (4 / 8, 7 / 8)
