# SPDX-License-Identifier: Apache-2.0
"""The other process of `soci_snapshotter.unpacker`: unpacks one layer after the other, each while its blob comes.

Frames either way: a letter, the length of what follows (8 bytes, big endian), and that, JSON. To the worker: ``U``,
what to unpack. From it: ``R``, the result, or ``X``, an error of `soci.errors`. When the socket is closed the worker
gives up what it is at and ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from soci.digest import Digest
from soci.errors import SociError
from soci_cache.arriving import ArrivingReader
from soci_snapshotter.directories import error_of
from soci_snapshotter.settle import Implied
from soci_snapshotter.unpack import unpack_stream
from soci_snapshotter.usage import disk_usage

FRAME: Final = struct.Struct("!cQ")
WISH_BYTES: Final = 1 << 16
"""Bytes of what a worker is told."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A blob that was announced (`soci_cache.arriving`), and the empty directory that it is to be unpacked into."""

    blob: str
    target: str
    media_type: str
    diff_id: str


@dataclass(frozen=True, slots=True)
class Result:
    """A layer in its directory: what it takes (bytes and inodes), whether it lists the root directory, and which
    directories it implies, whose attributes are still to be settled. Nothing of it need be on disk yet.
    """

    size: int
    inodes: int
    root_listed: bool
    implied: tuple[Implied, ...]


def unpack_arriving(wish: Wish, stopped: Callable[[], bool]) -> Result:
    """Unpack while the blob comes. Raises `SociError`; else blob and layer have proved to be the right ones."""
    target = Path(wish.target)
    try:
        with closing(ArrivingReader(Path(wish.blob), stopped=stopped)) as blob:
            done = unpack_stream(
                blob, target, media_type=wish.media_type, diff_id=Digest(wish.diff_id), stopped=stopped
            )
    except OSError as error:
        raise error_of(error, "the layer does not unpack") from error
    size, inodes = disk_usage(target)
    return Result(size, inodes, done.root_listed, tuple(done.implied))


def encode_result(result: Result) -> bytes:
    """A result frame's content."""
    implied = [(b"/".join(one.parts).decode("latin-1"), one.listed) for one in result.implied]
    facts = {"size": result.size, "inodes": result.inodes, "root_listed": result.root_listed, "implied": implied}
    return json.dumps(facts, ensure_ascii=False).encode()


def decode_result(content: bytes) -> Result:
    """What `encode_result` made."""
    facts = json.loads(content)
    implied = (Implied(tuple(name.encode("latin-1").split(b"/")), listed=listed) for name, listed in facts["implied"])
    return Result(facts["size"], facts["inodes"], facts["root_listed"], tuple(implied))


def _run(link: socket.socket) -> None:
    closed = select.poll()
    closed.register(link, select.POLLIN | select.POLLRDHUP)
    while head := _receive(link, FRAME.size):
        _, length = FRAME.unpack(head)
        content = _receive(link, length) if length <= WISH_BYTES else b""
        if not content:
            return
        wish: dict[str, Any] = json.loads(content)
        try:
            # nothing is sent to a worker that is at work: what can be read now is the end
            kind, answer = b"R", encode_result(unpack_arriving(Wish(**wish), lambda: bool(closed.poll(0))))
        except SociError as error:
            kind, answer = b"X", json.dumps({"code": error.code, "message": str(error)}).encode()
        link.sendall(FRAME.pack(kind, len(answer)) + answer)


def _receive(link: socket.socket, length: int) -> bytes:
    """So many bytes; none where the other end is gone."""
    content = b""
    while len(content) < length:
        piece = link.recv(length - len(content))
        if not piece:
            return b""
        content += piece
    return content


def main() -> None:
    """The process: the first argument is the socket's file descriptor."""
    # Ctrl-C, and a service manager's stop, reach us too; our parent ends the job first, then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0)  # files get their mode as they are made; what they are made in is for root alone
    with socket.socket(fileno=int(sys.argv[1])) as link:
        try:
            _run(link)
        except (BrokenPipeError, ConnectionResetError):
            return  # nobody waits for the result any more
