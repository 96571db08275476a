# SPDX-License-Identifier: Apache-2.0
"""The other process of `soci_snapshotter.unpacker`: unpacks one layer after the other, each while its blob comes.

Its frames (`soci_runtime.workers`), all JSON. To the worker: ``U``, what to unpack. From it: ``R``, the result, or
``X``, an error of `soci.errors`. When the socket is closed the worker gives up what it is at and ends.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from soci.digest import Digest
from soci.errors import SociError
from soci_cache.arriving import ArrivingReader
from soci_runtime.workers import FRAME, receive, run_worker, send, told
from soci_snapshotter.directories import error_of
from soci_snapshotter.settle import Implied
from soci_snapshotter.unpack import unpack_stream
from soci_snapshotter.usage import disk_usage

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
    head = bytearray(FRAME.size)
    while receive(link, memoryview(head)):
        _, length = FRAME.unpack(head)
        content = bytearray(min(length, WISH_BYTES))
        if length > WISH_BYTES or not receive(link, memoryview(content)):
            return
        wish: dict[str, Any] = json.loads(content)
        try:
            # nothing is sent to a worker that is at work: what can be read now is the end
            kind, answer = b"R", encode_result(unpack_arriving(Wish(**wish), lambda: bool(closed.poll(0))))
        except SociError as error:
            kind, answer = b"X", told(error)
        send(link, kind, answer)


def main() -> None:
    """The process: see `soci_runtime.workers.run_worker`."""
    os.umask(0)  # files get their mode as they are made; what they are made in is for root alone
    run_worker(_run)
