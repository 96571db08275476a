# SPDX-License-Identifier: Apache-2.0
"""The bus over NATS: core request and reply for asks, JetStream for events and jobs.

What runs at the same time: one task that sends queued events, one for each ask being answered, one for each job
class being worked on. All belong to the task groups that `connect` opens, and end with them. Nothing is locked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext, api

from soci.errors import BusUnavailable, DeadlineExceeded, InvalidMessage, SociError
from soci.launch import TraceParent
from soci_bus import wire
from soci_bus.asks import Ask
from soci_bus.events import Event
from soci_bus.face import LONGEST_ASK, Context, Handler, JobHandler

EVENTS_STREAM = "SOCI_EVENTS"
JOBS_STREAM = "SOCI_JOBS"
EVENTS_BYTES = 1 << 30
"""Bytes of history that the stream keeps; the oldest events go first."""
EVENTS_AGE = 14 * 86400.0
"""Seconds for which an event is kept."""
JOBS_AGE = 86400.0
"""Seconds after which a job that nobody took is dropped."""
DUPLICATES_WINDOW = 120.0
"""Seconds in which a second message of the same id is dropped by the server."""
EVENT_QUEUE = 10_000
"""Events that wait here while the bus is away; beyond that the oldest are dropped, and counted."""
CONCURRENT_ASKS = 256
"""Asks of one class that a process answers at a time; more wait in its subscription."""
PENDING_BYTES = 64 << 20
"""Bytes that a subscription of ours may hold before nats-py drops and reports."""
CONNECT_TIMEOUT = 3
RECONNECT_WAIT = 0.25
RECONNECT_GRACE = 5.0
"""Seconds that an ask waits for a NATS that is away, before it fails."""
LAST_EVENTS = 2.0
PUBLISH_TIMEOUT = 5.0
PUBLISH_RETRY_WAIT = 0.5
JOB_TRIES = 3
JOB_POLL = 5.0
"""Seconds of one wait for a job: a server that restarts forgets who waits, and must be told again."""
JOB_ACK_WAIT = 30.0
"""Seconds after which an unacknowledged job goes to another worker; a live worker says so thrice within them."""
HISTORY_BATCH = 500

Answer = TypeVar("Answer")
AskT = TypeVar("AskT", bound=Ask[Any])
Trouble = Callable[[str, BaseException | None], None]


def _ignore(_what: str, _error: BaseException | None) -> None:
    """The default for ``trouble``: a library does not log."""


class NatsBus:
    """See `soci_bus.face.Bus`. Made by `connect`."""

    def __init__(
        self, client: Client, answering: asyncio.TaskGroup, standing: asyncio.TaskGroup, node: str, trouble: Trouble
    ) -> None:
        self.node = node
        self.dropped = 0  # events that found the queue full
        self.up = asyncio.Event()  # set while NATS is there
        self._client = client
        self._answering = answering
        self._standing = standing
        self._trouble = trouble
        self._queue: asyncio.Queue[tuple[Event, int]] = asyncio.Queue(EVENT_QUEUE)
        self._subscriptions: list[Subscription] = []
        self._wanted: list[Callable[[], Awaitable[None]]] = []  # to subscribe once NATS is there for the first time
        self._running: set[asyncio.Task[None]] = set()

    @property
    def _jetstream(self) -> JetStreamContext:
        return self._client.jetstream(timeout=PUBLISH_TIMEOUT)

    async def connected_first(self) -> None:
        """NATS is there for the first time: make the subscriptions that were wanted before."""
        while self._wanted:
            await self._wanted[0]()
            self._wanted.pop(0)
        self.up.set()

    async def _once_up(self, subscribe: Callable[[], Awaitable[None]]) -> None:
        if self.up.is_set():
            await subscribe()
        else:
            self._wanted.append(subscribe)

    def give_up(self) -> None:
        """End what is still running: the process is going down."""
        for task in self._running:
            task.cancel()

    def _run(self, group: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = group.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    # --- asks

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """Ask this node's server of the verb and wait at most ``timeout`` seconds."""
        timeout = min(timeout, LONGEST_ASK)
        subject = wire.ask_subject(self.node, ask.verb)
        await self._await_nats(subject, min(timeout, RECONNECT_GRACE))
        try:
            reply = await self._client.request(
                subject, wire.encode(ask), timeout=timeout, headers=wire.ask_headers(trace, timeout)
            )
        except nats.errors.NoRespondersError as error:
            raise BusUnavailable(f"no process answers {subject}: is its service running on this node?") from error
        except (nats.errors.TimeoutError, TimeoutError) as error:
            raise DeadlineExceeded(f"{subject} gave no answer within {timeout:g} s") from error
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"{subject}: NATS is away ({type(error).__name__})") from error
        answer: Answer = wire.read_answer(reply.headers, reply.data, ask)
        return answer

    async def _await_nats(self, what: str, grace: float) -> None:
        if not self.up.is_set():
            try:
                async with asyncio.timeout(grace):
                    await self.up.wait()
            except TimeoutError as error:
                raise BusUnavailable(f"{what}: NATS is away") from error

    async def serve(self, cls: type[AskT], handler: Handler, *, queue: str = "") -> None:
        """Answer asks of ``cls`` from now on, `CONCURRENT_ASKS` at a time."""
        permits = asyncio.Semaphore(CONCURRENT_ASKS)

        async def one(message: Msg) -> None:
            try:
                await self._answer(message, cls, handler)
            finally:
                permits.release()

        async def arrived(message: Msg) -> None:
            await permits.acquire()
            self._run(self._answering, one(message))

        async def subscribe() -> None:
            subject = wire.ask_subject(self.node, cls.verb)
            self._subscriptions.append(
                await self._client.subscribe(subject, queue=queue, cb=arrived, pending_bytes_limit=PENDING_BYTES)
            )
            await self._client.flush()

        await self._once_up(subscribe)

    async def _answer(self, message: Msg, cls: type[AskT], handler: Handler) -> None:
        trace, timeout = wire.read_ask_headers(message.headers, LONGEST_ASK)
        try:
            async with asyncio.timeout(timeout):
                body = wire.encode(await handler(wire.decode(message.data, cls), Context(trace, timeout)))
            headers = None
        except SociError as error:
            body, headers = str(error)[:4096].encode(errors="replace"), wire.error_headers(error)
        except TimeoutError:
            return  # the asker has given up too
        except Exception as error:  # noqa: BLE001  a handler's bug must reach the asker and the log, not end the process
            self._trouble(f"{cls.verb} failed", error)
            body = f"{cls.verb}: internal error {type(error).__name__}".encode()
            headers = wire.error_headers(SociError())
        with suppress(nats.errors.Error):  # the asker then sees its deadline pass
            await self._client.publish(message.reply, body, headers=headers)

    # --- events

    def publish(self, event: Event) -> None:
        """Queue an event; where the queue is full the oldest is dropped and ``dropped`` counts it."""
        if self._queue.full():
            self._queue.get_nowait()
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, …: told, but not a flood
                self._trouble(f"event queue of {EVENT_QUEUE} is full, {self.dropped} dropped so far", None)
        self._queue.put_nowait((event, time.time_ns()))

    async def publish_now(self, event: Event, *, at_ns: int, message_id: str) -> None:
        """Store one event and wait for the server's word, for a writer with an outbox of its own."""
        headers = {wire.TIME_HEADER: str(at_ns), "Nats-Msg-Id": message_id}
        try:
            await self._jetstream.publish(
                wire.event_subject(self.node, event), wire.encode(event), stream=EVENTS_STREAM, headers=headers
            )
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"JetStream did not take an event ({type(error).__name__})") from error

    async def send_events(self) -> None:
        """Send what `publish` queued, in order, for as long as the bus is open."""
        number = 0
        stem = f"{self.node}-{time.time_ns():x}"
        await self.up.wait()
        while True:
            event, at_ns = await self._queue.get()
            number += 1
            try:
                await self._send(event, at_ns, f"{stem}-{number}")
            except InvalidMessage as error:
                self._trouble("an event was too large", error)
            finally:
                self._queue.task_done()

    async def _send(self, event: Event, at_ns: int, message_id: str) -> None:
        while True:
            try:
                await self.publish_now(event, at_ns=at_ns, message_id=message_id)
            except BusUnavailable:
                await asyncio.sleep(PUBLISH_RETRY_WAIT)  # bounded by the queue: see EVENT_QUEUE
            else:
                return

    async def flush_events(self, timeout: float) -> None:  # noqa: ASYNC109
        """Wait at most ``timeout`` seconds until every queued event is stored."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._queue.join()

    # --- jobs

    async def submit(self, job: Ask[Any], job_id: str) -> None:
        """Put a job on the work queue. The same id twice within `DUPLICATES_WINDOW` is one job."""
        try:
            await self._jetstream.publish(
                wire.job_subject(job.verb, job_id),
                wire.encode(job),
                stream=JOBS_STREAM,
                headers={"Nats-Msg-Id": job_id},
            )
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"JetStream did not take the job ({type(error).__name__})") from error

    async def work(self, cls: type[AskT], handler: JobHandler) -> None:
        """Take jobs of ``cls`` one at a time. ``handler`` tells success and refusal by events, and raises only
        for what another try may mend.
        """
        consumer = api.ConsumerConfig(
            ack_policy=api.AckPolicy.EXPLICIT, ack_wait=JOB_ACK_WAIT, max_deliver=JOB_TRIES, max_ack_pending=64
        )

        async def subscribe() -> None:
            subscription = await self._jetstream.pull_subscribe(
                wire.job_subject(cls.verb, "*"), durable=f"workers-{cls.verb}", stream=JOBS_STREAM, config=consumer
            )
            self._run(self._standing, self._work(subscription, cls, handler))

        await self._once_up(subscribe)

    async def _work(self, subscription: Any, cls: type[AskT], handler: JobHandler) -> None:
        while True:
            try:
                (message,) = await subscription.fetch(1, timeout=JOB_POLL)
            except (nats.errors.TimeoutError, TimeoutError):
                continue
            except (nats.errors.Error, nats.js.errors.Error, OSError) as error:
                if self._client.is_closed:
                    return
                self._trouble(f"waiting for {cls.verb} jobs", error)
                await asyncio.sleep(PUBLISH_RETRY_WAIT)
                continue
            await self._one_job(message, cls, handler)

    async def _one_job(self, message: Msg, cls: type[AskT], handler: JobHandler) -> None:
        async def still_here() -> None:
            while True:
                await asyncio.sleep(JOB_ACK_WAIT / 3)
                with suppress(nats.errors.Error):
                    await message.in_progress()

        beat = self._run(self._standing, still_here())
        try:
            await handler(wire.decode(message.data, cls), message.subject.rpartition(".")[2])
        except InvalidMessage as error:
            self._trouble(f"a {cls.verb} job does not parse", error)
            with suppress(nats.errors.Error):
                await message.term()
        except Exception as error:  # noqa: BLE001  one job's failure must not end the worker
            self._trouble(f"a {cls.verb} job failed", error)
            with suppress(nats.errors.Error):
                await message.nak(delay=PUBLISH_RETRY_WAIT)
        else:
            with suppress(nats.errors.Error):
                await message.ack()
        finally:
            beat.cancel()

    # --- reading

    async def history(self, noun: str = "*", id: str = "*", happened: str = "*") -> AsyncIterator[wire.Envelope]:  # noqa: A002
        """The stored events that match, oldest first, up to now."""
        subject = f"soci.evt.*.{noun}.{id}.{happened}"
        consumer = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE, inactive_threshold=30.0, mem_storage=True)
        try:
            subscription = await self._jetstream.pull_subscribe(subject, stream=EVENTS_STREAM, config=consumer)
            pending = (await subscription.consumer_info()).num_pending or 0
            while pending:
                for message in await subscription.fetch(min(pending, HISTORY_BATCH), timeout=PUBLISH_TIMEOUT):
                    pending = message.metadata.num_pending
                    envelope = self._read(message, message.metadata.sequence.stream)
                    if envelope:
                        yield envelope
            await subscription.unsubscribe()
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError) as error:
            raise BusUnavailable(f"JetStream does not give the events ({type(error).__name__})") from error

    @asynccontextmanager
    async def watching(self, id: str) -> AsyncIterator[AsyncIterator[wire.Envelope]]:  # noqa: A002
        """Events of one id as they are stored, all that follow the beginning of the block."""
        subscription = await self._client.subscribe(f"soci.evt.*.*.{id}.*", pending_bytes_limit=PENDING_BYTES)
        await self._client.flush()

        async def envelopes() -> AsyncIterator[wire.Envelope]:
            async for message in subscription.messages:
                envelope = self._read(message, 0)
                if envelope:
                    yield envelope

        try:
            yield envelopes()
        finally:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()

    def _read(self, message: Msg, sequence: int) -> wire.Envelope | None:
        try:
            return wire.decode_event(message.subject, message.headers, message.data, sequence)
        except InvalidMessage as error:
            self._trouble(f"an event on {message.subject[:200]} does not parse", error)
            return None

    async def drain(self) -> None:
        """Take no new asks; those already taken are answered by the task group's end."""
        for subscription in self._subscriptions:
            with suppress(nats.errors.Error):
                await subscription.drain()


