# SPDX-License-Identifier: Apache-2.0
"""The snapshots' own directories on disk: ``<root>/snapshotter/snapshots/<id>/{fs,work}``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from soci.errors import LimitExceeded, Unavailable


def owner_of(directory: Path) -> tuple[int, int]:
    """Owner and group of a directory; asked before any transaction begins, for a mount may be slow or dead."""
    try:
        found = directory.stat()
    except OSError as error:
        raise Unavailable(f"{directory}: {error.strerror}") from error
    return found.st_uid, found.st_gid


def make_directories(place: Path, *, active: bool, owner: tuple[int, int] | None) -> None:
    """``fs`` (and ``work`` for an active snapshot). What was there is thrown away: a directory of this number can
    only be left over from a call that never ended.
    """
    try:
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(mode=0o700)
        _make_upper(place / "fs", owner)
        if active:
            (place / "work").mkdir(mode=0o711)
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise LimitExceeded(f"{place}: {error.strerror}") from error


def _make_upper(upper: Path, owner: tuple[int, int] | None) -> None:
    upper.mkdir(mode=0o755)
    if owner is not None:
        os.chown(upper, *owner)


def remake_upper(upper: Path) -> None:
    """``fs`` as it was when it was made: for a second way to bring a layer, after the first one failed half-way."""
    found = upper.stat()
    shutil.rmtree(upper)
    _make_upper(upper, (found.st_uid, found.st_gid))


def numbers(snapshots: Path) -> list[str]:
    """The names of all snapshot directories."""
    return [entry.name for entry in os.scandir(snapshots)]


def remove_directory(place: Path) -> None:
    """Delete a snapshot's directory, whatever is in it."""
    shutil.rmtree(place, ignore_errors=False)
