# SPDX-License-Identifier: Apache-2.0
"""Whether overlayfs is to keep its own marks in ``user.overlay.*`` attributes: option ``userxattr``.

In a user namespace nobody may set ``trusted.*`` attributes, so overlayfs takes the others there if it is asked to
(Linux 5.11 and later). All of a node must agree: mount options, unpacked layers, and lazy layers.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

EVERYBODY = (0, 0, 4_294_967_295)
"""The one extent of the map of users outside of all user namespaces."""
MNT_DETACH = 2

TRUSTED_OPAQUE = "trusted.overlay.opaque"
USER_OPAQUE = "user.overlay.opaque"


def decide(uid_map: str, takes: Callable[[], bool]) -> bool:
    """For this text of ``/proc/self/uid_map``; ``takes`` tries whether overlayfs takes the option."""
    extents = [tuple(line.split()) for line in uid_map.splitlines()]
    return extents != [tuple(map(str, EVERYBODY))] and takes()


@cache
def needed() -> bool:
    """Must overlayfs be mounted with ``userxattr`` by, and for, this process? It stays as it is while it runs."""
    try:
        return decide(Path("/proc/self/uid_map").read_text(encoding="ascii"), overlay_takes)
    except OSError:
        return False


def opaque() -> str:
    """The extended attribute by which a directory hides what is below it."""
    return USER_OPAQUE if needed() else TRUSTED_OPAQUE


def overlay_takes() -> bool:
    """Try to mount an overlay of two empty directories with the option."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory(prefix="soci-") as folder:
        upper, lower, both = (Path(folder, name) for name in ("upper", "lower", "both"))
        for one in (upper, lower, both):
            one.mkdir()
        options = f"lowerdir={upper}:{lower},userxattr".encode()
        if libc.mount(b"overlay", os.fsencode(both), b"overlay", ctypes.c_ulong(0), options) != 0:
            return False
        libc.umount2(os.fsencode(both), MNT_DETACH)
        return True
