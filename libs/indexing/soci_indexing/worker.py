# SPDX-License-Identifier: Apache-2.0
"""The other process of `soci_indexing.pool`: builds one zTOC after the other from what comes through a socket.

Its frames (`soci_runtime.workers`). To the worker: ``B`` begins a layer (JSON), ``C`` is a piece of its blob, ``E`` is
its end. From it: ``R``, the result (JSON, a line feed, the zTOC), or ``X``, an error of `soci.errors` (JSON), after
which the rest of that layer is passed over.
"""

from __future__ import annotations

import json
import socket
from typing import Any, Final

from soci.build import Built, ZtocBuilder
from soci.errors import SociError
from soci_runtime.workers import FRAME, receive, run_worker, send, told

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
        while receive(self._link, memoryview(head)):
            kind, length = FRAME.unpack(head)
            content = memoryview(self._room)[:length]
            if length > MAX_PIECE_BYTES or not receive(self._link, content):
                return
            try:
                self._take(kind, content)
            except SociError as error:
                self._builder = None
                send(self._link, b"X", told(error))

    def _take(self, kind: bytes, content: memoryview) -> None:
        if kind == b"B":
            wish: dict[str, Any] = json.loads(bytes(content))
            self._builder = ZtocBuilder(wish["algorithm"], wish["span_size"], wish["build_tool"])
        elif self._builder is not None and kind == b"C":
            self._builder.feed(content)
        elif self._builder is not None:
            built = self._builder.finish()
            self._builder = None
            send(self._link, b"R", encode_result(built))


def main() -> None:
    """The process: see `soci_runtime.workers.run_worker`."""
    run_worker(lambda link: Worker(link).run())