async def _make_streams(jetstream: JetStreamContext) -> None:
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
        except (nats.js.errors.NoStreamResponseError, nats.js.errors.ServiceUnavailableError) as error:
            raise BusUnavailable("NATS runs without JetStream: start nats-server with -js") from error


async def connect_client(client: Client, bus: NatsBus, url: str, name: str, trouble: Trouble) -> None:
    """Connect, however long it takes, and keep ``bus`` told; nats-py reconnects by itself from then on."""

    async def lost() -> None:
        bus.up.clear()
        trouble("NATS is away, reconnecting", None)

    async def back() -> None:
        bus.up.set()
        trouble("NATS is back", None)

    async def error(problem: Exception) -> None:
        if bus.up.is_set():  # while it is away there is nothing new to say
            trouble("NATS", problem)

    await client.connect(
        url,
        name=name,
        connect_timeout=CONNECT_TIMEOUT,
        reconnect_time_wait=RECONNECT_WAIT,
        max_reconnect_attempts=-1,
        disconnected_cb=lost,
        reconnected_cb=back,
        error_cb=error,
    )
    while True:
        try:
            await _make_streams(client.jetstream(timeout=PUBLISH_TIMEOUT))
            await bus.connected_first()
        except (nats.errors.Error, nats.js.errors.Error, BusUnavailable, TimeoutError, OSError) as problem:
            trouble("NATS is there, its JetStream is not yet", problem)
            await asyncio.sleep(PUBLISH_RETRY_WAIT)
        else:
            return


