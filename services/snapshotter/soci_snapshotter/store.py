# SPDX-License-Identifier: Apache-2.0
"""The truth about snapshots: an append-only log in SQLite, folded to a table in the same transaction.

    events     what happened, in order, never changed
    snapshots  the fold of it: can be thrown away and folded anew (`rebuild`)
    outbox     up to which event the log was published (`soci_bus`)

The log keeps of each snapshot how it was prepared, committed and removed, and its last labels, for the snapshots that
exist and those that went within the last `GONE_EVENTS` events. What else there is goes once it is published (`trim`),
and is not missed: the fold of what stays is the same.

WAL with synchronous=FULL: a call that was answered survives power loss. One thread owns the connection; nothing in
here waits for anything but the disk, and for `BUSY_TIMEOUT` for another process that writes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from soci.errors import NotFound, SociError
from soci_snapshotter import state
from soci_snapshotter.state import Change, Kind, Snapshot

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ns INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS snapshots (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, parent TEXT NOT NULL, labels TEXT NOT NULL,
  created_ns INTEGER NOT NULL, updated_ns INTEGER NOT NULL, size INTEGER NOT NULL, inodes INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS children ON snapshots (parent);
CREATE INDEX IF NOT EXISTS events_of ON events (json_extract(body, '$.id'));
CREATE INDEX IF NOT EXISTS removals ON events (seq) WHERE json_extract(body, '$.what') = 'removed';
CREATE TABLE IF NOT EXISTS outbox (only INTEGER PRIMARY KEY CHECK (only = 1), published INTEGER NOT NULL);
INSERT OR IGNORE INTO outbox VALUES (1, 0);
"""
BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process that holds the database, such as a rebuild."""
CHAIN_LIMIT = 10_000
"""Snapshots that lie upon one another; more means a damaged table."""
SCHEMA_VERSION = 1
"""The form of the tables; a file of a later one is refused."""
GONE_EVENTS = 100_000
"""How many events ago a snapshot was removed, at most, whose events are kept once they are published."""
WAITING_EVENTS = 1_000_000
"""Events kept while nothing can be published, of those that the fold does not need."""
TRIM_EVENTS = 1_000
"""Events looked at by one `trim`, and snapshots that are gone of which it drops the events."""
STRAY_NUMBERS = 1_000_000
"""A directory whose number is so far beyond the last one given was not made by us."""

Row = tuple[int, str, Kind, str, str, int, int, int, int]
"""A row of the table, as it is on disk."""

_CHAIN = """WITH RECURSIVE chain AS (
  SELECT * FROM snapshots WHERE name = ?
  UNION ALL SELECT below.* FROM chain JOIN snapshots AS below ON below.name = chain.parent LIMIT ?)
SELECT * FROM chain"""
_INSERT = "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did: events folded, and each row that was wrong: what it was and what it is; None: not there."""

    events: int
    wrong: tuple[tuple[Row | None, Row | None], ...]


