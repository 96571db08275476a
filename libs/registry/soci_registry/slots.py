# SPDX-License-Identifier: Apache-2.0
"""The slots of one host: of this process alone, or shared by all processes of the node through a small file.

The file holds one number, when the host may be asked again (nanoseconds of ``CLOCK_BOOTTIME``, which goes on while the
machine sleeps; the folder is named after the boot, so that no other boot's number is read). Everything else are locks
on bytes beyond its end, owned by the open file (``F_OFD_SETLK``) and freed by the kernel however a process ends:

    1 K + slot      held by who has the slot
    1 M + number    held by a process in which an urgent request waits for one
    1 M + 1 K + …   by one in which another request does

There is no wait in here, no lease and no network. Who finds no slot looks again (`gates`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Protocol

from soci_registry.budget import Budget, pause_left
from soci_registry.health import Tell, silent
from soci_registry.urls import Origin

SLOT_AT = 1 << 10
WAIT_AT = {True: 1 << 20, False: (1 << 20) + (1 << 10)}
WAITING_MAX = 64
"""Processes of a node that can be seen to wait at one host; further ones wait unseen, and get less than their part."""

FILES_MAX = 1 << 16
"""Files of a node. Hosts whose names share a number share a budget: redirects to ever new hosts fill no disk."""

_LOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Slots(Protocol):
    """One host's slots as this process sees them."""

    looks: bool
    """Whether a slot can become free without this process knowing, so that who waits has to look."""

    def take(self, *, urgent: bool) -> int | None:
        """A slot, or None where none is free for such a request."""

    def give(self, slot: int) -> None:
        """Give a slot back."""

    def wait(self, *, urgent: bool, waiting: bool) -> None:
        """Some request of this process waits for a slot now, or none does any more."""

    def paused(self) -> float:
        """Seconds until the host may be asked again."""

    def pause(self, seconds: float) -> None:
        """Let nobody ask the host for so long from now."""

    def close(self) -> None:
        """Nothing is held any more."""


