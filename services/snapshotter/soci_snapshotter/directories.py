# SPDX-License-Identifier: Apache-2.0
"""The snapshots' own directories on disk: ``<root>/snapshotter/snapshots/<id>/{fs,work}``.

What is in them was made by images and containers: names may be any bytes, and trees deeper than a path may be long.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from soci.errors import LimitExceeded, SociError, Unavailable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
SHOWN = "shown"
"""The file by which a directory says that it may have a mount."""
DIGITS = 18
"""Digits of the longest number that can be a snapshot's."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        remove_directory(place)
        place.mkdir(mode=0o700)
        _make_upper(place / "fs", owner)
        if active:
            (place / "work").mkdir()
            (place / "work").chmod(0o711)
    except OSError as error:
        with suppress(OSError):
            remove_directory(place)
        raise error_of(error, f"snapshot directory {place}") from error


def _make_upper(upper: Path, owner: tuple[int, int] | None) -> None:
    upper.mkdir()
    upper.chmod(0o755)  # whatever the umask: it is the root directory of a container
    if owner is not None:
        os.chown(upper, *owner)


def remake_upper(upper: Path) -> None:
    """``fs`` as it was when it was made: for a second way to bring a layer, after the first one failed half-way."""
    try:
        found = upper.stat()
        remove_directory(upper)
        _make_upper(upper, (found.st_uid, found.st_gid))
    except OSError as error:
        raise error_of(error, f"snapshot directory {upper}") from error


def mark_shown(place: Path) -> None:
    """Note on disk that the mounter was asked to show this snapshot: its mount goes before its directory does."""
    try:
        (place / SHOWN).touch()
    except OSError as error:
        raise error_of(error, f"snapshot directory {place}") from error


def was_shown(place: Path) -> bool:
    """Was the mounter asked to show this snapshot?"""
    return (place / SHOWN).exists()


def numbers(snapshots: Path) -> set[int]:
    """The numbers of all snapshot directories; what has another name is not ours."""
    try:
        with os.scandir(snapshots) as entries:
            names = {entry.name for entry in entries}
    except OSError as error:
        raise error_of(error, str(snapshots)) from error
    return {int(name) for name in names if name.isascii() and name.isdigit() and name[0] != "0" and len(name) <= DIGITS}


def error_of(error: OSError, what: str) -> SociError:
    """A failure of the file system: `LimitExceeded` where it is full."""
    return (LimitExceeded if error.errno in FULL else SociError)(f"{what}: {error.strerror or error}")


def remove_directory(place: Path) -> None:
    """Delete a directory, whatever is in it and however deep; one that is not there is success. Raises OSError."""
    parent = os.open(place.parent, _DIRECTORY)
    try:
        remove_tree(parent, os.fsencode(place.name))
    finally:
        os.close(parent)


def remove_tree(parent: int, name: bytes) -> None:
    """Delete the directory ``name`` in the directory ``parent`` (a descriptor), without recursion and long paths.

    Other file systems mounted inside are not entered: the deletion ends with EBUSY there.
    """
    try:
        here = os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        device = os.fstat(here).st_dev
        levels = [(os.fstat(here).st_ino, name, _remove_files(here))]
        while True:
            _, own, directories = levels[-1]
            if directories:
                child = directories.pop()
                here = _step(here, child)
                found = os.fstat(here)
                if found.st_dev != device:
                    raise OSError(errno.EBUSY, "another file system is mounted inside", os.fsdecode(child))
                levels.append((found.st_ino, child, _remove_files(here)))
                continue
            levels.pop()
            if not levels:
                break
            here = _step(here, b"..")
            if os.fstat(here).st_ino != levels[-1][0]:
                raise OSError(errno.ESTALE, "moved while it was deleted", os.fsdecode(own))
            os.rmdir(own, dir_fd=here)
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=parent)


def _step(here: int, name: bytes) -> int:
    below = os.open(name, _DIRECTORY, dir_fd=here)
    os.close(here)
    return below


def _remove_files(directory: int) -> list[bytes]:
    """Delete all but the directories in a directory; these are given."""
    directories = []
    for text in os.listdir(directory):
        name = os.fsencode(text)
        if stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode):
            directories.append(name)
        else:
            os.unlink(name, dir_fd=directory)
    return directories
