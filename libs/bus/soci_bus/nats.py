# SPDX-License-Identifier: Apache-2.0
"""The bus over NATS: core request and reply for asks, JetStream for events and jobs.

What runs at the same time: the tasks that keep connection and streams (`nats_link`), one that sends queued events
(`nats_events`), one for each ask being answered, one for each job class being worked on (`nats_jobs`). All belong to
the task groups that `connect` opens, and end with them. Nothing is locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from soci.errors import BusUnavailable, DeadlineExceeded, InvalidInput, InvalidMessage, SociError, Unavailable
from soci.launch import TraceParent
from soci_bus import wire
from soci_bus.asks import Ask
from soci_bus.events import Event
from soci_bus.face import LONGEST_ASK, Context, Handler, JobHandler, NoticeT
from soci_bus.nats_events import EventReader, EventSender
from soci_bus.nats_jobs import Worker
from soci_bus.nats_link import FOREIGN, JOBS_STREAM, Link, Trouble, check_url, hosts
from soci_bus.notices import Notice

CONCURRENT_ASKS = 256
"""Asks of one class that a process answers at a time; more wait in its subscription."""
PENDING_BYTES = 64 << 20
"""Bytes that a subscription of ours may hold before nats-py drops and reports."""
NOTICE_BYTES = 4 << 20
"""The same for notices, which are small and told again."""
LAST_ANSWERS = 8.0
"""Seconds that asks already taken get on the way out; what then still runs is given up, and its asker told."""
LAST_CLOSE = 5.0
"""Seconds that letting go of NATS may take."""
LAST_EVENTS = 2.0
"""Seconds that queued events get on the way out."""

Answer = TypeVar("Answer")
AskT = TypeVar("AskT", bound=Ask[Any])


def _ignore(_what: str, _error: BaseException | None) -> None:
    """The default for ``trouble``: a library does not log."""


CANCEL_AGAIN = 0.5
"""Seconds after which a task that did not end is told again."""


class NatsBus:
    """See `soci_bus.face.Bus`. Made by `connect`."""

    def __init__(
        self, link: Link, answering: asyncio.TaskGroup, standing: asyncio.TaskGroup, node: str, trouble: Trouble
    ) -> None:
        self.node = node
        self._link = link
        self._answering = answering
        self._standing = standing
        self._trouble = trouble
        self._sender = EventSender(link, node, trouble)
        self._reader = EventReader(link, trouble)
        self._subscriptions: list[Subscription] = []
        self._answers: set[asyncio.Task[None]] = set()
        self._keepers = [standing.create_task(work) for work in (link.run(), link.keep_streams(), self._sender.run())]
        self._workers: list[asyncio.Task[None]] = []

    @property
    def up(self) -> asyncio.Event:
        """Set while NATS is there."""
        return self._link.up

    @property
    def dropped(self) -> int:
        """Events that found the queue full."""
        return self._sender.dropped

    # --- asks

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """Ask this node's server of the verb and wait at most ``timeout`` seconds.

        Where NATS goes away meanwhile it is `BusUnavailable`: the ask may have been done all the same.
        """
        timeout = min(timeout, LONGEST_ASK)
        subject = wire.ask_subject(self.node, ask.verb)
        body = wire.encode(ask)
        try:
            async with self._link.waiting(subject, timeout):
                reply = await self._link.client.request(
                    subject, body, timeout=None, headers=wire.ask_headers(trace, timeout)
                )
        except nats.errors.NoRespondersError as error:
            raise BusUnavailable(f"no process answers {subject}: is its service running on this node?") from error
        except nats.errors.MaxPayloadError as error:
            raise InvalidMessage(f"{subject}: the ask is larger than this NATS's max_payload") from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"{subject} gave no answer within {timeout:g} s") from error
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"{subject}: NATS is away ({type(error).__name__})") from error
        answer: Answer = wire.read_answer(reply.headers, reply.data, ask)
        return answer

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
            task = self._answering.create_task(one(message))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

        async def subscribe() -> None:
            subject = wire.ask_subject(self.node, cls.verb)
            self._subscriptions.append(
                await self._link.client.subscribe(subject, queue=queue, cb=arrived, pending_bytes_limit=PENDING_BYTES)
            )

        await self._link.subscribe(subscribe)

    async def _answer(self, message: Msg, cls: type[AskT], handler: Handler) -> None:
        trace, timeout = wire.read_ask_headers(message.headers, LONGEST_ASK)
        given_up = Unavailable(f"{cls.verb}: the process that was at it is going down")
        headers: dict[str, str] | None = None
        try:
            async with asyncio.timeout(timeout) as patience:
                body = wire.encode(await handler(wire.decode(message.data, cls), Context(trace, timeout)))
        except SociError as error:
            headers, body = wire.write_error(error)
        except asyncio.CancelledError:
            await self._reply(message, *wire.write_error(given_up))
            raise
        except Exception as error:  # noqa: BLE001  a handler's bug must reach the asker and the log, not end the process
            if patience.expired():
                return  # the asker has given up too
            self._trouble(f"{cls.verb} failed", error)
            headers, body = wire.write_error(SociError(f"{cls.verb}: internal error {type(error).__name__}"))
        await self._reply(message, headers, body)

    async def _reply(self, message: Msg, headers: dict[str, str] | None, body: bytes) -> None:
        with suppress(*FOREIGN):  # the asker then sees its deadline pass
            await self._link.client.publish(message.reply, body, headers=headers)

    # --- events

    def publish(self, event: Event) -> None:
        """Queue an event; where the queue is full the oldest is dropped and ``dropped`` counts it."""
        self._sender.put(event)

    async def publish_now(self, event: Event, *, at_ns: int, message_id: str) -> None:
        """Store one event and wait for the server's word, for a writer with an outbox of its own."""
        await self._sender.store(event, at_ns=at_ns, message_id=message_id)

    async def flush_events(self, timeout: float) -> None:  # noqa: ASYNC109
        """Wait at most ``timeout`` seconds until every queued event is stored."""
        await self._sender.flush(timeout)

    def history(self, noun: str = "*", id: str = "*", happened: str = "*") -> AsyncIterator[wire.Envelope]:  # noqa: A002
        """The stored events that match, oldest first, up to now."""
        return self._reader.history(wire.event_filter(noun, id, happened))

    def watching(self, id: str) -> AbstractAsyncContextManager[AsyncIterator[wire.Envelope]]:  # noqa: A002
        """Events of one id as they are sent, all that follow the beginning of the block but those that a NATS which
        was away in it did not pass on.
        """
        return self._reader.watching(wire.event_filter(id=id))

    # --- notices

    async def tell(self, notice: Notice) -> None:
        """Say it to all nodes that listen now; it is lost where NATS is away."""
        if not self._link.up.is_set():
            return
        with suppress(*FOREIGN):  # the next notice mends it
            await self._link.client.publish(wire.notice_subject(notice.node, notice.word), wire.encode(notice))

    async def hear(self, cls: type[NoticeT], heard: Callable[[NoticeT], None]) -> None:
        """Pass on notices of ``cls``; what does not parse, or speaks for another node than its subject, is passed
        over without a word: anybody may send it, and often.
        """

        async def arrived(message: Msg) -> None:
            try:
                notice = wire.decode(message.data, cls)
            except InvalidInput:
                return
            if message.subject == wire.notice_subject(notice.node, cls.word):
                heard(notice)

        async def subscribe() -> None:
            subject = wire.notice_subject("*", cls.word)
            self._subscriptions.append(
                await self._link.client.subscribe(subject, cb=arrived, pending_bytes_limit=NOTICE_BYTES)
            )

        await self._link.subscribe(subscribe)

    # --- jobs

    async def submit(self, job: Ask[Any], job_id: str) -> None:
        """Put a job on the work queue. The same id twice within `DUPLICATES_WINDOW` is one job."""
        body = wire.encode(job)
        subject = wire.job_subject(job.verb, wire.token(job_id))
        await self._link.stores(subject)
        try:
            await self._link.jetstream.publish(subject, body, stream=JOBS_STREAM, headers={"Nats-Msg-Id": subject})
        except FOREIGN as error:
            raise BusUnavailable(f"JetStream did not take the job ({type(error).__name__})") from error

    async def work(self, cls: type[AskT], handler: JobHandler) -> None:
        """Take jobs of ``cls`` one at a time. ``handler`` tells success and refusal by events, and raises only
        for what another try may mend; after `JOB_TRIES` of them the job is dropped.
        """
        self._workers.append(self._standing.create_task(Worker(self._link, cls, handler, self._trouble).run()))

    # --- the end

    async def finish(self) -> None:
        """Give jobs back, take no new asks, answer those taken within `LAST_ANSWERS` seconds."""
        await self._end(self._workers)
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_ANSWERS):
                if self._link.up.is_set():
                    # Not with the loop's limit but ours: nats-py waits long for a server that just went away.
                    for subscription in self._subscriptions:
                        with suppress(*FOREIGN):
                            await subscription.drain()
                while self._answers:
                    await asyncio.wait(self._answers)

    async def give_up(self) -> None:
        """End all that still runs for others; askers are told."""
        await self._end([*self._workers, *self._answers])

    async def close(self) -> None:
        """Send the last events, then let go of NATS."""
        await self.flush_events(LAST_EVENTS if self._link.streams.is_set() else 0)
        await self._end(self._keepers)
        # In a task of its own: whatever nats-py makes of a connection that is half gone (it asserts, it cancels), the
        # process is at its end and did its work.
        closing = asyncio.create_task(self._link.client.close())
        await asyncio.wait([closing], timeout=LAST_CLOSE)
        if not closing.done():
            closing.cancel()
        elif not closing.cancelled() and (problem := closing.exception()):
            self._trouble("NATS was not let go of in order", problem)

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        while waiting := [task for task in tasks if not task.done()]:
            for task in waiting:  # again and again: Python 3.11's wait_for, within nats-py, may swallow one
                task.cancel()
            await asyncio.wait(waiting, timeout=CANCEL_AGAIN)