@asynccontextmanager
async def connect(
    url: str, *, node: str, name: str, wait: float | None = None, trouble: Trouble = _ignore
) -> AsyncIterator[NatsBus]:
    """The bus at ``url``.

    With ``wait`` the first connection must stand within so many seconds, else `BusUnavailable`; without, the bus is
    given at once and what is asked, served and told meanwhile waits, because a service must start while NATS is away.
    On leaving: no new asks are taken, running ones are answered, queued events get `LAST_EVENTS` seconds to go out.
    """
    client = Client()
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as standing:
        async with asyncio.TaskGroup() as answering:
            bus = NatsBus(client, answering, standing, node, trouble)
            connecting = standing.create_task(connect_client(client, bus, url, name, trouble))
            sender = standing.create_task(bus.send_events())
            try:
                if wait is not None:
                    await _within(bus, wait, url)
                yield bus
                await bus.drain()
            except BaseException as error:  # noqa: BLE001  raised again below, outside the groups, as itself
                failure = error
                bus.give_up()
        await bus.flush_events(LAST_EVENTS if bus.up.is_set() else 0)
        connecting.cancel()
        sender.cancel()
        bus.give_up()
        with suppress(nats.errors.Error, OSError):
            await client.close()
    if failure is not None:
        raise failure


async def _within(bus: NatsBus, wait: float, url: str) -> None:
    try:
        async with asyncio.timeout(wait):
            await bus.up.wait()
    except TimeoutError as error:
        raise BusUnavailable(
            f"no NATS with JetStream at {url} within {wait:g} s: is nats-server -js running?"
        ) from error
