# SPDX-License-Identifier: Apache-2.0
"""The artifacts database: lookups, removal, and several processes at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soci.digest import Digest, parse_digest
from soci.errors import FailedPrecondition, InvalidInput, NotFound
from soci.index import SOCI_INDEX_V1, SOCI_INDEX_V2
from soci_indexing.artifacts import INDEX, PREFETCH, ZTOC, Artifact, ArtifactsDb


def digest(number: int) -> Digest:
    return parse_digest(f"sha256:{number:064x}")


MANIFEST, IMAGE, LAYER = digest(1), digest(2), digest(3)
OLD = Artifact(
    digest(10), INDEX, MANIFEST, IMAGE, "linux/amd64", MANIFEST, "m", SOCI_INDEX_V1, size=7, created_at=1_000
)
NEW = replace(OLD, digest=digest(11), artifact_type=SOCI_INDEX_V2, created_at=2_000)
TOC = Artifact(digest(20), ZTOC, LAYER, location=LAYER, media_type="z", size=9, span_size=4096, created_at=1_500)


@pytest.fixture
def db(tmp_path: Path) -> ArtifactsDb:
    return ArtifactsDb(tmp_path / "artifacts.sqlite3")


def test_what_is_put_is_found(db: ArtifactsDb) -> None:
    """Every field comes back; lists are newest first; lookups go by manifest, image, layer and span size."""
    db.put(OLD, NEW, TOC)
    assert db.get(OLD.digest) == OLD
    assert db.get(digest(99)) is None
    assert db.all() == [NEW, TOC, OLD]
    assert db.all(INDEX) == [NEW, OLD]
    assert db.indexes_of(MANIFEST) == [NEW, OLD]
    assert db.indexes_of_image(IMAGE) == [NEW, OLD]
    assert db.indexes_of(LAYER) == []
    assert db.ztocs_of(LAYER) == [TOC]
    assert db.ztocs_of(LAYER, 4096) == [TOC]
    assert db.ztocs_of(LAYER, 8192) == []


def test_looking_makes_no_file_and_writing_a_private_one(db: ArtifactsDb) -> None:
    """An absent database is empty; the one that is made belongs to its owner alone."""
    assert db.all() == []
    assert not db.path.exists()
    db.put(TOC)
    assert db.path.stat().st_mode & 0o777 == 0o600


def test_a_second_put_replaces(db: ArtifactsDb) -> None:
    """The same artifact of the same original is there once, as it was put last."""
    db.put(OLD)
    db.put(replace(OLD, platform="linux/arm64"))
    assert [one.platform for one in db.all()] == ["linux/arm64"]


def test_one_prefetch_list_may_be_of_two_layers(db: ArtifactsDb) -> None:
    """Equal bytes of different layers do not hide each other."""
    first = Artifact(digest(30), PREFETCH, LAYER, created_at=1)
    second = replace(first, original_digest=digest(4), created_at=2)
    db.put(first, second)
    assert db.all(PREFETCH) == [second, first]
    assert db.get(digest(30)) == second


def test_only_indexes_are_removed_and_all_or_none(db: ArtifactsDb) -> None:
    """A zTOC or an unknown digest among them is refused, and then nothing is removed."""
    db.put(OLD, NEW, TOC)
    with pytest.raises(InvalidInput, match="no SOCI index"):
        db.remove_indexes([OLD.digest, TOC.digest])
    with pytest.raises(NotFound):
        db.remove_indexes([OLD.digest, digest(99)])
    assert db.all() == [NEW, TOC, OLD]
    db.remove_indexes([OLD.digest])
    assert db.all() == [NEW, TOC]
    db.remove([TOC.digest, digest(99)])
    assert db.all() == [NEW]


def test_an_index_moves_to_a_converted_image(db: ArtifactsDb) -> None:
    """Its image and manifest are replaced, all else stays; an unknown index is no error."""
    db.put(NEW)
    db.move_index(NEW.digest, image=digest(5), original=digest(6))
    db.move_index(digest(99), image=digest(5), original=digest(6))
    assert db.all() == [replace(NEW, image_digest=digest(5), original_digest=digest(6), location=digest(6))]


def test_processes_at_once_lose_nothing(db: ArtifactsDb) -> None:
    """Several processes of several threads make the database and write to it at one moment: every entry is there."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from soci_indexing.artifacts import Artifact, ArtifactsDb
def put(number):
    name = f"sha256:{int(sys.argv[2]) * 100 + number:064x}"
    ArtifactsDb(Path(sys.argv[1])).put(Artifact(name, "soci_layer", name))
with ThreadPoolExecutor(3) as threads:
    list(threads.map(put, range(25)))
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(db.path), str(number)]) for number in range(4)]
    assert [process.wait(50) for process in running] == [0, 0, 0, 0]
    assert len(db.all(ZTOC)) == 100


def test_a_damaged_or_newer_database_says_the_way_out(db: ArtifactsDb, tmp_path: Path) -> None:
    """Bytes that are no database, a version of the future and a folder that is not there are refused in words."""
    db.path.write_bytes(b"not a database at all, but long enough to be looked at" * 50)
    with pytest.raises(FailedPrecondition, match="soci rebuild-db"):
        db.all()
    db.path.unlink()
    connection = sqlite3.connect(db.path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FailedPrecondition, match="newer version"):
        db.put(TOC)
    with pytest.raises(FailedPrecondition):
        ArtifactsDb(tmp_path / "none" / "x").put(TOC)
