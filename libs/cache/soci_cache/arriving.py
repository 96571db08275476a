# SPDX-License-Identifier: Apache-2.0
"""A blob on its way into a file of this node, and how a reader behind it knows how far it may go.

Who wants the blob makes two empty files (`announce`): the blob's, and beside it ``<blob>.arrived``. A fetcher fills the
first from its front and counts in the second, which both have mapped:

    0  8  bytes of the blob that are there, from its first on (this machine's byte order)
    8  1  0 coming, 1 complete and of its digest, 2 failed
    9  1  how many writers there have been, modulo 256
    10 6  zero

The count grows only behind the bytes, and only *complete* says that they are right: what is read before that is to be
taken back where it never becomes complete. The writer holds a lock (flock(2)) on the second file, which the kernel
frees when it dies: a blob that is coming and has no writer can be taken over by another one, which goes on behind what
is there. Deleting the files tells the writer that nobody wants them any more.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from soci.errors import FailedPrecondition, InvalidInput, SociError, Unavailable

COMING: Final = 0
COMPLETE: Final = 1
FAILED: Final = 2
SIZE: Final = 16
"""Bytes of the file beside the blob."""
SUFFIX: Final = ".arrived"
STALL_SECONDS: Final = 600.0
"""A reader waits no longer than this for the next byte; a writer that is alive gives up a stalled registry before."""
POLLS: Final = (0.001, 0.02)
"""Seconds between two looks at the count, at first and later: a reader that is ahead of the network has time."""


def beside(blob: Path) -> Path:
    """The file that tells of ``blob``."""
    return blob.with_name(blob.name + SUFFIX)


def announce(blob: Path) -> None:
    """Make both files, which must not be there yet. Raises OSError."""
    for path, size in ((blob, 0), (beside(blob), SIZE)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


def forget(blob: Path) -> None:
    """Delete both files; what is not there is success. Raises OSError."""
    for path in (beside(blob), blob):
        path.unlink(missing_ok=True)


def is_written(blob: Path) -> bool:
    """Whether some process holds the writer's lock now; False too where the files are gone."""
    try:
        descriptor = os.open(beside(blob), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)  # and the lock with it


def progress(blob: Path) -> tuple[int, int]:
    """Bytes that are there, and the state; `FAILED` where the files are gone."""
    try:
        content = beside(blob).read_bytes()
    except OSError:
        return 0, FAILED
    return int.from_bytes(content[:8], sys.byteorder), content[8] if len(content) == SIZE else FAILED


def writers(blob: Path) -> int:
    """How many writers there have been, modulo 256: what tells a writer that died from one that is still to come."""
    try:
        content = beside(blob).read_bytes()
    except OSError:
        return 0
    return content[9] if len(content) == SIZE else 0


class _Count:
    """The mapped file beside a blob."""

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        if os.fstat(descriptor).st_size != SIZE:
            raise InvalidInput(f"a file beside a blob has {SIZE} bytes")
        self._map = mmap.mmap(descriptor, SIZE, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._words = memoryview(self._map).cast("Q")  # stored at once: a reader sees the old count or the new one

    @property
    def arrived(self) -> int:
        return self._words[0]

    @arrived.setter
    def arrived(self, count: int) -> None:
        self._words[0] = count

    @property
    def state(self) -> int:
        return self._map[8]

    @state.setter
    def state(self, state: int) -> None:
        self._map[8] = state

    def add_writer(self) -> None:
        self._map[9] = (self._map[9] + 1) % 256

    def close(self) -> None:
        self._words.release()
        self._map.close()


class ArrivingWriter:
    """Fills an announced blob. One at a time: see `claim`. Methods block on the disk and raise OSError."""

    def __init__(self, blob: Path, lock: int) -> None:
        self._lock = lock
        self._count = _Count(lock, writable=True)
        try:
            self._blob = os.open(blob, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except BaseException:
            self._count.close()
            raise
        if not stat.S_ISREG(os.fstat(self._blob).st_mode):
            self._count.close()
            os.close(self._blob)
            raise InvalidInput(f"{blob} is no file")
        self._count.add_writer()

    @classmethod
    def claim(cls, blob: Path) -> ArrivingWriter | None:
        """The writer of ``blob``, or None where another one is at it.

        What an earlier writer left is still there, and counted. Raises `FailedPrecondition` where the blob was not
        announced, or is not wanted any more.
        """
        try:
            lock = os.open(beside(blob), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FailedPrecondition(f"nobody waits for a blob in {blob}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(blob, lock)
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError as error:
            os.close(lock)
            raise FailedPrecondition(f"nobody waits for a blob in {blob} any more") from error
        except BaseException:
            os.close(lock)
            raise

    @property
    def arrived(self) -> int:
        """Bytes that are there, from the first on."""
        return self._count.arrived

    @property
    def state(self) -> int:
        """`COMING`, `COMPLETE` or `FAILED`."""
        return self._count.state

    @property
    def wanted(self) -> bool:
        """Whether the file still has its name."""
        return os.fstat(self._blob).st_nlink > 0

    def write(self, offset: int, content: bytes) -> None:
        """Put bytes where they belong, in any order; nobody is told."""
        view = memoryview(content)
        while view:
            count = os.pwrite(self._blob, view, offset)
            offset += count
            view = view[count:]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Bytes that are there, for their digest; how many."""
        return os.preadv(self._blob, [buffer], offset)

    def advance(self, to: int) -> None:
        """Tell readers that all bytes before ``to`` are there. It never goes back."""
        self._count.arrived = max(self._count.arrived, to)

    def finish(self, state: int) -> None:
        """Say how it ended: `COMPLETE`, once all bytes are there and have the blob's digest, or `FAILED`."""
        self._count.state = state

    def close(self) -> None:
        """Let go of it. While it is still coming, another writer may go on."""
        self._count.close()
        os.close(self._blob)
        os.close(self._lock)


class ArrivingReader:
    """A file-like reader that stays behind the writer.

    ``stopped`` is asked at each look at the count; once it is true, reading ends with an error.
    """

    def __init__(self, blob: Path, *, stopped: Callable[[], bool], stall: float = STALL_SECONDS) -> None:
        """Raises OSError where the blob was not announced."""
        self._stopped = stopped
        self._stall = stall
        self._offset = 0
        descriptor = os.open(beside(blob), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._count = _Count(descriptor, writable=False)
        finally:
            os.close(descriptor)
        try:
            self._blob = os.open(blob, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except BaseException:
            self._count.close()
            raise

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, waiting for the first of them; none at the end of a blob that is complete.

        Raises `Unavailable` where the blob failed, or where nothing came for ``stall`` seconds.
        """
        there = self._wait()
        content = os.pread(self._blob, min(size, there), self._offset) if there else b""
        if there and not content:
            raise InvalidInput("a blob is shorter than the count beside it says")
        self._offset += len(content)
        return content

    def _wait(self) -> int:
        """How many bytes there are to read now; 0 at the end."""
        ends = time.monotonic() + self._stall
        pause = POLLS[0]
        while True:
            state = self._count.state  # before the count: what a complete blob counts is all of it
            there = self._count.arrived - self._offset
            if state == FAILED:
                raise Unavailable("the blob did not come: see what its fetcher says")
            if there > 0 or state == COMPLETE:
                return there
            if self._stopped():
                raise SociError("the reading was given up")
            if time.monotonic() > ends:
                raise Unavailable(f"nothing of the blob came for {self._stall:g} s")
            time.sleep(pause)
            pause = min(2 * pause, POLLS[1])

    def close(self) -> None:
        """Let go of it."""
        self._count.close()
        os.close(self._blob)
