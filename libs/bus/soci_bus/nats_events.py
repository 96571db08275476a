# SPDX-License-Identifier: Apache-2.0
"""Events over JetStream: a bounded queue towards the stream, and reading it back."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import nats.errors
from nats.aio.msg import Msg
from nats.js import api

from soci.errors import BusUnavailable, InvalidMessage
from soci_bus import wire
from soci_bus.events import Event
from soci_bus.nats_link import EVENTS_STREAM, FOREIGN, REQUEST_TIMEOUT, RETRY_WAIT, Link, Once, Trouble

EVENT_QUEUE = 10_000
"""Events that wait here while the bus is away; beyond that the oldest are dropped, and counted."""
HISTORY_BATCH = 500
"""Stored events that are asked for at a time."""
HISTORY_IDLE = 30.0
"""Seconds after which the server forgets a reader of the history that went away."""
WATCH_BYTES = 64 << 20
"""Bytes of events that a watcher may lag behind before nats-py drops and reports."""


class EventSender:
    """Sends what `put` queued, in order."""

    def __init__(self, link: Link, node: str, trouble: Trouble) -> None:
        self.dropped = 0  # events that found the queue full
        self._link = link
        self._node = node
        self._trouble = trouble
        self._queue: asyncio.Queue[tuple[Event, int]] = asyncio.Queue(EVENT_QUEUE)

    def put(self, event: Event) -> None:
        """Queue an event; where the queue is full the oldest is dropped and ``dropped`` counts it."""
        if self._queue.full():
            self._queue.get_nowait()
            self._queue.task_done()
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, …: told, but not a flood
                self._trouble(f"event queue of {EVENT_QUEUE} is full, {self.dropped} dropped so far", None)
        self._queue.put_nowait((event, time.time_ns()))

    async def run(self) -> None:
        """Send for as long as the bus is open. An event that cannot be sent is told of and left out."""
        number = 0
        stem = f"{wire.token(self._node)}-{secrets.token_hex(8)}"
        once = Once(self._trouble)
        while True:
            event, at_ns = await self._queue.get()
            number += 1
            try:
                await self._send(event, at_ns, f"{stem}-{number}", once)
            except Exception as error:  # noqa: BLE001  one odd event must not silence all that follow
                self._trouble(f"a {type(event).__name__} event cannot be sent and is left out", error)
            finally:
                self._queue.task_done()

    async def _send(self, event: Event, at_ns: int, message_id: str, once: Once) -> None:
        while True:  # bounded by the queue behind it: see EVENT_QUEUE
            await self._link.streams.wait()
            try:
                await self.store(event, at_ns=at_ns, message_id=message_id)
            except BusUnavailable as error:
                once.tell("events wait", error)
                await asyncio.sleep(RETRY_WAIT)
            else:
                once.over()
                return

    async def store(self, event: Event, *, at_ns: int, message_id: str) -> None:
        """Store one event and wait for the server's word. The same id within `DUPLICATES_WINDOW` is one event.

        Raises `BusUnavailable` where it was not taken, `InvalidMessage` where it never will be.
        """
        await self._link.stores("storing an event")
        headers = {wire.TIME_HEADER: str(at_ns), "Nats-Msg-Id": message_id}
        try:
            await self._link.jetstream.publish(
                wire.event_subject(self._node, event), wire.encode(event), stream=EVENTS_STREAM, headers=headers
            )
        except nats.errors.MaxPayloadError as error:
            raise InvalidMessage(f"{type(event).__name__}: larger than this NATS's max_payload") from error
        except FOREIGN as error:
            raise BusUnavailable(f"JetStream did not take an event ({type(error).__name__})") from error

    async def flush(self, timeout: float) -> None:  # noqa: ASYNC109
        """Wait at most ``timeout`` seconds until every queued event is stored."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._queue.join()


class EventReader:
    """Reads events: those stored, and those that come."""

    def __init__(self, link: Link, trouble: Trouble) -> None:
        self._link = link
        self._trouble = trouble

    async def history(self, subject: str) -> AsyncIterator[wire.Envelope]:
        """The stored events of a subject, oldest first, as many as there were at the beginning."""
        await self._link.stores("reading events")
        consumer = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE, inactive_threshold=HISTORY_IDLE, mem_storage=True)
        try:
            subscription = await self._link.jetstream.pull_subscribe(subject, stream=EVENTS_STREAM, config=consumer)
            try:
                left = (await subscription.consumer_info()).num_pending or 0
                while left > 0:
                    for message in await subscription.fetch(min(left, HISTORY_BATCH), timeout=REQUEST_TIMEOUT):
                        # Events that grew too old meanwhile never come: the server's own count ends it too.
                        left = min(left - 1, message.metadata.num_pending)
                        envelope = self._read(message, message.metadata.sequence.stream)
                        if envelope:
                            yield envelope
            finally:
                with suppress(*FOREIGN):
                    await subscription.unsubscribe()
        except FOREIGN as error:
            raise BusUnavailable(f"JetStream does not give the events ({type(error).__name__})") from error

    @asynccontextmanager
    async def watching(self, subject: str) -> AsyncIterator[AsyncIterator[wire.Envelope]]:
        """Events of a subject as they are sent, all that follow the beginning of the block."""
        await self._link.stands("watching events")
        try:
            subscription = await self._link.client.subscribe(subject, pending_bytes_limit=WATCH_BYTES)
            await self._link.settle()
        except FOREIGN as error:
            raise BusUnavailable(f"NATS does not let us watch events ({type(error).__name__})") from error

        async def envelopes() -> AsyncIterator[wire.Envelope]:
            async for message in subscription.messages:
                envelope = self._read(message, 0)
                if envelope:
                    yield envelope

        try:
            yield envelopes()
        finally:
            with suppress(*FOREIGN):
                await subscription.unsubscribe()

    def _read(self, message: Msg, sequence: int) -> wire.Envelope | None:
        try:
            return wire.decode_event(message.subject, message.headers, message.data, sequence)
        except InvalidMessage as error:
            self._trouble(f"an event on {message.subject[:200]} does not parse", error)
            return None
