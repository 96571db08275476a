# SPDX-License-Identifier: Apache-2.0
"""The connection to NATS: whether it stands, what is subscribed on it, and that our streams are there.

nats-py reconnects by itself and repeats subscriptions; what it does not do is kept here: subscriptions wanted before
the first connection, streams that a NATS which lost its disk no longer has, and asks whose answer went with the
connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext, api

from soci.errors import BusUnavailable, InvalidInput

EVENTS_STREAM = "SOCI_EVENTS"
JOBS_STREAM = "SOCI_JOBS"
EVENTS_BYTES = 1 << 30
"""Bytes of history that the stream keeps; the oldest events go first."""
EVENTS_AGE = 14 * 86400.0
"""Seconds for which an event is kept."""
JOBS_AGE = 86400.0
"""Seconds after which a job that nobody took is dropped."""
JOBS_BYTES = 64 << 20
"""Bytes of jobs that wait."""
DUPLICATES_WINDOW = 120.0
"""Seconds in which a second message of the same id is dropped by the server."""
CONNECT_TIMEOUT = 3
RECONNECT_WAIT = 0.25
RECONNECT_GRACE = 5.0
"""Seconds that an ask waits for a NATS that is away, before it fails."""
REQUEST_TIMEOUT = 5.0
"""Seconds for each word of JetStream's."""
RETRY_WAIT = 0.5
"""Seconds between two tries of what is tried for as long as the bus is open."""
SCHEMES = ("nats", "tls", "ws", "wss")

Trouble = Callable[[str, BaseException | None], None]
FOREIGN: tuple[type[Exception], ...] = (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError)
"""What nats-py raises where the other side, not we, is at fault."""
_NO_STREAMS: tuple[type[Exception], ...] = (*FOREIGN, BusUnavailable)


class Once:
    """Passes trouble on when it is new: what fails each half second is told once."""

    def __init__(self, trouble: Trouble) -> None:
        self._trouble = trouble
        self._last = ""

    def tell(self, what: str, error: BaseException | None) -> None:
        """Pass on, unless it is what was told last."""
        text = f"{what} {type(error).__name__} {error}"
        if text != self._last:
            self._last = text
            self._trouble(what, error)

    def over(self) -> None:
        """It went well: the same trouble is new again."""
        self._last = ""


def check_url(url: str) -> None:
    """`InvalidInput` for what cannot be the address of a NATS server; several may be given, with commas."""
    for one in url.split(","):
        try:
            parts = urlsplit(one.strip() if "://" in one else f"nats://{one.strip()}")
            good = parts.scheme in SCHEMES and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good:
            raise InvalidInput(f"not the address of a NATS server (nats://host:4222): {one[:200]!r}")


def hosts(url: str) -> str:
    """The servers in ``url`` without the passwords that may be in it."""
    return ",".join(one.strip().rpartition("@")[2].rpartition("//")[2] for one in url.split(","))


