# SPDX-License-Identifier: Apache-2.0
"""Locks among the processes of a node: the kernel frees them with the process, however that ends.

folder of a layer   flock(2)   who looks at its files as a whole, mends or removes them
``layer.tar``       flock(2)   shared by who reads the layer: the folder stays
``layer.tar``       a byte a span, by open file description (fcntl(2)): shared by who fills the span, alone by who
                    takes it away
``ztoc``            flock(2)   the one who compares the whole layer with its diff_id
``keeper.lock``     flock(2)   the one who frees what the node's cache has too much
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from soci.errors import NotFound, Unavailable

SPAN_WAIT: Final = 10.0
"""Seconds that a fill waits for who is taking the same span away, which is done within milliseconds."""
POLL: Final = 0.005
KEEPER: Final = "keeper.lock"
_LOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid (0, as these locks have it)
_HELD: Final = frozenset({errno.EAGAIN, errno.EACCES})


@contextmanager
def folder(place: Path) -> Iterator[None]:
    """Hold a layer's folder, while its disk is looked at. `NotFound` where it is gone, or was made anew meanwhile."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{place} is not in the cache") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            now = place.lstat()
        except FileNotFoundError as error:
            raise NotFound(f"{place} is not in the cache any more") from error
        held = os.fstat(descriptor)
        if (now.st_dev, now.st_ino) != (held.st_dev, held.st_ino):
            raise NotFound(f"{place} was freed a moment ago, and made anew")
        yield
    finally:
        os.close(descriptor)


def lock_alone(descriptor: int) -> bool:
    """Take a file's lock without waiting; False where another process has it, even shared."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def keeper(cache: Path, wait: float = 0.0) -> Iterator[bool]:
    """Be the one who frees: whether it is so, after at most ``wait`` seconds. Raises OSError."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(cache / KEEPER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        ends = time.monotonic() + wait
        while not (alone := lock_alone(descriptor)) and time.monotonic() < ends:
            time.sleep(POLL)
        yield alone
    finally:
        os.close(descriptor)


@contextmanager
def filling(tar: int, span: int) -> Iterator[None]:
    """Around putting a span's bytes into the open ``layer.tar``: nobody takes them away meanwhile."""
    # A description of its own: such locks belong to it, and two threads may fill one span through the same writer.
    own = os.open(f"/proc/self/fd/{tar}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        ends = time.monotonic() + SPAN_WAIT
        while not _take(own, fcntl.F_RDLCK, span):
            if time.monotonic() > ends:
                raise Unavailable(f"span {span} is being taken away, and was not within {SPAN_WAIT:g} s")
            time.sleep(POLL)
        yield
    finally:
        os.close(own)


def take_span(tar: int, span: int) -> bool:
    """Keep others from filling a span until the descriptor is closed; False where one is at it now.

    Raises OSError where the file system knows no such locks.
    """
    return _take(tar, fcntl.F_WRLCK, span)


def _take(descriptor: int, kind: int, span: int) -> bool:
    try:
        return lock_byte(descriptor, kind, span)
    except OSError:
        if kind == fcntl.F_WRLCK:
            raise
        return True  # nobody can take spans away there, so there is nothing to keep them from


def lock_byte(descriptor: int, kind: int, at: int) -> bool:
    """Lock byte ``at`` for the open file description (``kind`` is fcntl(2)'s); False where another has it.

    Raises OSError where the file system knows no such locks.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, byte_lock(kind, at))
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


def byte_lock(kind: int, at: int) -> bytes:
    """What fcntl(2) takes for a lock of one byte."""
    return _LOCK.pack(kind, os.SEEK_SET, at, 1, 0)


def is_locked(found: bytes) -> bool:
    """Whether F_OFD_GETLK has found a lock in the way."""
    return bool(_LOCK.unpack(found)[0] != fcntl.F_UNLCK)
