# SPDX-License-Identifier: Apache-2.0
"""What this node has seen, for the next estimate: how much of a layer was needed, how fast a registry is.

A small SQLite file of its own. Nothing in it is truth: it may be lost or deleted at any time, and a trouble with it is
logged and passed over. Methods block on the disk for a moment; one thread at a time.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from soci.digest import Digest
from soci_runtime.logs import log
from soci_snapshotter.estimate import Link, Need

LAYERS_KEPT = 20_000
"""Layers whose need is remembered; the longest unseen go first."""
LINKS_KEPT = 256
LINK_AGE = 7 * 24 * 3600.0
"""Seconds after which what was seen of a link says nothing any more."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS needs (layer TEXT PRIMARY KEY, share REAL NOT NULL, runs INTEGER NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS links (
  registry TEXT PRIMARY KEY, bytes_per_second REAL NOT NULL, round_trip REAL NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS needs_at ON needs (at);
"""


class History:
    """The file. Two processes never share it: it lies in the snapshotter's locked folder."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._db = self._opened()

    def _opened(self) -> sqlite3.Connection:
        try:
            return _open(self._path)
        except sqlite3.Error as error:
            log.warning("what was seen of earlier launches is lost", file=str(self._path), error=error)
        try:
            self._path.unlink(missing_ok=True)
            return _open(self._path)
        except (sqlite3.Error, OSError):  # it is no file, or the disk takes none: for this run, in memory
            return _open(None)

    def need(self, layer: Digest) -> Need | None:
        """What earlier launches needed of the layer."""
        row = self._row("SELECT share, runs FROM needs WHERE layer = ?", (layer,))
        return Need(row[0], round(row[1])) if row else None

    def saw_need(self, layer: Digest, need: Need) -> None:
        """A launch of the layer has needed so much by now; the most that was seen counts."""
        self._write(
            "INSERT INTO needs VALUES (?, ?, ?, ?) ON CONFLICT (layer) DO UPDATE SET"
            " share = MAX(share, excluded.share), runs = MAX(runs, excluded.runs), at = excluded.at",
            (layer, need.share, need.runs, self._clock()),
            "DELETE FROM needs WHERE layer IN (SELECT layer FROM needs ORDER BY at DESC LIMIT -1 OFFSET ?)",
            LAYERS_KEPT,
        )

    def link(self, registry: str) -> Link | None:
        """The link to ``registry`` as it was seen last."""
        row = self._row(
            "SELECT bytes_per_second, round_trip FROM links WHERE registry = ? AND at > ?",
            (registry, self._clock() - LINK_AGE),
        )
        return Link(row[0], row[1]) if row else None

    def saw_link(self, registry: str, link: Link) -> None:
        """The link to ``registry`` is so now."""
        self._write(
            "INSERT OR REPLACE INTO links VALUES (?, ?, ?, ?)",
            (registry, link.bytes_per_second, link.round_trip, self._clock()),
            "DELETE FROM links WHERE registry IN (SELECT registry FROM links ORDER BY at DESC LIMIT -1 OFFSET ?)",
            LINKS_KEPT,
        )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _row(self, query: str, values: tuple[object, ...]) -> tuple[float, float] | None:
        try:
            with self._lock:
                row: tuple[float, float] | None = self._db.execute(query, values).fetchone()
                return row
        except sqlite3.Error as error:
            log.warning("what was seen of earlier launches cannot be read", file=str(self._path), error=error)
            return None

    def _write(self, change: str, values: tuple[object, ...], prune: str, most: int) -> None:
        try:
            with self._lock, self._db:
                self._db.execute(change, values)
                self._db.execute(prune, (most,))
        except sqlite3.Error as error:
            log.warning("what was seen of this launch cannot be kept", file=str(self._path), error=error)


def _open(path: Path | None) -> sqlite3.Connection:
    database = sqlite3.connect(path or ":memory:", timeout=1.0, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(_SCHEMA)
        database.execute("SELECT share, runs, at FROM needs LIMIT 1").fetchone()
    except BaseException:
        database.close()
        raise
    return database
