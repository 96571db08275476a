# SPDX-License-Identifier: Apache-2.0
"""The folder of a layer that is unpacked before there is a snapshot for it: made, handed over, deleted.

<scratch>/<number>/blob, blob.arrived   the blob, while it comes
<scratch>/<number>/fs                   the layer
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from soci_cache.arriving import announce, forget
from soci_runtime.flights import in_thread
from soci_snapshotter.directories import error_of, remove_directory
from soci_snapshotter.settle import settle
from soci_snapshotter.unpack import sync
from soci_snapshotter.unpack_worker import Result


def blob_in(place: Path) -> Path:
    """Where the blob comes."""
    return place / "blob"


def layer_in(place: Path) -> Path:
    """Where it is unpacked."""
    return place / "fs"


def empty(scratch: Path) -> None:
    """Make the scratch folder, for root alone, and delete what an earlier process left there."""
    try:
        scratch.mkdir(mode=0o700, exist_ok=True)
        scratch.chmod(0o700)  # programs in images are setuid
        with os.scandir(scratch) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove_directory(Path(entry.path))
                else:
                    Path(entry.path).unlink()
    except OSError as error:
        raise error_of(error, str(scratch)) from error


def make(place: Path) -> None:
    """The folder of one layer, with its blob announced."""
    try:
        place.mkdir(mode=0o700)
        layer_in(place).mkdir()
        layer_in(place).chmod(0o755)  # whatever the umask
        announce(blob_in(place))
    except OSError as error:
        raise error_of(error, str(place)) from error


def hand_over(place: Path, upper: Path, lower: Sequence[Path], result: Result) -> None:
    """Rename the layer's directory to be ``upper``, which is absent or empty. It was on disk before; so are then the
    few things that are changed here. Where this fails, ``upper`` is as it was.
    """
    target = layer_in(place)
    try:
        if not result.root_listed:
            with suppress(FileNotFoundError):
                found = upper.stat()
                os.chown(target, found.st_uid, found.st_gid)
                target.chmod(stat.S_IMODE(found.st_mode))
        settle(target, lower, result.implied, sync=True)
        _fsync(target)
        target.rename(upper)
        _fsync(upper.parent)
    except OSError as error:
        raise error_of(error, f"the layer does not become {upper}") from error


class Syncs:
    """Has all that was written before on disk. Calls that come while one is at it share the next one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = asyncio.Lock()
        self._asked = self._done = 0

    async def sync(self) -> None:
        """Return once what is written now is on disk. Raises `SociError`."""
        self._asked += 1
        mine = self._asked
        async with self._turn:
            if self._done >= mine:
                return
            asked = self._asked
            try:
                await in_thread(sync, self._folder)
            except OSError as error:
                raise error_of(error, str(self._folder)) from error
            self._done = asked


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_blob(place: Path) -> None:
    """Delete the blob: a fetcher that is still at it sees that nobody wants it any more."""
    with suppress(OSError):  # it goes with its folder, at the latest at the next start
        forget(blob_in(place))


def discard(place: Path) -> None:
    """Delete the folder."""
    with suppress(OSError):
        remove_directory(place)
