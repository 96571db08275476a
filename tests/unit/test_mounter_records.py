# SPDX-License-Identifier: Apache-2.0
"""What the mounter keeps on the disk of each mount."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.digest import sha256_digest
from soci.errors import InvalidInput, Unavailable
from soci_bus.asks import MountLayer
from soci_mounter.filesystem import Inherited
from soci_mounter.records import MAX_LOWER, Record, Records, check_ask, decode, encode

DIGEST = sha256_digest(b"")


def ask(mount: str = "m1", lower: tuple[str, ...] = ()) -> MountLayer:
    return MountLayer(mount, "registry/image:tag", DIGEST, DIGEST, lower)


inherited = st.builds(
    Inherited,
    st.integers(0, 0o177777),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**32 - 2),
    st.integers(-(2**70), 2**70),
    st.dictionaries(st.binary(min_size=1), st.binary(), max_size=3),
)


@given(st.integers(0), st.dictionaries(st.binary(), inherited, max_size=4))
def test_a_record_comes_back_as_it_was(sequence: int, taken: dict[bytes, Inherited]) -> None:
    """Paths and attributes of any bytes survive the file."""
    record = Record(ask(lower=("/a", "/b")), sequence, taken)
    assert decode(encode(record)) == record


@pytest.mark.parametrize(
    ("change", "version"),
    [
        ({}, 1),
        ({"uid_map": ((0, 1, 2), (5, 6, 7)), "gid_map": ((0, 100, 65_536),)}, 2),
        ({"user_xattrs": True}, 2),
    ],
)
def test_the_manner_of_a_mount_comes_back(change: dict[str, Any], version: int) -> None:
    """Maps and marks survive the file, which an older program then refuses: it would show other owners."""
    record = Record(replace(ask(), **change), 1)
    assert decode(encode(record)) == record
    assert json.loads(encode(record))["version"] == version


def test_a_record_of_the_first_form_is_read() -> None:
    """Files written before there were maps are mounts without any."""
    value = json.loads(encode(Record(ask(), 1)))
    for field in ("uid_map", "gid_map", "user_xattrs"):
        del value[field]
    assert decode(json.dumps(value).encode()) == Record(ask(), 1)


@given(st.binary())
def test_bytes_that_are_no_record_are_refused(content: bytes) -> None:
    """Whatever stands in the file, the answer is a record or `InvalidInput`."""
    with pytest.raises(InvalidInput):
        decode(content)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"layer": "x"},
        {"mount": "../x"},
        {"lower": 3},
        {"inherited": []},
        {"uid_map": [[0, 1, 1]]},
        {"uid_map": [[0, 1]], "gid_map": [[0, 1]]},
        {"uid_map": [[0, 1, 0]], "gid_map": [[0, 1, 1]]},
        {"uid_map": 5},
    ],
)
def test_damaged_records_are_refused(change: dict[str, object]) -> None:
    """A field that cannot be is `InvalidInput`, a record of a newer version too."""
    value = json.loads(encode(Record(ask(), 1))) | change
    with pytest.raises(InvalidInput):
        decode(json.dumps(value).encode())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a\0b", "a\n", "ü", "x" * 129])
def test_names_that_are_no_safe_path_component_are_refused(name: str) -> None:
    """A mount's name becomes a file name and a directory name."""
    with pytest.raises(InvalidInput):
        check_ask(ask(name))


@pytest.mark.parametrize("lower", [("relative",), ("/nul\0",), ("/x",) * (MAX_LOWER + 1)])
def test_lower_directories_that_cannot_be_are_refused(lower: tuple[str, ...]) -> None:
    """They are absolute paths, not more than a kernel takes."""
    with pytest.raises(InvalidInput):
        check_ask(ask(lower=lower))


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    """Loading gives what was saved and not forgotten, in the order of mounting; broken files are named."""
    records = Records(tmp_path)
    for sequence, name in enumerate(["zz", "b.c", "a"], 1):
        records.save(Record(ask(name), sequence))
    records.save(Record(ask("gone"), 9))
    records.forget("gone")
    records.forget("gone")
    (tmp_path / "broken.json").write_bytes(b"{")
    (tmp_path / "alias.json").write_bytes(encode(Record(ask("other"), 10)))
    (tmp_path / "half.new").write_bytes(b"half")
    good, bad = records.load()
    assert [record.ask.mount for record in good] == ["zz", "b.c", "a"]
    assert sorted(path.name for path, _ in bad) == ["alias.json", "broken.json"]


def test_a_disk_that_refuses_is_unavailable(tmp_path: Path) -> None:
    """Saving where nothing can be written is `Unavailable`, and leaves nothing behind."""
    with pytest.raises(Unavailable):
        Records(tmp_path / "absent").save(Record(ask(), 1))