@asynccontextmanager
async def connect(
    url: str, *, node: str, name: str, wait: float | None = None, trouble: Trouble = _ignore
) -> AsyncIterator[NatsBus]:
    """The bus at ``url``.

    With ``wait`` the first connection must stand within so many seconds, else `BusUnavailable`; without, the bus is
    given at once and what is asked, served and told meanwhile waits, because a service must start while NATS is away.
    On leaving: no new asks are taken, running ones are answered, queued events get `LAST_EVENTS` seconds to go out.
    Raises `InvalidInput` for a ``url`` that is none.
    """
    check_url(url)
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as standing:
        async with asyncio.TaskGroup() as answering:
            bus = NatsBus(Link(url, name, trouble), answering, standing, node, trouble)
            try:
                if wait is not None:
                    await _within(bus, wait, url)
                yield bus
                await bus.finish()
            except BaseException as error:  # noqa: BLE001  raised again below, outside the groups, as itself
                failure = error
            await bus.give_up()
        await bus.close()
    if failure is not None:
        raise failure


async def _within(bus: NatsBus, wait: float, url: str) -> None:
    try:
        async with asyncio.timeout(wait):
            await bus._link.streams.wait()  # noqa: SLF001
    except TimeoutError as error:
        reason = bus._link.why_not()  # noqa: SLF001
        raise BusUnavailable(
            f"no NATS with JetStream at {hosts(url)} within {wait:g} s ({reason}): is nats-server -js running?"
        ) from error
