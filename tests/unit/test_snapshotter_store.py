# SPDX-License-Identifier: Apache-2.0
"""The log in SQLite and its fold: whole or not at all, numbers given once, a rebuild that gives the same."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soci.errors import AlreadyExists, LimitExceeded, NotFound, SociError
from soci_snapshotter import store as module
from soci_snapshotter.store import Rebuilt, SnapshotStore


def nothing(_number: int) -> None:
    """No directories."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotStore]:
    with closing(SnapshotStore(tmp_path / "metadata.db")) as opened:
        yield opened


NAMES = st.sampled_from(["a", "b", "c", "d", "sha256:é"])
LABELS = st.dictionaries(st.sampled_from(["x", "y.z"]), st.sampled_from(["", "1", "2"]), max_size=2)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("prepare"), NAMES, NAMES | st.just(""), LABELS),
        st.tuples(st.just("commit"), NAMES, NAMES, LABELS),
        st.tuples(st.just("remove"), NAMES),
        st.tuples(st.just("update"), NAMES, LABELS, st.lists(st.sampled_from(["labels", "labels.x"]), max_size=2)),
        st.tuples(st.just("fail"), NAMES),
        st.tuples(st.just("reserve"), st.integers(1, 60)),
    ),
    max_size=40,
)
LOG_WORK = st.one_of(
    st.tuples(st.just("published"), st.integers(1, 30)),
    st.tuples(st.just("trim")),
    st.tuples(st.just("restart")),
)


def log_of(store: SnapshotStore) -> list[tuple[int, str]]:
    """The log, as it is on disk."""
    return list(store._db.execute("SELECT seq, body FROM events ORDER BY seq"))


def trim(store: SnapshotStore) -> None:
    """Trim until nothing is left to do."""
    while store.trim():
        pass


def check_fold(store: SnapshotStore) -> None:
    """The table is the fold of the log: a rebuild finds nothing wrong, and from nothing makes every row again."""
    before = store.all()
    assert store.rebuild() == Rebuilt(len(log_of(store)), ())
    store._db.execute("DELETE FROM snapshots")
    assert len(store.rebuild().wrong) == len(before)
    assert store.all() == before


def do(store: SnapshotStore, operation: tuple[object, ...]) -> None:
    match operation:
        case ["prepare", str(key), str(parent), dict(labels)]:
            store.prepare(key, parent, "active", labels, nothing)
        case ["commit", str(name), str(key), dict(labels)]:
            store.commit(name, key, labels, size=len(name), inodes=1)
        case ["remove", str(key)]:
            store.remove(key)
        case ["update", str(name), dict(labels), list(paths)]:
            store.update(name, labels, paths)
        case ["reserve", int(number)]:
            store.reserve([number])
        case ["fail", str(key)]:

            def fails(_number: int) -> None:
                raise LimitExceeded("no room")

            store.prepare(key, "", "view", {}, fails)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPERATIONS)
def test_a_rebuild_gives_the_same(tmp_path: Path, operations: list[tuple[object, ...]]) -> None:
    """After any calls the fold of the whole log is the table; no number is ever given twice."""
    (tmp_path / "any.db").unlink(missing_ok=True)
    with closing(SnapshotStore(tmp_path / "any.db")) as store:
        given_out: list[int] = []
        for operation in operations:
            known = {one.id for one in store.all()}
            with suppress(SociError):
                do(store, operation)
            given_out += [one.id for one in store.all() if one.id not in known]
        check_fold(store)
        assert len(set(given_out)) == len(given_out)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(OPERATIONS, LOG_WORK.map(lambda one: [one])), max_size=12),
    st.integers(0, 8),
    st.integers(0, 20),
    st.integers(1, 5),
)
def test_a_trimmed_log_has_the_same_fold(
    tmp_path: Path, steps: list[list[tuple[object, ...]]], gone: int, waiting: int, window: int
) -> None:
    """Whatever is dropped, and whenever, a rebuild gives the same rows, numbers and times; in the end little is left."""
    path = tmp_path / "any.db"
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("GONE_EVENTS", gone), ("WAITING_EVENTS", waiting), ("TRIM_EVENTS", window)):
            patch.setattr(module, name, value)
        store = SnapshotStore(path)
        for operation in (one for step in steps for one in step):
            match operation:
                case ["published", int(number)]:
                    store.published(number)
                case ["trim"]:
                    store.trim()
                    check_fold(store)
                case ["restart"]:
                    store.close()
                    store = SnapshotStore(path)
                case _:
                    with suppress(SociError):
                        do(store, operation)
        store.published(10**9)
        trim(store)
        check_fold(store)
        assert len(log_of(store)) <= 3 * (gone + len(store.all()))
        store.close()


