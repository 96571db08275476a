# SPDX-License-Identifier: Apache-2.0
"""The other process of `soci_indexing.pool`: builds one zTOC after the other from what comes through a socket.

Frames either way: a letter, the length of what follows (8 bytes, big endian), and that. To the worker: ``B`` begins a
layer (JSON), ``C`` is a piece of its blob, ``E`` is its end. From it: ``R``, the result (JSON, a line feed, the zTOC),
or ``X``, an error of `soci.errors` (JSON), after which the rest of that layer is passed over.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import sys
from typing import Any, Final

from soci.build import Built, ZtocBuilder
from soci.errors import SociError

FRAME: Final = struct.Struct("!cQ")
MAX_PIECE_BYTES: Final = 1 << 20
"""Bytes of one frame to the worker: what bounds its memory."""


def encode_result(built: Built) -> bytes:
    """A result frame's content, for `soci_indexing.pool` to read."""
    facts = {"layer": built.layer, "layer_size": built.layer_size, "diff_id": built.diff_id}
    return json.dumps(facts).encode() + b"\n" + built.ztoc_bytes


class Worker:
    """One end of the socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._builder: ZtocBuilder | None = None
        self._room = bytearray(MAX_PIECE_BYTES)

    def run(self) -> None:
        """Work until the other end is closed."""
        head = bytearray(FRAME.size)
        while self._receive(memoryview(head)):
            kind, length = FRAME.unpack(head)
            content = memoryview(self._room)[:length]
            if length > MAX_PIECE_BYTES or not self._receive(content):
                return
            try:
                self._take(kind, content)
            except SociError as error:
                self._builder = None
                self._send(b"X", json.dumps({"code": error.code, "message": str(error)}).encode())

    def _take(self, kind: bytes, content: memoryview) -> None:
        if kind == b"B":
            wish: dict[str, Any] = json.loads(bytes(content))
            self._builder = ZtocBuilder(wish["algorithm"], wish["span_size"], wish["build_tool"])
        elif self._builder is not None and kind == b"C":
            self._builder.feed(content)
        elif self._builder is not None:
            built = self._builder.finish()
            self._builder = None
            self._send(b"R", encode_result(built))

    def _receive(self, into: memoryview) -> bool:
        """Fill ``into``; False where the other end is gone."""
        got = 0
        while got < len(into):
            count = self._link.recv_into(into[got:])
            if not count:
                return False
            got += count
        return True

    def _send(self, kind: bytes, content: bytes) -> None:
        self._link.sendall(FRAME.pack(kind, len(content)))
        self._link.sendall(content)


def main() -> None:
    """The process: the first argument is the socket's file descriptor."""
    # Ctrl-C, and a service manager's stop, reach us too; our parent ends the job first, then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as link:
        try:
            Worker(link).run()
        except (BrokenPipeError, ConnectionResetError):
            return  # nobody waits for the result any more
