# SPDX-License-Identifier: Apache-2.0
# Descriptors and bytes, which pathlib has not. ruff: noqa: PTH
"""Directories that a layer implies without listing them take owner, mode, xattrs and time from the layers below.

A layer can be unpacked before those are here; this is what is left to do once they are.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soci_snapshotter import userxattr
from soci_snapshotter.parents import DIRECTORY, Parents, Parts

_OVERLAY = ("trusted.overlay.", "user.overlay.")


@dataclass(frozen=True, slots=True)
class Implied:
    """A directory that a layer implies. ``listed``: a later member is the directory itself, and says all but the
    xattrs that it does not name.
    """

    parts: Parts
    listed: bool = False


def settle(upper: Path, lower: Sequence[Path], implied: Sequence[Implied], *, sync: bool = False) -> None:
    """Give the ``implied`` directories of ``upper`` the attributes that the nearest of ``lower`` (nearest first)
    shows; one that stands no more, or that nothing below has, is left alone. With ``sync`` each is on disk then.

    Raises OSError.
    """
    if not implied:
        return
    root = os.open(upper, DIRECTORY)
    parents = Parents(root)
    try:
        for one in implied:
            try:
                here = parents.open(one.parts)
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                    continue  # the layer itself put something else there
                raise
            _settle(here, lower, one)
            if sync:
                os.fsync(here)
    finally:
        parents.close()
        os.close(root)


def _settle(here: int, lower: Sequence[Path], one: Implied) -> None:
    below = _below(lower, one.parts)
    if below is None:
        return
    try:
        copy_directory(below, here, xattrs_only=one.listed)
        if not one.listed:
            when = os.fstat(below).st_mtime_ns
            os.utime(here, ns=(when, when))
    finally:
        os.close(below)


def _below(lower: Sequence[Path], parts: Parts) -> int | None:
    """A descriptor of the directory of that path which the layers below show, if they show one.

    Symlinks are not followed: they were made by an image, and may lead out of it.
    """
    for one in lower:
        here = os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opaque = False
        try:
            for name in parts:
                opaque = opaque or _is_opaque(here)
                below = os.open(name, DIRECTORY, dir_fd=here)
                os.close(here)
                here = below
        except FileNotFoundError:
            os.close(here)
            if opaque:
                return None  # it hides what lies still lower
        except OSError as error:
            os.close(here)
            if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                return None  # a whiteout, or something else that is no directory, hides it too
            raise
        else:
            return here
    return None


def _is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(directory, userxattr.opaque()) == b"y"
    except OSError:
        return False


def copy_directory(source: int, target: int, *, xattrs_only: bool = False) -> None:
    """Owner, mode and xattrs of a directory onto another one, both open.

    With ``xattrs_only`` nothing that the target has is changed.
    """
    if not xattrs_only:
        found = os.fstat(source)
        os.chown(target, found.st_uid, found.st_gid)
        os.chmod(target, stat.S_IMODE(found.st_mode))
    with suppress(OSError):  # a file system without xattrs
        there = set(os.listxattr(target)) if xattrs_only else set()
        for key in os.listxattr(source):
            if not key.startswith(_OVERLAY) and key not in there:
                with suppress(OSError):
                    os.setxattr(target, key, os.getxattr(source, key))
