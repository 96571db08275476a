# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 connection: the event loop writes an answer's body straight to where it belongs.

The states follow one another: *idle* (kept open; a byte now is a lie, and ends the connection), *head* (bytes gather in
our own buffer until the empty line), *held* (the head is there, reading pauses until somebody wants the body), *sink*
(bytes go into the memory that was given). Full, the sink leaves the connection idle.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import cast

from soci_registry.failure import Kind, TryError
from soci_registry.http1 import HEAD_BYTES_MAX, INTERIM_MAX, Head, parse_head
from soci_registry.pace import Pace
from soci_registry.wire import describe

SWITCHING = 101
LEAST_ANSWER = 200


class State(Enum):
    """What the next byte is taken for."""

    IDLE = "idle"
    HEAD = "head"
    HELD = "held"
    SINK = "sink"


class Connection(asyncio.BufferedProtocol):
    """Made by the loop. One exchange at a time; all errors are `TryError`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._state = State.IDLE
        self._own = bytearray(HEAD_BYTES_MAX)
        self._filled = 0  # of our own buffer, in state HEAD
        self._interim = 0
        self._sink = memoryview(b"")
        self._at = 0  # of the sink
        self._any = False  # wake at the first byte, not at the last
        self._head: Head | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pace: Pace | None = None
        self._failure: TryError | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.heard = False
        """Some byte of the answer to the last request has come."""

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._failure is None and self._state is State.IDLE and not self.closed.done()

    # --- what a request does

    async def ask(self, request: bytes, pace: Pace) -> tuple[Head, bytes]:
        """Send a request; the head of its answer, and what of the body has come with it."""
        self._begin(pace)
        if self._transport is not None and self._failure is None:
            self._transport.write(request)
        await self._wait()
        if self._head is None:  # for the type checker: no wait ends well without it
            raise TryError(Kind.SHORT, "no answer")
        pace.body()
        return self._head, bytes(memoryview(self._own)[: self._filled])

    def _begin(self, pace: Pace) -> None:
        self._pace, self._state, self._head = pace, State.HEAD, None
        self._filled = self._interim = 0
        self.heard = False

    async def receive(self, sink: memoryview, *, some: bool = False) -> int:
        """Body bytes into ``sink``, all of it, or (``some``) at least one; 0 where the connection has ended.

        Where it fails, `received` says how many have come.
        """
        self._sink, self._at, self._any = sink, 0, some
        self._state = State.SINK
        if self._transport is not None and self._failure is None:
            self._transport.resume_reading()
        try:
            await self._wait()
        finally:
            self._sink = memoryview(b"")  # whoever gave the memory has it for himself again
            if self._state is State.SINK:
                self._state = State.HELD
        return self._at

    @property
    def received(self) -> int:
        """Bytes that the last `receive` has got."""
        return self._at

    def rest(self) -> None:
        """The body has come to its end: from now on a byte is one too many."""
        self._state = State.IDLE
        self._pace = None
        if self._transport is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once."""
        self._fail(TryError(Kind.SHORT, "given up"))

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._pace is None:
            raise RuntimeError("nothing was asked")
        now = self._loop.time()
        self._pace.wait(now)
        self._waiter = self._loop.create_future()
        self._look()
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._pace.rest(self._loop.time())

    def _look(self) -> None:
        if self._pace is None:
            return
        found = self._pace.look(self._loop.time())
        if isinstance(found, str):
            self._fail(TryError(Kind.STALL, found))
        else:
            self._timer = self._loop.call_at(found, self._look)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: TryError) -> None:
        if self._failure is None:
            self._failure = failure
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._failure)
        if self._transport is not None:
            self._transport.abort()

    # --- what the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  the size is ours to choose
        """Where the next bytes go: never an empty place."""
        if self._state is State.SINK:
            return self._sink[self._at :]
        if self._state is State.HEAD:
            return memoryview(self._own)[self._filled :]
        return memoryview(self._own)

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes have come into that place."""
        if self._failure is not None:
            return
        self.heard = True
        if self._state is State.SINK:
            self._at += nbytes
            if self._pace is not None:
                self._pace.came(nbytes, self._loop.time())
            if self._any:
                self._hold()
                self._wake()
            elif self._at == len(self._sink):
                self._state = State.IDLE
                self._wake()
        elif self._state is State.HEAD:
            self._filled += nbytes
            try:
                self._read_head(nbytes)
            except TryError as error:
                self._fail(error)
        else:
            self._fail(TryError(Kind.BAD_ANSWER, "not HTTP: bytes that nobody asked for"))

    def eof_received(self) -> None:
        """The loop closes the connection then."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from either side."""
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)
        if self._state is State.SINK and self._any and exc is None and self._failure is None:
            self._at = 0  # whether a body may end so, its framing says
            self._wake()
            self._failure = TryError(Kind.SHORT, "the connection has ended")
            return
        reason = f" ({describe(exc)})" if exc else ""
        self._fail(TryError(Kind.SHORT, f"the connection broke{reason}"))

    def _hold(self) -> None:
        self._state = State.HELD
        if self._transport is not None:
            self._transport.pause_reading()

    def _read_head(self, nbytes: int) -> None:
        start = max(0, self._filled - nbytes - 3)
        while (end := self._own.find(b"\r\n\r\n", start, self._filled)) >= 0:
            head = parse_head(bytes(memoryview(self._own)[:end]))
            # What follows moves to the front: the next head, or the body's beginning.
            self._own[: self._filled - end - 4] = self._own[end + 4 : self._filled]
            self._filled -= end + 4
            start = 0
            if head.status >= LEAST_ANSWER:
                self._head = head
                self._hold()
                self._wake()
                return
            self._interim += 1
            if head.status == SWITCHING or self._interim > INTERIM_MAX:
                raise TryError(Kind.BAD_ANSWER, f"not HTTP: status {head.status}, {self._interim} times so far")
        if self._filled == HEAD_BYTES_MAX:
            raise TryError(Kind.BAD_ANSWER, f"not HTTP: a head of more than {HEAD_BYTES_MAX} bytes")
