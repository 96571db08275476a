# SPDX-License-Identifier: Apache-2.0
"""Claims on spans under way, seen by all processes of the node: open-file-description locks (fcntl(2)).

A claim on a span is a lock on the byte of its mark in the layer's presence map. Nothing is written, and the kernel lets
go of the claims of a process that ends, however it ends. A claim only saves work: what a span's bytes are is decided by
its digest alone, and two processes may fill it at the same time.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from soci.errors import Unavailable
from soci_cache.locks import byte_lock, is_locked, lock_byte
from soci_cache.presence import HEADER


class Locks:
    """Locks on single bytes of one file, for as long as this is open."""

    def __init__(self, file: Path, *, create: bool = False) -> None:
        """Raises `Unavailable` where the file cannot be opened."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self._file = os.open(file, flags, 0o600)
        except OSError as error:
            raise Unavailable(f"{file}: {error}") from error

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file

    def take(self, byte: int, *, shared: bool = False) -> bool:
        """Lock the byte; False where another process (or another `Locks`) has it.

        Where the file system knows no such locks, it is ours: a span fetched twice is better than none.
        """
        try:
            return lock_byte(self._file, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte)
        except OSError:
            return True

    def free(self, byte: int) -> None:
        """Let go of it; after `close` it is free already."""
        if self._file >= 0:
            with suppress(OSError):
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, byte_lock(fcntl.F_UNLCK, byte))

    def held_elsewhere(self, byte: int) -> bool:
        """Whether another has the byte, in whatever way; nothing is locked."""
        try:
            found = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, byte_lock(fcntl.F_WRLCK, byte))
        except OSError:
            return False
        return is_locked(found)

    def close(self) -> None:
        """Let go of all; closing twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Claims:
    """Claims on the spans of one layer."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is the layer's in the span cache. Raises `Unavailable` where it is gone."""
        self._locks = Locks(directory / "spans")

    def take(self, span: int) -> bool:
        """Claim a span; False where another has it."""
        return self._locks.take(HEADER + span)

    def free(self, span: int) -> None:
        """Let go of it: it is here, or others may try."""
        self._locks.free(HEADER + span)

    def close(self) -> None:
        """Let go of all."""
        self._locks.close()
