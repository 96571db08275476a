# SPDX-License-Identifier: Apache-2.0
"""Whether all headers of a tar say what its table of contents says, and a file that keeps its bytes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from soci.entries import Entries
from soci.errors import Mismatch
from soci.toc import TocEntry
from soci_cache import LayerStore
from soci_cache.evict import is_kept
from soci_cache.tidy import Wish, tidy
from soci_mounter import graduate
from support.mounter_layers import Made, everything, item, make


@pytest.fixture(scope="module")
def made() -> Made:
    return make([*everything(), item("odd", b"x" * 700, mtime=1_600_000_000.25)])


def test_a_tar_agrees_with_its_own_table(tmp_path: Path, made: Made) -> None:
    """Members of every kind, read from the headers alone: the data is passed over, and nothing differs."""
    path = tmp_path / "tar"
    path.write_bytes(made.tar)
    with path.open("rb") as tar:
        found = graduate.walk(tar.fileno(), made.ztoc.uncompressed_size)
        assert found is not None
        graduate.compare(Entries.of(made.ztoc.entries), found)
        assert graduate.walk(tar.fileno(), made.ztoc.uncompressed_size, lambda: True) is None
    os.truncate(path, 300_000)
    with path.open("rb") as tar, pytest.raises(Mismatch, match="cut short"):
        graduate.walk(tar.fileno(), made.ztoc.uncompressed_size)


@pytest.mark.parametrize(
    ("at", "change", "word"),
    [
        (1, {"name": b"bin/fool"}, "name"),
        (1, {"size": 299_999}, "size"),
        (1, {"offset": 4096}, "place"),
        (1, {"mode": 0o755}, "mode"),
        (1, {"uid": 0}, "owner"),
        (1, {"gid": 7}, "owner"),
        (3, {"linkname": b"far"}, "link target"),
        (3, {"type": "hardlink"}, "type"),
        (7, {"mod_time": "2023-11-14T22:13:20Z"}, "mtime"),
        (8, {"pax": {b"SCHILY.xattr.user.colour": b"red", b"SCHILY.xattr.user.empty": b""}}, "xattrs"),
        (8, {"pax": {}}, "xattrs"),
        (11, {"devminor": 4}, "device"),
    ],
)
def test_whatever_differs_is_named(made: Made, at: int, change: dict[str, object], word: str) -> None:
    """Each fact of a header that a mount shows is compared."""
    entries: list[TocEntry] = list(made.ztoc.entries)
    entries[at] = replace(entries[at], **change)  # type: ignore[arg-type]
    with pytest.raises(Mismatch, match=f"has another {word}"):
        graduate.compare(Entries.of(entries), Entries.of(made.ztoc.entries))


def test_a_member_that_the_table_leaves_out_is_seen(made: Made) -> None:
    """A table of contents that hides the last file does not agree."""
    with pytest.raises(Mismatch, match="members"):
        graduate.compare(Entries.of(list(made.ztoc.entries)[:-1]), Entries.of(made.ztoc.entries))


def test_only_a_complete_layer_is_proven_and_kept(tmp_path: Path, made: Made) -> None:
    """With holes there is nothing to say; once complete it is said, and the file keeps its bytes until another boot."""
    store = LayerStore(tmp_path)
    made.put(tmp_path)
    assert graduate.prove(store, made.layer, made.ztoc_digest) is None
    with store.read(made.layer, made.ztoc_digest) as reader:
        assert not reader.keep()
    place = made.complete(tmp_path)
    assert graduate.found_before(place) is None
    assert graduate.prove(store, made.layer, made.ztoc_digest) == graduate.AGREE == graduate.found_before(place)
    with store.read(made.layer, made.ztoc_digest) as reader:
        assert reader.keep()
    assert is_kept(place / "layer.tar")
    assert tidy(tmp_path, Wish({(made.layer, made.ztoc_digest)}, budget=1)).spans == 0
    before = (place / "layer.tar").read_bytes()
    (place / "spans").write_bytes(b"damage")  # within a boot: the journal decides, and no byte goes
    os.truncate(place / "journal", 40)
    with store.read(made.layer, made.ztoc_digest) as reader:
        assert reader.present_count() == 1
    assert (place / "layer.tar").read_bytes() == before
    content = bytearray((place / "spans").read_bytes())
    content[16:52] = b"x" * 36
    (place / "spans").write_bytes(content)
    store.read(made.layer, made.ztoc_digest).close()
    assert not is_kept(place / "layer.tar")
    assert (place / "layer.tar").read_bytes() != before


def test_a_lie_is_remembered(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs stands in the layer's folder; damage of that file is as if nobody had looked."""
    store = LayerStore(tmp_path)
    place = made.complete(tmp_path)

    def lie(*_args: object) -> None:
        raise Mismatch("it lies" + "!" * 5000)

    monkeypatch.setattr(graduate, "compare", lie)
    said = graduate.prove(store, made.layer, made.ztoc_digest)
    assert said is not None
    assert said == graduate.found_before(place)
    assert said.startswith("differ: it lies!")
    (place / graduate.FILE).write_bytes(b"\xff agree")
    assert graduate.found_before(place) is None
