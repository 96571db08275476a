# SPDX-License-Identifier: Apache-2.0
"""The part of the FUSE protocol that a server of a few large read-only files needs: bytes to values and back. Pure.

pyfuse3 can neither take over a connection from a process that died nor have the kernel send again what that one left
unanswered, so `soci_mounter.device` speaks to ``/dev/fuse`` itself. Formats: include/uapi/linux/fuse.h, protocol 7.40.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from typing import Final

from soci.errors import FailedPrecondition, InvalidInput

MAJOR, MINOR = 7, 40
"""7.40 came with Linux 6.9, and FUSE_NOTIFY_RESEND with it."""
MAX_READ: Final = 1 << 20
"""Bytes of one read."""
MAX_WRITE: Final = 4096
REQUEST_BYTES: Final = 1 << 14
"""Bytes of the buffer for one request: the kernel wants 8 KiB, or room for the longest write; nobody writes."""
BACKGROUND: Final = 512
"""Reads that the kernel keeps with us at once beyond those that somebody waits for."""
ROOT: Final = 1
FOREVER: Final = 1 << 40
"""Seconds."""

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH = 1, 2, 3, 14, 15, 17, 18, 25
INIT, INTERRUPT, DESTROY, BATCH_FORGET = 26, 36, 38, 42
SILENT: Final = frozenset({FORGET, INTERRUPT, BATCH_FORGET})
"""Requests that get no answer."""

_IN: Final = struct.Struct("<IIQQIIIHH")
_OUT: Final = struct.Struct("<IiQ")
_ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY: Final = struct.Struct("<QQQQII")
_ATTR_OUT: Final = struct.Struct("<QII")
_OPEN_OUT: Final = struct.Struct("<QIi")
_READ_IN: Final = struct.Struct("<QQI")
_INIT_IN: Final = struct.Struct("<IIIII")
_INIT_OUT: Final = struct.Struct("<IIIIHHIIHHIIH22x")
_STATFS: Final = struct.Struct("<QQQQQIIII24x")
_ASYNC_READ, _MAX_PAGES, _INIT_EXT = 1 << 0, 1 << 22, 1 << 30
_HAS_RESEND: Final = 1 << 7  # of the second word: bit 39
_DIRECT_IO: Final = 1 << 0
_NOTIFY_RESEND: Final = 7
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """One question of the kernel. ``body`` is what follows the header."""

    opcode: int
    unique: int
    node: int
    body: bytes


def parse_request(data: bytes) -> Request:
    """A request as read(2) gave it; `InvalidInput` for what the kernel does not send."""
    if len(data) < _IN.size:
        raise InvalidInput(f"a FUSE request of {len(data)} bytes")
    length, opcode, unique, node, *_ = _IN.unpack_from(data)
    if length != len(data):
        raise InvalidInput(f"a FUSE request of {length} bytes came as {len(data)}")
    return Request(opcode, unique, node, data[_IN.size :])


def reply(unique: int, content: bytes = b"") -> tuple[bytes, bytes]:
    """An answer, in the two pieces that go to writev(2)."""
    return _OUT.pack(_OUT.size + len(content), 0, unique), content


def failure(unique: int, number: int) -> tuple[bytes, bytes]:
    """An answer that is an errno."""
    return _OUT.pack(_OUT.size, -number, unique), b""


def resend() -> bytes:
    """The notice on which the kernel sends again all that was read and not answered."""
    return _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0)


def init(request: Request) -> bytes:
    """The answer to INIT; `FailedPrecondition` where the kernel cannot send requests again."""
    if len(request.body) < _INIT_IN.size:
        raise FailedPrecondition("the kernel's FUSE is too old: before 7.36")
    major, minor, ahead, flags, more = _INIT_IN.unpack_from(request.body)
    if (major, minor) < (MAJOR, MINOR) or not flags & _INIT_EXT or not more & _HAS_RESEND:
        raise FailedPrecondition(
            f"the kernel's FUSE {major}.{minor} cannot send requests again (FUSE_NOTIFY_RESEND: Linux 6.9)"
        )
    taken = (_ASYNC_READ | _MAX_PAGES | _INIT_EXT) & flags
    return _INIT_OUT.pack(
        MAJOR, MINOR, min(ahead, MAX_READ), taken, BACKGROUND, BACKGROUND * 3 // 4, MAX_WRITE, 1, MAX_READ // _PAGE, 0,
        _HAS_RESEND, 0, 0,
    )  # fmt: skip


def attributes(node: int, size: int) -> bytes:
    """What the kernel calls fuse_attr: the root's for `ROOT`, else a file's of ``size`` bytes that only root reads."""
    mode = stat.S_IFDIR | 0o500 if node == ROOT else stat.S_IFREG | 0o400
    return _ATTR.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _PAGE, 0)


def entry(node: int, size: int) -> bytes:
    """The answer to LOOKUP, good for ever."""
    return _ENTRY.pack(node, 0, FOREVER, FOREVER, 0, 0) + attributes(node, size)


def attribute_answer(node: int, size: int) -> bytes:
    """The answer to GETATTR, good for ever."""
    return _ATTR_OUT.pack(FOREVER, 0, 0) + attributes(node, size)


def opened() -> bytes:
    """The answer to OPEN: no handle, and no second page cache below the one of the file system above."""
    return _OPEN_OUT.pack(0, _DIRECT_IO, 0)


def read_range(request: Request) -> tuple[int, int]:
    """Offset and length that READ asks for; `InvalidInput` for impossible ones."""
    if len(request.body) < _READ_IN.size:
        raise InvalidInput("a FUSE read without a range")
    _, offset, length = _READ_IN.unpack_from(request.body)
    if length > MAX_READ or offset >= 1 << 63:
        raise InvalidInput(f"a FUSE read of {length} bytes at {offset}")
    return offset, length


def statfs() -> bytes:
    """What the kernel calls fuse_kstatfs, of a file system that has no room."""
    return _STATFS.pack(0, 0, 0, 0, 0, _PAGE, 255, _PAGE, 0)
