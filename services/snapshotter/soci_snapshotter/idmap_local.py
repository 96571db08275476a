# SPDX-License-Identifier: Apache-2.0
"""A local layer a second time, with other owners: an id-mapped mount where that can be, else a copy.

    <snapshots>/<layer>_<container>/fs      the layer, as the container is to see it
    <snapshots>/<layer>_<container>/copied  only beside a copy: the boot in which it was made, its bytes, its inodes

The mount is of the layer's whole directory, on ``<layer>_<container>``, so that ``fs`` is there only for who sees the
mount: an overlay cannot be made of an empty directory by mistake. A copy is not forced to the disk; after another
boot it is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from soci.errors import SociError
from soci_cache.presence import boot_id
from soci_runtime.logs import log
from soci_snapshotter import idmap_mount
from soci_snapshotter.directories import error_of, remove_directory
from soci_snapshotter.idmap_copy import copy_layer
from soci_snapshotter.usage import disk_usage

COPIED = "copied"
COPIED_BYTES = 200
"""Bytes of that file."""


class Owners(idmap_mount.Maps, Protocol):
    """Maps, and the owner that a file gets by them."""

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        """The host's owner and group for the container's; `InvalidInput` where there can be none."""
        ...


def have_local(source: Path, place: Path, owners: Owners, stopped: Callable[[], bool]) -> None:
    """Have at ``place`` what is in the layer's directory ``source``, with other owners.

    Blocks, for a copy as long as copying takes. Raises `LimitExceeded` where the disk is full.
    """
    try:
        if idmap_mount.is_mounted(place) or copied(place) is not None:
            return
        remove_directory(place)
        place.mkdir(mode=0o700)
        why = _bind(source, place, owners)
        if why:
            log.info("a layer is copied to give it other owners", place=str(place), why=why)
            _copy(source, place, owners, stopped)
    except OSError as error:
        raise error_of(error, f"layer {source.name} with other owners") from error


def _bind(source: Path, place: Path, owners: Owners) -> str:
    """Try the mount; why it cannot be, or nothing."""
    if not idmap_mount.overlay_takes(os.uname().release):
        return "overlayfs of this kernel takes no id-mapped layers"
    if not idmap_mount.mounts_are_seen(place):
        return "mounts made here are not seen by containerd: the state folder's mount is not shared"
    try:
        idmap_mount.bind(source, place, owners)
    except OSError as error:
        return str(error)
    return ""


def _copy(source: Path, place: Path, owners: Owners, stopped: Callable[[], bool]) -> None:
    draft = place / "draft"
    try:
        copy_layer(source / "fs", draft, place / "links", owners, stopped)
        size, inodes = disk_usage(draft)
        (place / COPIED).write_text(f"{boot_id()} {size} {inodes}\n", encoding="ascii")
        draft.rename(place / "fs")
    except BaseException:
        with suppress(OSError):
            remove_directory(place)
        raise


def copied(place: Path) -> tuple[int, int] | None:
    """Bytes and inodes of the copy at ``place``; None where there is no whole one of this boot."""
    try:
        with (place / COPIED).open(encoding="ascii") as file:
            boot, size, inodes = file.read(COPIED_BYTES).split()
        return (int(size), int(inodes)) if boot == boot_id() and (place / "fs").is_dir() else None
    except (OSError, ValueError):
        return None


def remove_place(place: Path) -> None:
    """Delete a snapshot's directory, or a mapped layer's, after what is mounted on it. Raises OSError, `SociError`."""
    idmap_mount.unbind(place)
    if idmap_mount.is_mounted(place):
        raise SociError(f"{place} is still mounted")  # its files are another layer's
    remove_directory(place)
