# SPDX-License-Identifier: Apache-2.0
"""Values of every message class, and a NATS server that a test may kill and start again."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from soci.digest import Digest
from soci.errors import SociError
from soci.launch import LaunchId
from soci_bus import asks, events, notices
from soci_bus.asks import Ask
from soci_dev.processes import Daemon, free_port
from soci_dev.tools import find

LIMIT = 30.0
"""Seconds for any condition that a test waits for."""
START_LIMIT_S = 20.0

D1 = Digest("sha256:" + "1" * 64)
D2 = Digest("sha256:" + "2" * 64)
LAUNCH = LaunchId("ab" * 16)

ASKS: list[type[Ask[Any]]] = [
    cls for cls in vars(asks).values() if isinstance(cls, type) and issubclass(cls, Ask) and cls is not Ask
]
ANSWERS: list[type[Any]] = sorted({cls.answer for cls in ASKS}, key=lambda cls: cls.__name__)
MESSAGES: list[type[Any]] = [*ASKS, *ANSWERS, asks.IndexedLayer, *events.ALL, *notices.ALL]

_HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
_BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    str: _TEXT,
    int: st.integers(-(1 << 63), (1 << 64) - 1),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    type(None): st.none(),
    Digest: _HEX.map("sha256:{}".format) | st.tuples(_HEX, _HEX).map(lambda pair: "sha512:" + "".join(pair)),
    LaunchId: st.text("0123456789abcdef", min_size=32, max_size=32).filter(lambda text: text.strip("0") != ""),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a message class or of the type of one of its fields."""
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})
    inside = get_args(kind)
    if get_origin(kind) is tuple and inside[-1] is Ellipsis:
        return st.lists(values(inside[0]), max_size=4).map(tuple)
    if get_origin(kind) is tuple:
        return st.tuples(*map(values, inside))
    return st.one_of(*map(values, inside))  # a union


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until ``condition()`` holds, `LIMIT` seconds at most."""
    try:
        async with asyncio.timeout(LIMIT):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"within {LIMIT:g} s it did not come to: {what}") from None


async def failing(work: Awaitable[Any]) -> SociError | None:
    """The error of ours that ``work`` ends with."""
    try:
        await work
    except SociError as error:
        return error
    return None


class NatsServer:
    """nats-server on a port of its own, with its storage below ``folder``."""

    def __init__(self, folder: Path, *, jetstream: bool = True) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._flags = ["-js", "-sd", str(folder / "storage")] if jetstream else []
        self._daemon: Daemon | None = None

    def start(self) -> None:
        """Start it, and wait until it greets."""
        words: list[str | Path] = [find("nats-server"), "-a", "127.0.0.1", "-p", str(self.port), *self._flags]
        self._daemon = Daemon("nats", words, self.folder / "nats.log", os.environ, self.folder)
        self._daemon.wait(self._greets, "answering", START_LIMIT_S)

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as link:
                return b"INFO" in link.recv(4096)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL."""
        if self._daemon:
            self._daemon.kill()
            self._daemon = None
