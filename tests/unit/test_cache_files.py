# SPDX-License-Identifier: Apache-2.0
"""The presence map and the journal, as files."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci.errors import InvalidInput
from soci_cache.journal import GONE, JOURNAL_LIMIT, RECORD, encode_record, parse_journal
from soci_cache.presence import HEADER, SPANS_LIMIT, Presence, boot_id, new_map

DIGESTS = st.binary(min_size=32, max_size=32)
RECORDS = st.lists(st.tuples(st.integers(0, 40), DIGESTS | st.just(GONE)), max_size=20)


# --- presence map


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A map of ten absent spans."""
    path = tmp_path / "spans"
    path.write_bytes(new_map(10, boot_id()))
    return path


def test_a_new_map_is_empty(path: Path) -> None:
    """All spans are absent, and the map tells count and boot."""
    presence = Presence(path, writable=False)
    assert (presence.count, presence.boot, presence.present()) == (10, boot_id(), 0)
    assert presence.missing(range(10)) == list(range(10))
    assert not any(presence[span] for span in range(10))
    presence.close()


def test_a_mark_is_seen_by_other_processes(path: Path) -> None:
    """A process that opened the map before sees what another marks, and its neighbours stay as they were."""
    reader = Presence(path, writable=False)
    script = "import sys; from pathlib import Path; from soci_cache.presence import Presence\n"
    script += "Presence(Path(sys.argv[1]), writable=True).mark(3)"
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=30)
    assert reader[3]
    assert reader.missing(range(2, 5)) == [2, 4]
    assert reader.present() == 1
    reader.close()


def test_a_mark_can_be_taken_away(path: Path) -> None:
    """`clear` undoes `mark`."""
    presence = Presence(path, writable=True)
    presence.mark(9)
    assert presence[9]
    presence.clear(9)
    assert presence.present() == 0
    presence.close()


@pytest.mark.parametrize("span", [-1, 10, 1 << 40])
def test_spans_outside_are_refused(path: Path, span: int) -> None:
    """Neither the header nor what is behind the map can be read or written as a span."""
    presence = Presence(path, writable=True)
    before = path.read_bytes()
    for use in (presence.__getitem__, presence.mark, presence.clear):
        with pytest.raises(IndexError):
            use(span)
    for spans in (range(span, span + 1), range(span, 5), range(span, span + 2)):
        with pytest.raises(IndexError):
            presence.missing(spans)
    presence.close()
    assert path.read_bytes() == before


def test_no_spans_are_missing_of_none(path: Path) -> None:
    """An empty range has no absent span, wherever it is."""
    presence = Presence(path, writable=False)
    assert presence.missing(range(0)) == presence.missing(range(10, 10)) == []
    presence.close()


def test_a_reader_cannot_mark(path: Path) -> None:
    """The mapping itself refuses."""
    presence = Presence(path, writable=False)
    with pytest.raises(TypeError):
        presence.mark(1)
    presence.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"SOCISPAN",
        bytes(HEADER),
        bytes(HEADER + 10),
        new_map(10, "b")[:-1],
        new_map(10, "b") + b"\0",
        new_map(10, "b").replace(b"SOCISPAN", b"socispan"),
        new_map(10, "b")[:8] + struct.pack("<I", 2) + new_map(10, "b")[12:],
        new_map(SPANS_LIMIT + 1, "b"),
        b"SOCISPAN" + struct.pack("<II", 1, 0xFFFFFFFF) + bytes(48),
    ],
    ids=["nothing", "magic", "zeros", "more zeros", "short", "long", "case", "version", "too many", "count"],
)
def test_what_is_no_map_is_refused(path: Path, content: bytes) -> None:
    """A damaged map is `InvalidInput`, never a map of something."""
    path.write_bytes(content)
    with pytest.raises(InvalidInput):
        Presence(path, writable=False)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """The map is opened where it is, not where somebody points."""
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        Presence(tmp_path / "link", writable=True)


# --- journal


@given(RECORDS)
def test_the_last_record_of_a_span_counts(records: list[tuple[int, bytes]]) -> None:
    """What was written is read, later records win, voided spans and those that the layer has not are passed over."""
    content = b"".join(encode_record(*record) for record in records)
    last = dict(records)
    assert parse_journal(content, 30) == {span: one for span, one in last.items() if span < 30 and one != GONE}


@given(RECORDS, RECORDS, st.integers(0, RECORD.size - 1))
def test_a_torn_record_hides_only_itself(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]], kept: int
) -> None:
    """A record of which only a part was written, in the middle, takes none of its neighbours with it."""
    torn = encode_record(50, b"t" * 32)[:kept]
    content = b"".join(encode_record(*record) for record in before) + torn
    content += b"".join(encode_record(*record) for record in after)
    whole = dict(before + after)
    assert parse_journal(content, 50) == {span: one for span, one in whole.items() if one != GONE}


@given(RECORDS.filter(bool), st.data())
def test_a_flipped_bit_hides_its_record(records: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """A damaged record is never read as another: what is found was written."""
    content = bytearray(b"".join(encode_record(*record) for record in records))
    place = data.draw(st.integers(0, len(content) * 8 - 1))
    content[place // 8] ^= 1 << place % 8
    assert set(parse_journal(bytes(content), 50).items()) <= set(records)


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_garbage_holds_no_records(content: bytes) -> None:
    """Bytes of any kind are read without an error."""
    assert parse_journal(content, 1 << 32) == {}


def test_zeros_hold_no_records() -> None:
    """What a file system leaves where a record was not written yet is none: its CRC does not fit."""
    assert parse_journal(bytes(4000), 100) == {}


def test_the_limit_is_enough_for_the_most_spans() -> None:
    """A journal of a layer with as many spans as there may be is read whole, even with each record twice."""
    assert SPANS_LIMIT * RECORD.size * 2 <= JOURNAL_LIMIT