def test_superseded_labels_go(store: SnapshotStore) -> None:
    """Of a snapshot whose labels change all the time the log keeps the last ones alone, once they are published."""
    store.prepare("k", "", "active", {}, nothing)
    store.commit("n", "k", {})
    for number in range(50):
        store.update("n", {"a": str(number + 1)}, ["labels.a"])
    made = store.get("n")
    trim(store)
    assert len(log_of(store)) == 52  # nothing is published
    store.published(log_of(store)[30][0])
    trim(store)
    assert len(log_of(store)) == 52 - 28
    store.published(10**9)
    trim(store)
    assert len(log_of(store)) == 3
    check_fold(store)
    assert store.get("n") == made


def test_one_trim_has_little_to_do(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call looks at `TRIM_EVENTS` events and drops as many snapshots' events at most; more are left to the next."""
    monkeypatch.setattr(module, "GONE_EVENTS", 0)
    monkeypatch.setattr(module, "TRIM_EVENTS", 10)
    for number in range(25):
        store.prepare(f"k{number}", "", "active", {}, nothing)
        store.remove(f"k{number}")
    store.published(10**9)
    assert [(store.trim(), len(log_of(store))) for _ in range(4)] == [(True, 30), (True, 10), (True, 0), (False, 0)]
    store.prepare("k", "", "active", {}, nothing)  # numbers go on
    assert store.get("k").id == 51


def test_a_rebuild_mends_the_table(store: SnapshotStore) -> None:
    """Rows that are wrong, missing or nobody's are told and mended; the others are left alone."""
    for key in "abc":
        store.prepare(key, "", "active", {"l": key}, nothing)
    before = store.all()
    store._db.execute("UPDATE snapshots SET labels = '{' WHERE name = 'a'")
    store._db.execute("DELETE FROM snapshots WHERE name = 'b'")
    store._db.execute("INSERT INTO snapshots VALUES (99, 'nobody', 'view', '', '{}', 1, 1, 0, 0)")
    rebuilt = store.rebuild()
    assert rebuilt.events == 3
    assert [(was and was[1], now and now[1]) for was, now in rebuilt.wrong] == [
        ("a", "a"),
        (None, "b"),
        ("nobody", None),
    ]
    assert store.all() == before


def test_a_log_that_does_not_read(store: SnapshotStore) -> None:
    """A damaged event is an error, and leaves the table as it was."""
    store.prepare("k", "", "active", {}, nothing)
    before = store.all()
    store._db.execute('INSERT INTO events (at_ns, body) VALUES (1, \'{"what": "removed"}\')')
    with pytest.raises(SociError, match=r"metadata\.db"):
        store.rebuild()
    assert store.all() == before
    store.prepare("l", "", "active", {}, nothing)  # no transaction is left open


def test_a_failing_make_leaves_nothing(store: SnapshotStore) -> None:
    """Where the directories cannot be made there is no snapshot, no event, and the next call works."""

    def fails(_number: int) -> None:
        raise LimitExceeded("no room")

    with pytest.raises(LimitExceeded):
        store.prepare("k", "", "active", {}, fails)
    assert store.find("k") is None
    assert store.unpublished(10) == []
    assert store.prepare("k", "", "active", {}, nothing).name == "k"


def test_a_failing_commit_ends_the_transaction(store: SnapshotStore) -> None:
    """Where SQLite itself cannot finish a transaction (a full disk), the next call works."""
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        for number in range(1000):
            store.prepare(f"k{number}", "", "active", {"l": "x" * 4000}, nothing)

    with pytest.raises(SociError, match="full"):
        fill()
    assert not store._db.in_transaction
    store._db.execute("PRAGMA max_page_count=1000000")
    assert store.prepare("now", "", "active", {}, nothing).id
    check_fold(store)


def test_numbers_are_never_used_again(tmp_path: Path) -> None:
    """Neither removal nor a restart gives a number a second time."""
    seen = []
    for _ in range(3):
        with closing(SnapshotStore(tmp_path / "metadata.db")) as store:
            seen.append(store.prepare("k", "", "active", {}, nothing).id)
            store.remove("k")
    assert seen == sorted(set(seen))


def test_reserved_numbers_are_not_given(store: SnapshotStore) -> None:
    """Numbers found on disk without a snapshot are named, and passed over from then on; strays are left alone."""
    made = store.prepare("k", "", "active", {}, nothing)
    far = made.id + module.STRAY_NUMBERS + 100
    assert store.reserve({made.id, made.id + 1, made.id + 7, far}) == {made.id + 1, made.id + 7}
    assert store.prepare("l", "", "active", {}, nothing).id == made.id + 8
    assert store.reserve(()) == set()


def test_a_reservation_on_a_new_database(store: SnapshotStore) -> None:
    """Directories of a database that was moved away keep their numbers to themselves."""
    assert store.reserve({1, 2, 40}) == {1, 2, 40}
    assert store.prepare("k", "", "active", {}, nothing).id == 41


def test_outbox(store: SnapshotStore) -> None:
    """Events come in order until they are marked; a mark never goes back; each holds what the call said."""
    store.prepare("k", "", "active", {"a": "1"}, nothing)
    store.commit("n", "k", {})
    store.remove("n")
    events = store.unpublished(10)
    assert [change.what for _, _, change in events] == ["prepared", "committed", "removed"]
    assert [len(store.unpublished(most)) for most in (1, 2)] == [1, 2]
    store.published(events[1][0])
    store.published(events[0][0])
    assert [change.what for _, _, change in store.unpublished(10)] == ["removed"]


def test_abandon(store: SnapshotStore) -> None:
    """Only the very snapshot that a failed call made is forgotten."""
    made = store.prepare("k", "", "active", {}, nothing)
    store.abandon(made)
    assert store.find("k") is None
    again = store.prepare("k", "", "active", {}, nothing)
    store.abandon(made)
    assert store.find("k") == again
    store.commit("n", "k", {})
    store.abandon(again)
    assert store.get("n").id == again.id


def test_the_log_is_trimmed(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old published events of snapshots that are gone go; all of those that exist stay, and a rebuild is the same."""
    monkeypatch.setattr(module, "GONE_EVENTS", 10)
    monkeypatch.setattr(module, "WAITING_EVENTS", 10_000)
    store.prepare("stays", "", "active", {}, nothing)
    store.commit("kept", "stays", {})
    source = random.Random(1)
    for _ in range(60):
        key = source.choice("abcde")
        with suppress(SociError):
            store.prepare(key, source.choice(["", "kept"]), "active", {}, nothing)
        with suppress(SociError):
            store.commit("N" + key, key, {})
        with suppress(SociError):
            store.remove(source.choice(["N" + key, "Na", "Nb"]))
    count = len(log_of(store))
    trim(store)
    assert len(log_of(store)) == count  # nothing is published
    store.published(10**9)
    before = store.all()
    trim(store)
    assert len(log_of(store)) <= 3 * (10 + len(before))
    check_fold(store)
    assert store.prepare("new", "kept", "active", {}, nothing).id > max(one.id for one in before)


def test_unpublished_events_are_bounded(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is ever published the log is trimmed all the same, later."""
    monkeypatch.setattr(module, "WAITING_EVENTS", 20)
    for _ in range(30):
        store.prepare("k", "", "active", {}, nothing)
        store.remove("k")
    trim(store)
    assert len(store.unpublished(1000)) == 20


def test_durable_settings(store: SnapshotStore) -> None:
    """An answered call survives power loss: WAL, and each commit synced."""
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_parents(store: SnapshotStore) -> None:
    """Parents come nearest first; a chain that never ends is an error, not a hang."""
    for number in range(4):
        store.prepare(f"k{number}", f"n{number - 1}" if number else "", "active", {}, nothing)
        store.commit(f"n{number}", f"k{number}", {})
    assert [one.name for one in store.parents(store.get("n3"))] == ["n2", "n1", "n0"]
    with pytest.raises(NotFound):
        store.get("n9")
    store._db.execute("UPDATE snapshots SET parent = 'n3' WHERE name = 'n0'")
    with pytest.raises(SociError, match="or more"):
        store.parents(store.get("n3"))


@pytest.mark.parametrize("spoil", ["garbage", "page", "directory", "newer"])
def test_a_damaged_file_is_named(tmp_path: Path, spoil: str) -> None:
    """A database that cannot be used is an error with its path, at the start."""
    path = tmp_path / "metadata.db"
    if spoil == "garbage":
        path.write_bytes(b"no database at all" * 1000)
    elif spoil == "directory":
        path.mkdir()
    else:
        with closing(SnapshotStore(path)) as store:
            for number in range(200):
                store.prepare(f"k{number}", "", "active", {"l": "x" * 500}, nothing)
        if spoil == "page":
            damaged = bytearray(path.read_bytes())
            damaged[4096 * 3 : 4096 * 12] = b"\xa5" * (4096 * 9)
            path.write_bytes(damaged)
        else:
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA user_version = 99")
    with pytest.raises(SociError, match=r"metadata\.db"):
        SnapshotStore(path)


def test_a_row_that_does_not_read(store: SnapshotStore) -> None:
    """Damage found later is an error with the file's name too."""
    store.prepare("k", "", "active", {}, nothing)
    store._db.execute("UPDATE snapshots SET labels = '{'")
    with pytest.raises(SociError, match=r"metadata\.db"):
        store.all()
    with pytest.raises(SociError, match=r"metadata\.db"):
        store.find("k")


def test_a_key_once(store: SnapshotStore) -> None:
    """Two calls for one key: the second is told, whatever kind it asks for."""
    store.prepare("k", "", "active", {}, nothing)
    with pytest.raises(AlreadyExists):
        store.prepare("k", "", "view", {}, nothing)
