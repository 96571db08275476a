# SPDX-License-Identifier: Apache-2.0
"""Converting an image from file to file: an OCI image layout in, another one out, no containerd and no root.

The result appears whole: it is made beside its destination and renamed. Its blobs are those that the image needs, each
compared with its digest on the way; what else lay in the source is left behind. A converted image converted again
gives the same bytes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from soci.digest import Digest
from soci.errors import FailedPrecondition, NotFound
from soci_indexing.archive import open_source, write_archive
from soci_indexing.artifacts import FILE_NAME, ArtifactsDb
from soci_indexing.build import IndexWish, Noticed, Report
from soci_indexing.convert import Converted, ConvertWish, convert, index_builder
from soci_indexing.layout import (
    INDEX_FILE,
    LAYOUT_CONTENT,
    LAYOUT_FILE,
    LayoutContent,
    Root,
    blob_path,
    choose_root,
    in_thread,
    index_json,
    reachable,
)
from soci_indexing.pool import BuildPool
from soci_indexing.stores import translate

Format = Literal["oci-archive", "oci-dir"]
FORMATS: Final[tuple[Format, ...]] = ("oci-archive", "oci-dir")

_PREFIX: Final = ".soci-convert-"


@dataclass(frozen=True, slots=True)
class Files:
    """From where to where, and as what."""

    source: Path
    destination: Path
    format: Format = "oci-archive"


async def convert_files(
    files: Files, wish: ConvertWish, index: IndexWish, pool: BuildPool, report: Report
) -> Converted:
    """Convert an image. Source and destination may be the same.

    Raises `FailedPrecondition` where the destination is something that must not be replaced, and what reading,
    indexing and converting raise; the destination then is as it was.
    """
    destination = files.destination.resolve()
    _check_destination(destination, files.format)
    with _workspace(destination.parent) as work, open_source(files.source) as source:
        fresh = work / "fresh"
        fresh.mkdir()
        content = LayoutContent(source, fresh)
        root = await choose_root(source, content)
        db = ArtifactsDb(work / FILE_NAME)  # platforms share layers
        build = index_builder(content, content, db, pool=pool, wish=index, image=root.target.digest, report=report)
        converted = await convert(content, root.target, wish, build=build, db=None, report=report)
        blobs, absent = await reachable(content, converted.target)
        for digest in absent:
            report(Noticed(f"blob {digest} is not in {files.source}, nor in the result"))
        out = work / "out"
        made = Root(converted.target, root.annotations)
        write = _write_directory if files.format == "oci-dir" else _write_archive
        await in_thread(f"write {files.destination}", lambda: write(out, content, made, sorted(blobs.items())))
        await in_thread(f"write {files.destination}", lambda: _replace(out, destination))
    return converted


def _check_destination(destination: Path, wanted: Format) -> None:
    """Only what is of the same kind is replaced: a slip of the hand must not cost anybody a directory."""
    if not destination.parent.is_dir():
        raise NotFound(f"there is no directory {destination.parent}")
    if not destination.exists():
        return
    if wanted == "oci-archive":
        if not destination.is_file():
            raise FailedPrecondition(f"{destination} is no file: to write a directory, say --format oci-dir")
    elif not destination.is_dir():
        raise FailedPrecondition(f"{destination} is not a directory")
    elif any(destination.iterdir()) and not (destination / LAYOUT_FILE).is_file():
        raise FailedPrecondition(f"{destination} is a directory with other things in it than an OCI image layout")


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A directory on the destination's file system, so that the result only needs to be renamed."""
    try:
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise translate(error, f"write in {parent}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_archive(out: Path, content: LayoutContent, root: Root, blobs: list[tuple[Digest, int]]) -> None:
    documents = [(LAYOUT_FILE, LAYOUT_CONTENT), (INDEX_FILE, index_json(root))]
    with out.open("xb") as file:
        write_archive(file, documents, ((digest, size, content.checked(digest)) for digest, size in blobs))
        file.flush()
        os.fsync(file.fileno())


def _write_directory(out: Path, content: LayoutContent, root: Root, blobs: list[tuple[Digest, int]]) -> None:
    out.mkdir()
    for digest, _ in blobs:
        path = blob_path(out, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in content.checked(digest):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    (out / LAYOUT_FILE).write_bytes(LAYOUT_CONTENT)
    (out / INDEX_FILE).write_bytes(index_json(root))


def _replace(out: Path, destination: Path) -> None:
    """Put the result in its place. A directory cannot be renamed over another: the old one steps aside first."""
    if not destination.is_dir():
        out.replace(destination)
        return
    out.chmod(destination.stat().st_mode & 0o7777)
    aside = destination.with_name(f"{_PREFIX}{secrets.token_hex(8)}")
    destination.rename(aside)
    try:
        out.rename(destination)
    except BaseException:
        aside.rename(destination)
        raise
    shutil.rmtree(aside)
