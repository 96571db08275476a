# SPDX-License-Identifier: Apache-2.0
"""The truth about snapshots: an append-only log in SQLite, folded to a table in the same transaction.

    events     what happened, in order, never changed
    snapshots  the fold of it: can be thrown away and folded anew (`rebuild`)
    outbox     up to which event the log was published (`soci_bus`)

The log keeps every event of the snapshots that exist, and of those that are gone the last `GONE_EVENTS`.

WAL with synchronous=FULL: a call that was answered survives power loss. One thread owns the connection; nothing in
here waits for anything but the disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from soci.errors import NotFound, SociError
from soci_snapshotter import state
from soci_snapshotter.state import Change, Kind, Snapshot

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ns INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS snapshots (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, parent TEXT NOT NULL, labels TEXT NOT NULL,
  created_ns INTEGER NOT NULL, updated_ns INTEGER NOT NULL, size INTEGER NOT NULL, inodes INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS children ON snapshots (parent);
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
"""Events kept of snapshots that are gone, once they are published."""
WAITING_EVENTS = 1_000_000
"""Events kept of snapshots that are gone while nothing can be published."""
STRAY_NUMBERS = 1_000_000
"""A directory whose number is so far beyond the last one given was not made by us."""


class SnapshotStore:
    """The log and its fold. Not for use from several threads."""

    def __init__(self, path: Path) -> None:
        """Open or make the database; a file that is none, or is damaged, is a `SociError` that names it."""
        self._path = path
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            raise SociError(f"{path}: {error}; move it away to start with no snapshots") from error

    def _open(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise SociError(f"{self._path} was written by a later version of this program (form {version})")
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

    def parents(self, snapshot: Snapshot) -> list[Snapshot]:
        """What it lies on, nearest first."""
        chain: list[Snapshot] = []
        below = snapshot.parent
        while below:
            if len(chain) >= CHAIN_LIMIT:
                raise SociError(f"snapshot {snapshot.name!r} lies on more than {CHAIN_LIMIT} others")
            chain.append(self.get(below))
            below = chain[-1].parent
        return chain

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

    def trim(self) -> int:
        """Drop old events of snapshots that are gone; how many went."""
        with self._transaction():
            (last,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
            (published,) = self._db.execute("SELECT published FROM outbox").fetchone()
            before = max(min(published, last - GONE_EVENTS), last - WAITING_EVENTS)
            return self._db.execute(
                "DELETE FROM events WHERE seq <= ? AND COALESCE(NULLIF(json_extract(body, '$.id'), 0), seq)"
                " NOT IN (SELECT id FROM snapshots)",
                (before,),
            ).rowcount

    def rebuild(self) -> int:
        """Fold the whole log anew into the table; the number of events folded."""
        with self._transaction():
            self._db.execute("DELETE FROM snapshots")
            count = 0
            for seq, at_ns, body in self._db.execute("SELECT seq, at_ns, body FROM events ORDER BY seq").fetchall():
                self._fold(Change(**json.loads(body)), seq, at_ns)
                count += 1
            return count

    # --- publishing

    def unpublished(self, most: int) -> list[tuple[int, int, Change]]:
        """The oldest events that are not on the bus yet: (number, time in ns, change)."""
        with self._border():
            rows = self._db.execute(
                "SELECT seq, at_ns, body FROM events WHERE seq > (SELECT published FROM outbox) ORDER BY seq LIMIT ?",
                (most,),
            )
            return [(seq, at_ns, Change(**json.loads(body))) for seq, at_ns, body in rows]

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
        """Apply one event. A new snapshot's id is its event's number: never used again, the same after a rebuild."""
        if change.what == "prepared":
            change = replace(change, id=seq)
        row = self._db.execute("SELECT * FROM snapshots WHERE id = ?", (change.id,)).fetchone()
        before = _snapshot(row) if row else None
        after = state.fold(before, change, at_ns)
        if after is None:
            self._db.execute("DELETE FROM snapshots WHERE id = ?", (change.id,))
            return before or Snapshot(change.id, change.name, change.kind, change.parent, {}, at_ns, at_ns)
        self._db.execute(
            "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " name = excluded.name, kind = excluded.kind, parent = excluded.parent, labels = excluded.labels,"
            " created_ns = excluded.created_ns, updated_ns = excluded.updated_ns,"
            " size = excluded.size, inodes = excluded.inodes",
            (
                after.id,
                after.name,
                after.kind,
                after.parent,
                json.dumps(dict(after.labels), sort_keys=True),
                after.created_ns,
                after.updated_ns,
                after.size,
                after.inodes,
            ),
        )
        return after


def _snapshot(row: tuple[int, str, Kind, str, str, int, int, int, int]) -> Snapshot:
    number, name, kind, parent, labels, created, updated, size, inodes = row
    return Snapshot(number, name, kind, parent, json.loads(labels), created, updated, size, inodes)
