# SPDX-License-Identifier: Apache-2.0
"""The artifacts database: which indexes, zTOCs and prefetch lists were made here, and of what.

An SQLite file that several processes use at once. Blobs are the truth: the database only finds them, and can be
built anew from them (``soci rebuild-db``).
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from soci.digest import Digest
from soci.errors import FailedPrecondition, InvalidInput, NotFound, SociError, Unavailable

FILE_NAME: Final = "artifacts.sqlite3"
"""The database's name below the root folder."""
BUSY_SECONDS: Final = 30.0
"""How long to wait for another process that writes."""
SCHEMA_VERSION: Final = 1

ArtifactType = Literal["soci_index", "soci_layer", "soci_prefetch"]
INDEX: Final = "soci_index"
ZTOC: Final = "soci_layer"
PREFETCH: Final = "soci_prefetch"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One blob that was made, and of what."""

    digest: Digest
    type: ArtifactType
    original_digest: Digest  # of the image manifest for an index, of the layer blob for the others
    image_digest: str = ""  # an index: of what the image's name stood for; version 2: the converted image index
    platform: str = ""  # an index: os/architecture[/variant]
    location: str = ""  # where the original is found: its digest again
    media_type: str = ""
    artifact_type: str = ""  # an index: its version's media type
    size: int = 0  # bytes
    span_size: int = 0  # bytes, of a zTOC
    created_at: int = field(default_factory=time.time_ns)  # ns since the epoch


_COLUMNS: Final = tuple(one.name for one in fields(Artifact))
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS artifacts (
    digest TEXT NOT NULL, type TEXT NOT NULL, original_digest TEXT NOT NULL, image_digest TEXT NOT NULL,
    platform TEXT NOT NULL, location TEXT NOT NULL, media_type TEXT NOT NULL, artifact_type TEXT NOT NULL,
    size INTEGER NOT NULL, span_size INTEGER NOT NULL, created_at INTEGER NOT NULL,
    PRIMARY KEY (digest, original_digest)
);
CREATE INDEX IF NOT EXISTS by_original ON artifacts (original_digest, type);
CREATE INDEX IF NOT EXISTS by_image ON artifacts (image_digest);
"""
_PUT: Final = f"INSERT OR REPLACE INTO artifacts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608  (constants only)
_GET: Final = f"SELECT {', '.join(_COLUMNS)} FROM artifacts"  # noqa: S608  (constants only)
_NEWEST: Final = " ORDER BY created_at DESC, digest, original_digest"


class ArtifactsDb:
    """The database in file ``path``, made (mode 0600) with its first use; the folder must exist.

    An artifact's key is its digest together with its original's: short prefetch lists of different layers often are
    the same bytes. Methods block for at most `BUSY_SECONDS` and may be called from any thread. They raise
    `Unavailable` where the database stays locked or cannot be reached, `FailedPrecondition` where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, *artifacts: Artifact) -> None:
        """Add or replace, all or none."""
        with self._writing() as connection:
            connection.executemany(_PUT, map(astuple, artifacts))

    def get(self, digest: Digest) -> Artifact | None:
        """The newest artifact with this digest."""
        return next(iter(self._select("digest = ?", digest)), None)

    def all(self, type_: ArtifactType | None = None) -> list[Artifact]:
        """All artifacts, or those of a type; newest first."""
        return self._select("type = ?", type_) if type_ else self._select("1")

    def ztocs_of(self, layer: Digest, span_size: int | None = None) -> list[Artifact]:
        """The zTOCs of a layer, of any span size or of this one; newest first."""
        found = self._select("original_digest = ? AND type = ?", layer, ZTOC)
        return [one for one in found if span_size in (None, one.span_size)]

    def indexes_of(self, manifest: Digest) -> list[Artifact]:
        """The indexes of an image manifest, newest first."""
        return self._select("original_digest = ? AND type = ?", manifest, INDEX)

    def indexes_of_image(self, image: Digest) -> list[Artifact]:
        """The indexes that were made for an image's target, newest first."""
        return self._select("image_digest = ? AND type = ?", image, INDEX)

    def remove_indexes(self, digests: Sequence[Digest]) -> None:
        """Forget indexes, all or none; the entries of their zTOCs stay.

        Raises `NotFound` for a digest that is not known, `InvalidInput` for one that is no index's.
        """
        with self._writing() as connection:
            for digest in digests:
                kinds = {
                    str(row[0]) for row in connection.execute("SELECT type FROM artifacts WHERE digest = ?", (digest,))
                }
                if not kinds:
                    raise NotFound(f"no SOCI index {digest} here")
                if kinds != {INDEX}:
                    raise InvalidInput(f"{digest} is no SOCI index: only indexes can be removed")
                connection.execute("DELETE FROM artifacts WHERE digest = ?", (digest,))

    def remove(self, digests: Iterable[Digest]) -> None:
        """Forget artifacts of any type, all or none; unknown ones are fine."""
        with self._writing() as connection:
            connection.executemany("DELETE FROM artifacts WHERE digest = ?", [(digest,) for digest in digests])

    def move_index(self, digest: Digest, *, image: Digest, original: Digest) -> None:
        """Say that index ``digest`` belongs to image ``image`` and manifest ``original``; unknown ones are fine.

        Converting an image makes both anew, after its indexes were built.
        """
        with self._writing() as connection:
            found = [_value(row) for row in connection.execute(f"{_GET} WHERE digest = ?{_NEWEST}", (digest,))]
            if found:
                values = dict(zip(_COLUMNS, astuple(found[0]), strict=True))
                values |= {"image_digest": image, "original_digest": original, "location": original}
                connection.execute("DELETE FROM artifacts WHERE digest = ?", (digest,))
                connection.execute(_PUT, tuple(values.values()))

    def _select(self, where: str, *values: object) -> list[Artifact]:
        if not self.path.exists():
            return []  # looking makes no file
        with self._open() as connection:
            rows = connection.execute(f"{_GET} WHERE {where}{_NEWEST}", values)
            return [_value(row) for row in rows]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that no other writer comes between."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of this call's own: neither threads nor processes share one. The border to SQLite."""
        try:
            if not self.path.exists():
                _make(self.path)
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
                self._prepare(connection)
                yield connection
        except SociError:
            raise
        except sqlite3.OperationalError as error:
            raise Unavailable(f"artifacts database {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise FailedPrecondition(
                f"artifacts database {self.path}: {error}: remove it and run soci rebuild-db"
            ) from error
        except OSError as error:
            raise FailedPrecondition(f"artifacts database {self.path}: {error.strerror}") from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise FailedPrecondition(f"artifacts database {self.path} was made by a newer version of soci")
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _make(path: Path) -> None:
    """An empty database file, mode 0600, unless another makes it first.

    It comes under its name already closed: closing any descriptor of a file ends every lock that this process holds on
    it (fcntl(2)), those of SQLite in other threads too.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        os.close(descriptor)
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()


def _value(row: tuple[Any, ...]) -> Artifact:
    return Artifact(*row)
