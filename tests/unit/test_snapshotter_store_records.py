# SPDX-License-Identifier: Apache-2.0
"""A node's snapshots as lines of JSON, read beside whoever owns the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci.errors import SociError
from soci_cache import LayerStore
from soci_snapshotter import records
from soci_snapshotter.labels import HAS_INDEX, REMOTE, ZTOC
from soci_snapshotter.records import listed, logged, mode_of, rebuilt
from soci_snapshotter.state import Kind, Snapshot
from soci_snapshotter.store import SnapshotStore


def nothing(_number: int) -> None:
    """No directories."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "meta?data#1 ä.db"  # what would mean something in a URI


@pytest.fixture
def store(path: Path) -> Iterator[SnapshotStore]:
    with closing(SnapshotStore(path)) as opened:
        opened.prepare("k", "", "active", {}, nothing)
        opened.commit("n", "k", {REMOTE: "yes"}, size=5, inodes=1)
        opened.prepare("k", "n", "active", {}, nothing)
        opened.remove("k")
        yield opened


@pytest.mark.parametrize(
    ("kind", "labels", "mode"),
    [
        ("committed", {REMOTE: "yes", HAS_INDEX: "true"}, "lazy"),
        ("committed", {HAS_INDEX: "true"}, "whole"),
        ("committed", {"a": "b"}, "local"),
        ("active", {HAS_INDEX: "true"}, ""),
        ("view", {}, ""),
    ],
)
def test_modes(kind: Kind, labels: dict[str, str], mode: str) -> None:
    """A committed snapshot's labels tell how it came; the others did not come."""
    assert mode_of(Snapshot(1, "s", kind, "", labels, 1, 1)) == mode


def test_lines(store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots with their mode; events in order, all or the last ones, of all or of who ever had a name."""
    monkeypatch.setattr(records, "BATCH", 1)
    (only,) = listed(store, tmp_path / "cache")
    assert (only["name"], only["mode"], only["size"], only["id"]) == ("n", "lazy", 0, 1)
    assert [(one["seq"], one["id"], one["what"]) for one in logged(store, "", None)] == [
        (1, 1, "prepared"),
        (2, 1, "committed"),
        (3, 3, "prepared"),
        (4, 3, "removed"),
    ]
    assert [one["seq"] for one in logged(store, "", 3)] == [2, 3, 4]
    assert [one["seq"] for one in logged(store, "n", None)] == [1, 2]
    assert [one["seq"] for one in logged(store, "k", None)] == [1, 2, 3, 4]
    assert list(logged(store, "nobody", None)) == []


def test_sizes(store: SnapshotStore, tmp_path: Path) -> None:
    """Of a lazy layer what the cache holds now; of the others as it was at the commit."""
    layer, ztoc = sha256_digest(b"layer"), sha256_digest(b"ztoc")
    cri = {f"containerd.io/snapshot/cri.{name}": str(layer) for name in ("manifest-digest", "layer-digest")}
    lazy = {REMOTE: "yes", ZTOC: str(ztoc), "containerd.io/snapshot/cri.image-ref": "r/i:1", **cri}
    for name, labels in (("lazy", lazy), ("whole", {HAS_INDEX: "true"})):
        store.prepare("k", "", "active", {}, nothing)
        store.commit(name, "k", labels, size=5, inodes=1)
    place = LayerStore(tmp_path / "cache").directory(layer, ztoc)
    place.mkdir(parents=True)
    (place / "layer.tar").write_bytes(b"x" * 300_000)
    sizes = {one["name"]: (one["size"], one["inodes"]) for one in listed(store, tmp_path / "cache")}
    assert sizes["whole"] == (5, 1)
    assert sizes["lazy"][0] >= 300_000
    assert sizes["lazy"][1] == 2


def test_a_rebuild_tells(store: SnapshotStore) -> None:
    """Each row that was wrong with all its columns, then the sum."""
    assert list(rebuilt(store)) == [{"events": 4, "wrong": 0}]
    store._db.execute("UPDATE snapshots SET size = 9")
    wrong, total = rebuilt(store)
    assert total == {"events": 4, "wrong": 1}
    assert {key: (wrong["was"][key], now) for key, now in wrong["now"].items() if wrong["was"][key] != now} == {
        "size": (9, 5)
    }


def test_reading_beside_the_owner(store: SnapshotStore, path: Path) -> None:
    """A second, read-only opening sees what is there, also while the owner writes, and can change nothing."""
    with closing(SnapshotStore(path, read_only=True)) as other:
        store._db.execute("BEGIN IMMEDIATE")
        assert other.all() == store.all()
        store._db.execute("ROLLBACK")
        with pytest.raises(SociError):
            other.prepare("x", "", "active", {}, nothing)
        store.prepare("y", "", "active", {}, nothing)
        assert other.get("y") == store.get("y")
    with pytest.raises(SociError, match="unable to open"):
        SnapshotStore(path.parent / "none.db", read_only=True)
    assert not (path.parent / "none.db").exists()