class OwnSlots:
    """Slots of this process alone."""

    looks = False

    def __init__(self, budget: Budget, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._budget = budget
        self._clock = clock
        self._held: set[int] = set()
        self._opens = 0

    def take(self, *, urgent: bool) -> int | None:
        """See `Slots`."""
        for slot in self._budget.open_to(urgent=urgent):
            if slot not in self._held:
                self._held.add(slot)
                return slot
        return None

    def give(self, slot: int) -> None:
        """See `Slots`."""
        self._held.discard(slot)

    def wait(self, *, urgent: bool, waiting: bool) -> None:
        """Nobody else needs to know."""

    def paused(self) -> float:
        """See `Slots`."""
        return pause_left(self._opens, self._clock())

    def pause(self, seconds: float) -> None:
        """See `Slots`."""
        self._opens = max(self._opens, self._clock() + int(seconds * 1e9))

    def close(self) -> None:
        """Nothing is open."""


class NodeSlots:
    """Slots that all processes of the node share through the file ``path``, which is made where it is not there.

    Raises OSError from the constructor alone: later trouble with the file costs the common pause, not the request.
    """

    looks = True

    def __init__(self, budget: Budget, path: Path, pause_max: float) -> None:
        self._budget = budget
        self._pause_max = pause_max
        self._held: dict[int, bool] = {}  # slot → whether it was taken for an urgent request
        self._marks: dict[bool, int] = {}
        self._own = OwnSlots(budget, _now)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def take(self, *, urgent: bool) -> int | None:
        """See `Slots`."""
        held = sum(1 for kind in self._held.values() if kind == urgent)
        if held and not self._budget.may_take(held, self._others(urgent=urgent), urgent=urgent):
            return None
        for slot in self._budget.open_to(urgent=urgent):
            if slot not in self._held and self._lock(SLOT_AT + slot):
                self._held[slot] = urgent
                return slot
        return None

    def give(self, slot: int) -> None:
        """See `Slots`."""
        if self._held.pop(slot, None) is not None:
            self._unlock(SLOT_AT + slot)

    def wait(self, *, urgent: bool, waiting: bool) -> None:
        """See `Slots`."""
        if not waiting:
            mark = self._marks.pop(urgent, None)
            if mark is not None:
                self._unlock(mark)
        elif urgent not in self._marks:
            first = WAIT_AT[urgent]
            mark = next((at for at in range(first, first + WAITING_MAX) if self._lock(at)), None)
            if mark is not None:
                self._marks[urgent] = mark

    def paused(self) -> float:
        """See `Slots`."""
        common = 0
        with suppress(OSError):
            common = int.from_bytes(os.pread(self._file, 8, 0), "little")
        return max(self._own.paused(), pause_left(common, _now(), self._pause_max))

    def pause(self, seconds: float) -> None:
        """See `Slots`. Of two processes that write at the same moment each keeps to its own pause at least."""
        self._own.pause(seconds)
        end = _now() + int(seconds * 1e9)
        with suppress(OSError):  # a full disk: then the others find out for themselves
            if self.paused() <= seconds:
                os.pwrite(self._file, end.to_bytes(8, "little"), 0)

    def close(self) -> None:
        """See `Slots`: the kernel frees all locks with the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._held.clear()
            self._marks.clear()

    def _others(self, *, urgent: bool) -> int:
        """How many other processes have somebody waiting who goes before or beside such a request."""
        rows = (WAIT_AT[True],) if urgent else WAIT_AT.values()
        return sum(self._count(first, first + WAITING_MAX) for first in rows)

    def _count(self, first: int, end: int) -> int:
        """How many locks of others there are on bytes [first, end)."""
        if first >= end:
            return 0
        wanted = struct.pack(_LOCK, fcntl.F_WRLCK, os.SEEK_SET, first, end - first, 0)
        try:
            answer = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, wanted)
        except OSError:
            return 0
        kind, _, start, length, _ = struct.unpack(_LOCK, answer)
        if kind == fcntl.F_UNLCK:
            return 0
        # The kernel names some lock that is in the way, not the first one.
        return 1 + self._count(first, start) + self._count(start + max(1, length), end)

    def _lock(self, at: int) -> bool:
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_LOCK, fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise
        return True

    def _unlock(self, at: int) -> None:
        with suppress(OSError):
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_LOCK, fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SlotBook:
    """Makes the slots of hosts: in ``folder`` for the whole node, or (None) of this process.

    Where the folder cannot be used, that is told once, and this process keeps a budget of its own for the host.
    """

    def __init__(self, budget: Budget, folder: Path | None, *, pause_max: float, tell: Tell = silent) -> None:
        self._budget = budget
        self._folder = folder
        self._pause_max = pause_max
        self._tell = tell
        self._place: Path | None = None
        self._told = False

    def of(self, origin: Origin) -> Slots:
        """The slots of a host; close them."""
        if self._folder is None:
            return OwnSlots(self._budget)
        try:
            if self._place is None:
                self._place = _prepare(self._folder)
            return NodeSlots(self._budget, self._place / file_name(origin), self._pause_max)
        except OSError as error:
            if not self._told:
                self._tell("no common budget for registries", folder=str(self._folder), why=str(error.strerror))
                self._told = True
            return OwnSlots(self._budget)


def file_name(origin: Origin) -> str:
    """The file of a host."""
    name = f"{origin.scheme}://{origin.host}:{origin.port}"
    return f"{int(hashlib.sha256(name.encode()).hexdigest(), 16) % FILES_MAX:04x}"


def _prepare(folder: Path) -> Path:
    """The folder of this boot, made; those of other boots are removed."""
    place = folder / _BOOT_ID.read_text("ascii").strip()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other != place:
            rmtree(other, ignore_errors=True)
    return place