class SnapshotStore:
    """The log and its fold. Not for use from several threads."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or make the database; a file that is none, or is damaged, is a `SociError` that names it.

        ``read_only``: for a look beside the service that owns it, which is not disturbed; nothing is made.
        """
        self._path = path
        self._compacted = 0  # up to which event those that it superseded are gone
        try:
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(
                f"file:{quote(str(path))}?mode={mode}",
                uri=True,
                timeout=BUSY_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._check_version()
                if not read_only:
                    self._open()
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            raise SociError(f"{path}: {error}; move it away to start with no snapshots") from error

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise SociError(f"{self._path} was written by a later version of this program (form {version})")

    def _open(self) -> None:
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"the database is damaged: {found}")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)
        self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError) as error:  # the latter two: a row that does not read
            raise SociError(f"{self._path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._border():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk ends it by itself
                    self._db.execute("ROLLBACK")
                raise

    # --- looking

    def find(self, name: str) -> Snapshot | None:
        """The snapshot of that key or name."""
        with self._border():
            row = self._db.execute("SELECT * FROM snapshots WHERE name = ?", (name,)).fetchone()
            return _snapshot(row) if row else None

    def get(self, name: str) -> Snapshot:
        """Like `find`, but `NotFound` where there is none."""
        found = self.find(name)
        if found is None:
            raise NotFound(f"snapshot {name!r} is not there")
        return found

    def chain(self, name: str) -> list[Snapshot]:
        """The snapshot of that key or name, and what it lies on, nearest first. Raises `NotFound`."""
        with self._border():
            rows = self._db.execute(_CHAIN, (name, CHAIN_LIMIT + 1))
            found = [_snapshot(row) for row in rows]
        if len(found) > CHAIN_LIMIT:
            raise SociError(f"snapshot {name!r} lies on {CHAIN_LIMIT} others or more")
        missing = found[-1].parent if found else name
        if missing:
            raise NotFound(f"snapshot {missing!r} is not there")
        return found

    def parents(self, snapshot: Snapshot) -> list[Snapshot]:
        """What it lies on, nearest first."""
        return self.chain(snapshot.parent) if snapshot.parent else []

    def all(self) -> list[Snapshot]:
        """Every snapshot, oldest first."""
        with self._border():
            return [_snapshot(row) for row in self._db.execute("SELECT * FROM snapshots ORDER BY id")]

    # --- changing

    def prepare(
        self, key: str, parent: str, kind: Kind, labels: Mapping[str, str], make: Callable[[int], None]
    ) -> Snapshot:
        """A new active snapshot or view; ``make(id)`` creates its directories before the change is final."""
        with self._transaction():
            below = self.find(parent) if parent else None
            change = state.decide_prepare(key, parent, kind, labels, taken=self.find(key), below=below)
            made = self._append(change)
            make(made.id)
            return made

    def commit(  # noqa: PLR0913  the call's own fields
        self, name: str, key: str, labels: Mapping[str, str], *, parent: str = "", size: int = 0, inodes: int = 0
    ) -> Snapshot:
        """The active snapshot ``key`` becomes the committed ``name``."""
        with self._transaction():
            change = state.decide_commit(
                name,
                key,
                labels,
                active=self.find(key),
                taken=self.find(name),
                parent=parent,
                below=self.find(parent) if parent else None,
                size=size,
                inodes=inodes,
            )
            return self._append(change)

    def remove(self, key: str) -> Snapshot:
        """Forget the snapshot; its directory is left for the clean-up."""
        with self._transaction():
            found = self.find(key)
            (children,) = self._db.execute("SELECT COUNT(*) FROM snapshots WHERE parent = ?", (key,)).fetchone()
            change = state.decide_remove(key, found=found, children=children)
            self._append(change)
        if found is None:
            raise AssertionError
        return found

    def abandon(self, made: Snapshot) -> None:
        """Forget an active snapshot or view whose making failed, unless it is no more what it was."""
        with self._transaction():
            found = self.find(made.name)
            if found and found.id == made.id and found.kind == made.kind:
                self._append(Change("removed", found.id, found.name, found.kind, found.parent))

    def update(self, name: str, labels: Mapping[str, str], paths: list[str], kept: Collection[str] = ()) -> Snapshot:
        """Change labels, but for those named in ``kept``."""
        with self._transaction():
            return self._append(state.decide_update(name, labels, paths, found=self.find(name), kept=kept))

    def reserve(self, numbers: Iterable[int]) -> set[int]:
        """Those of ``numbers`` that no snapshot has, and from now on none ever will: their directories may go.

        A call that failed, or that a crash cut short, leaves a directory whose number would be given again.
        """
        with self._transaction():
            (last,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence").fetchone()
            known = {number for (number,) in self._db.execute("SELECT id FROM snapshots")}
            free = {number for number in numbers if number not in known and 0 < number <= last + STRAY_NUMBERS}
            if free and max(free) > last:
                self._db.execute("DELETE FROM sqlite_sequence WHERE name = 'events'")
                self._db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('events', ?)", (max(free),))
            return free

    def trim(self) -> bool:
        """Drop some of the events that nobody needs; whether it is worth calling again at once.

        These are the labels of a snapshot that something later superseded, and old events of snapshots that are gone.
        """
        with self._transaction():
            (last,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
            (published,) = self._db.execute("SELECT published FROM outbox").fetchone()
            superseded = max(published, last - WAITING_EVENTS)
            gone = max(min(published, last - GONE_EVENTS), last - WAITING_EVENTS)
            looked = self._drop_superseded(superseded)
            removed = self._drop_gone(gone)
            return TRIM_EVENTS in {looked, removed}

    def _drop_superseded(self, before: int) -> int:
        """What the next events up to ``before`` supersede goes; how many events were looked at.

        All are looked at once after each start: the place is not on disk.
        """
        later = self._db.execute(
            "SELECT seq, json_extract(body, '$.id') FROM events WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
            (self._compacted, before, TRIM_EVENTS),
        ).fetchall()
        self._db.executemany(
            "DELETE FROM events WHERE json_extract(body, '$.id') = ?2 AND seq < ?1"
            " AND json_extract(body, '$.what') = 'relabelled'",
            [(seq, number) for seq, number in later if number],  # 0: just made, there is nothing before it
        )
        if later:
            self._compacted = later[-1][0]
        return len(later)

    def _drop_gone(self, before: int) -> int:
        """All events of the snapshots that were removed first, up to ``before``, go; how many snapshots these were."""
        found = self._db.execute(
            "SELECT json_extract(body, '$.id') FROM events"
            " WHERE json_extract(body, '$.what') = 'removed' AND seq <= ? ORDER BY seq LIMIT ?",
            (before, TRIM_EVENTS),
        ).fetchall()
        for column in ("seq", "json_extract(body, '$.id')"):  # the first event's number is the snapshot's
            self._db.executemany(f"DELETE FROM events WHERE {column} = ?", found)  # noqa: S608  one of the two above
        return len(found)

    def rebuild(self) -> Rebuilt:
        """Fold the whole log anew, and make the table what comes of it.

        Another process may use the database meanwhile: what takes long is done without a lock, which is held for the
        events that came since, and for rows that are wrong.
        """
        table: dict[int, Snapshot] = {}
        with self._border():
            self._db.execute("BEGIN")  # one moment's log, whoever appends to it or trims it
            try:
                last, count = self._fold_into(table, 0)
            finally:
                self._db.execute("ROLLBACK")
        with self._transaction():
            last, more = self._fold_into(table, last)
            rows = {row[0]: row for row in self._db.execute("SELECT * FROM snapshots")}
            wanted = {number: _row(snapshot) for number, snapshot in table.items()}
            wrong = [number for number in sorted({*rows, *wanted}) if rows.get(number) != wanted.get(number)]
            self._db.executemany("DELETE FROM snapshots WHERE id = ?", [(number,) for number in wrong])
            self._db.executemany(_INSERT, [wanted[number] for number in wrong if number in wanted])
        return Rebuilt(count + more, tuple((rows.get(number), wanted.get(number)) for number in wrong))

    def _fold_into(self, table: dict[int, Snapshot], after: int) -> tuple[int, int]:
        """Fold the events ``after`` that number into ``table``: the last one's number, and how many there were."""
        count = 0
        for seq, at_ns, body in self._db.execute(
            "SELECT seq, at_ns, body FROM events WHERE seq > ? ORDER BY seq", (after,)
        ):
            change = _numbered(Change(**json.loads(body)), seq)
            made = state.fold(table.get(change.id), change, at_ns)
            if made is None:
                table.pop(change.id, None)
            else:
                table[change.id] = made
            after, count = seq, count + 1
        return after, count

    # --- the log

    def events(self, after: int, most: int) -> list[tuple[int, int, Change]]:
        """The events after that number, the oldest first: (number, time in ns, change)."""
        with self._border():
            rows = self._db.execute(
                "SELECT seq, at_ns, body FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, most)
            )
            return [(seq, at_ns, _numbered(Change(**json.loads(body)), seq)) for seq, at_ns, body in rows]

    def unpublished(self, most: int) -> list[tuple[int, int, Change]]:
        """The oldest events that are not on the bus yet: (number, time in ns, change)."""
        with self._border():
            (published,) = self._db.execute("SELECT published FROM outbox").fetchone()
        return self.events(published, most)

    def published(self, seq: int) -> None:
        """All up to ``seq`` are on the bus."""
        with self._border():
            self._db.execute("UPDATE outbox SET published = MAX(published, ?)", (seq,))

    # --- inside

    def _append(self, change: Change) -> Snapshot:
        at_ns = time.time_ns()
        body = json.dumps(asdict(change), sort_keys=True)
        seq = self._db.execute("INSERT INTO events (at_ns, body) VALUES (?, ?)", (at_ns, body)).lastrowid
        return self._fold(change, seq or 0, at_ns)

    def _fold(self, change: Change, seq: int, at_ns: int) -> Snapshot:
        """Apply one event to the table."""
        change = _numbered(change, seq)
        row = self._db.execute("SELECT * FROM snapshots WHERE id = ?", (change.id,)).fetchone()
        before = _snapshot(row) if row else None
        after = state.fold(before, change, at_ns)
        if after is None:
            self._db.execute("DELETE FROM snapshots WHERE id = ?", (change.id,))
            return before or Snapshot(change.id, change.name, change.kind, change.parent, {}, at_ns, at_ns)
        self._db.execute(
            f"{_INSERT} ON CONFLICT (id) DO UPDATE SET"
            " name = excluded.name, kind = excluded.kind, parent = excluded.parent, labels = excluded.labels,"
            " created_ns = excluded.created_ns, updated_ns = excluded.updated_ns,"
            " size = excluded.size, inodes = excluded.inodes",
            _row(after),
        )
        return after


def _numbered(change: Change, seq: int) -> Change:
    """A new snapshot's id is its first event's number: never used again, the same after a rebuild."""
    return replace(change, id=seq) if change.what == "prepared" else change


def _row(one: Snapshot) -> Row:
    labels = json.dumps(dict(one.labels), sort_keys=True)
    return one.id, one.name, one.kind, one.parent, labels, one.created_ns, one.updated_ns, one.size, one.inodes


def _snapshot(row: Row) -> Snapshot:
    number, name, kind, parent, labels, created, updated, size, inodes = row
    return Snapshot(number, name, kind, parent, json.loads(labels), created, updated, size, inodes)