class Link:
    """One connection. `run` and `keep_streams` are its two standing tasks."""

    def __init__(self, url: str, name: str, trouble: Trouble) -> None:
        self.client = Client()
        self.jetstream: JetStreamContext = self.client.jetstream(timeout=REQUEST_TIMEOUT)
        self.up = asyncio.Event()  # set while NATS is there and all is subscribed
        self.streams = asyncio.Event()  # set while NATS is there and has our streams
        self._url = url
        self._name = name
        self._trouble = trouble
        self._down = asyncio.Event()
        self._came = asyncio.Event()
        self._wanted: list[Callable[[], Awaitable[None]]] = []
        self._asks: set[asyncio.Timeout] = set()
        self._losses = 0
        self._away = Once(trouble)
        self._no_streams = ""

    # --- the connection

    async def run(self) -> None:
        """Connect, however long it takes, and subscribe what is wanted, now and after each reconnect."""
        await self.client.connect(
            [one.strip() for one in self._url.split(",")],
            name=self._name,
            connect_timeout=CONNECT_TIMEOUT,
            reconnect_time_wait=RECONNECT_WAIT,
            max_reconnect_attempts=-1,
            disconnected_cb=self._lost,
            reconnected_cb=self._back,
            error_cb=self._error,
        )
        once = Once(self._trouble)
        while True:
            self._came.clear()
            try:
                while self._wanted:
                    await self._wanted[0]()
                    del self._wanted[0]
                    await self.settle()
            except FOREIGN as problem:
                once.tell("NATS does not take a subscription yet", problem)
                await asyncio.sleep(RETRY_WAIT)
                continue
            if self.client.is_connected:
                self._down.clear()
                self.up.set()
            once.over()
            self._away.over()
            await self._came.wait()

    async def _lost(self) -> None:
        was_up = self.up.is_set()
        self.up.clear()
        self.streams.clear()
        self._down.set()
        self._losses += 1
        for ask in self._asks:  # its answer is lost, and to ask again is cheaper than to wait
            if not ask.expired():
                ask.reschedule(0)
        if was_up and not self.client.is_closed:
            self._trouble("NATS is away, reconnecting", None)

    async def _back(self) -> None:
        self._came.set()
        self._trouble("NATS is back", None)

    async def _error(self, problem: Exception) -> None:
        if self.up.is_set():
            self._trouble("NATS", problem)
        else:  # four tries a second: what keeps us away is told once
            self._away.tell(f"NATS at {hosts(self._url)} cannot be reached", problem)

    async def subscribe(self, make: Callable[[], Awaitable[None]]) -> None:
        """Make a subscription: now where NATS is there, else as soon as it is."""
        if self.up.is_set():
            try:
                await make()
                await self.settle()
            except FOREIGN as problem:
                if self.client.is_closed:
                    raise BusUnavailable("the bus is closed") from problem
            else:
                return
        self._wanted.append(make)
        self._came.set()

    @asynccontextmanager
    async def waiting(self, what: str, timeout: float) -> AsyncIterator[None]:  # noqa: ASYNC109
        """A block that ends with `BusUnavailable` where NATS goes away in it or does not come within
        `RECONNECT_GRACE`, and with TimeoutError after ``timeout`` seconds in all.
        """
        losses = self._losses
        try:
            async with asyncio.timeout(timeout) as whole:
                await self._stands(self.up, what)
                losses = self._losses
                self._asks.add(whole)
                try:
                    yield
                finally:
                    self._asks.discard(whole)
        except TimeoutError as error:
            if self._losses != losses or not self.up.is_set():
                raise BusUnavailable(f"{what}: NATS is away") from error
            raise

    async def settle(self) -> None:
        """Return once the server has taken every subscription made before.

        nats-py writes flush's PING at once, but a subscription only in its next round: the PING overtakes it, and its
        PONG says nothing. The second PING comes behind.
        """
        await self.client.flush()
        await self.client.flush()

    async def stands(self, what: str) -> None:
        """Wait `RECONNECT_GRACE` at most until NATS is there; `BusUnavailable`."""
        await self._stands(self.up, what)

    async def stores(self, what: str) -> None:
        """Wait `RECONNECT_GRACE` at most until NATS is there and has our streams; `BusUnavailable`."""
        await self._stands(self.streams, what)

    async def _stands(self, event: asyncio.Event, what: str) -> None:
        if event.is_set():
            return
        try:
            async with asyncio.timeout(RECONNECT_GRACE):
                await event.wait()
        except TimeoutError as error:
            raise BusUnavailable(f"{what}: {self.why_not()}") from error

    def why_not(self) -> str:
        """What is missing, in words."""
        return self._no_streams or "JetStream is not there yet" if self.up.is_set() else "NATS is away"

    # --- streams

    async def keep_streams(self) -> None:
        """Have our streams, now and after each reconnect: a NATS that was started anew may have lost them."""
        once = Once(self._trouble)
        while True:
            await self.up.wait()
            try:
                await make_streams(self.jetstream)
            except _NO_STREAMS as problem:
                self._no_streams = str(problem) or type(problem).__name__
                if self.up.is_set():
                    once.tell("NATS is there, its JetStream is not yet", problem)
                await asyncio.sleep(RETRY_WAIT)
                continue
            once.over()
            if self.up.is_set():
                self._no_streams = ""
                self.streams.set()
            await self._down.wait()


async def make_streams(jetstream: JetStreamContext) -> None:
    """Make our two streams, or leave them as an administrator made them."""
    events = api.StreamConfig(
        name=EVENTS_STREAM,
        subjects=["soci.evt.>"],
        max_bytes=EVENTS_BYTES,
        max_age=EVENTS_AGE,
        storage=api.StorageType.FILE,
        duplicate_window=DUPLICATES_WINDOW,
    )
    jobs = api.StreamConfig(
        name=JOBS_STREAM,
        subjects=["soci.job.>"],
        retention=api.RetentionPolicy.WORK_QUEUE,
        max_bytes=JOBS_BYTES,
        discard=api.DiscardPolicy.NEW,  # who submits one too many is told; nobody's older job is dropped for it
        max_age=JOBS_AGE,
        storage=api.StorageType.FILE,
        duplicate_window=DUPLICATES_WINDOW,
    )
    for stream in (events, jobs):
        try:
            await jetstream.add_stream(stream)
        except nats.js.errors.BadRequestError as error:
            if error.err_code != 10058:  # "stream name already in use with a different configuration": the admin's
                raise
        except (nats.errors.NoRespondersError, nats.js.errors.ServiceUnavailableError) as error:
            raise BusUnavailable("NATS runs without JetStream: start nats-server with -js") from error
