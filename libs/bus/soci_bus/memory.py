# SPDX-License-Identifier: Apache-2.0
"""The bus inside one process, with the same face and the same encoding, for tests of what stands at the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from soci.errors import BusUnavailable, DeadlineExceeded, InvalidInput, LimitExceeded, SociError
from soci.launch import TraceParent
from soci_bus import wire
from soci_bus.asks import Ask
from soci_bus.events import Event
from soci_bus.face import LONGEST_ASK, Context, Handler, JobHandler, NoticeT
from soci_bus.notices import Notice

KEPT = 100_000
"""Events and jobs that are kept."""
JOB_TRIES = 3

Answer = TypeVar("Answer")
AskT = TypeVar("AskT", bound=Ask[Any])
_Server = tuple[type[Ask[Any]], Handler]
_Worker = tuple[type[Ask[Any]], JobHandler]


class MemoryBus:
    """See `soci_bus.face.Bus`. Messages are encoded and decoded as on the wire, so that a type error shows here.

    It has no tasks of its own: a job is done within `submit`, or within `work` where it came before its worker.
    `publish` raises for an event that cannot be encoded, where the real bus would only tell of it.
    """

    def __init__(self, node: str = "here") -> None:
        self.node = node
        self.events: list[wire.Envelope] = []
        self._servers: dict[str, list[_Server]] = {}
        self._workers: dict[str, list[_Worker]] = {}
        self._hearers: dict[str, list[tuple[type[Notice], Callable[[Any], None]]]] = {}
        self._jobs: dict[str, tuple[str, bytes]] = {}  # subject -> verb and body of a job that nobody took yet
        self._submitted: set[str] = set()
        self._watchers: list[tuple[str, asyncio.Queue[wire.Envelope]]] = []

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """Ask whoever serves the verb here; several take turns."""
        servers = self._servers.get(ask.verb)
        sent = wire.encode(ask)
        if not servers:
            raise BusUnavailable(f"no process answers {ask.verb}")
        servers.append(servers.pop(0))
        cls, handler = servers[-1]
        timeout = min(timeout, LONGEST_ASK)
        headers: dict[str, str] | None = None
        try:
            async with asyncio.timeout(timeout) as patience:
                body = wire.encode(await handler(wire.decode(sent, cls), Context(trace, timeout)))
        except SociError as error:
            headers, body = wire.write_error(error)
        except Exception as error:
            if patience.expired():
                raise DeadlineExceeded(f"{ask.verb} gave no answer within {timeout:g} s") from error
            headers, body = wire.write_error(SociError(f"{ask.verb}: internal error {type(error).__name__}"))
        answer: Answer = wire.read_answer(headers, body, ask)
        return answer

    async def serve(self, cls: type[AskT], handler: Handler, *, queue: str = "") -> None:  # noqa: ARG002
        """Answer asks of ``cls`` from now on."""
        self._servers.setdefault(cls.verb, []).append((cls, handler))

    def publish(self, event: Event) -> None:
        """Keep the event in ``events``."""
        subject = wire.event_subject(self.node, event)
        headers = {wire.TIME_HEADER: str(time.time_ns())}
        sequence = self.events[-1].sequence + 1 if self.events else 1
        envelope = wire.decode_event(subject, headers, wire.encode(event), sequence)
        if envelope:
            del self.events[: max(0, len(self.events) + 1 - KEPT)]
            self.events.append(envelope)
            for id_, queue in self._watchers:
                if id_ in {"*", event.id} and not queue.full():
                    queue.put_nowait(envelope)

    async def tell(self, notice: Notice) -> None:
        """Say it to all who listen now."""
        body = wire.encode(notice)
        for cls, heard in self._hearers.get(notice.word, []):
            with suppress(InvalidInput):
                heard(wire.decode(body, cls))

    async def hear(self, cls: type[NoticeT], heard: Callable[[NoticeT], None]) -> None:
        """Pass on notices of ``cls``."""
        self._hearers.setdefault(cls.word, []).append((cls, heard))

    async def submit(self, job: Ask[Any], job_id: str) -> None:
        """Have the job done, now or as soon as somebody works on its class. The same id twice is one job."""
        subject = wire.job_subject(job.verb, wire.token(job_id))
        body = wire.encode(job)
        if subject in self._submitted:
            return
        if len(self._jobs) >= KEPT:
            raise LimitExceeded(f"{KEPT} jobs wait already")
        self._submitted.add(subject)
        self._jobs[subject] = (job.verb, body)
        await self._do(job.verb)

    async def work(self, cls: type[AskT], handler: JobHandler) -> None:
        """Work on jobs of ``cls``."""
        self._workers.setdefault(cls.verb, []).append((cls, handler))
        await self._do(cls.verb)

    async def _do(self, verb: str) -> None:
        workers = self._workers.get(verb)
        while workers and (waiting := [subject for subject, (of, _) in self._jobs.items() if of == verb]):
            _, body = self._jobs.pop(waiting[0])
            for _ in range(JOB_TRIES):
                workers.append(workers.pop(0))
                cls, handler = workers[-1]
                try:
                    await handler(wire.decode(body, cls), waiting[0].rpartition(".")[2])
                except Exception:  # noqa: BLE001, S112  as on the real bus: the next one tries
                    continue
                break

    async def history(self, noun: str = "*", id: str = "*", happened: str = "*") -> AsyncIterator[wire.Envelope]:  # noqa: A002
        """The events kept so far that match."""
        for envelope in list(self.events):
            event = envelope.event
            pairs = ((event.noun, noun), (event.id, id), (event.happened, happened))
            if all(wanted in {"*", has} for has, wanted in pairs):
                yield envelope

    @asynccontextmanager
    async def watching(self, id: str) -> AsyncIterator[AsyncIterator[wire.Envelope]]:  # noqa: A002
        """Events of one id as they are kept, all that follow the beginning of the block."""
        watcher = (id, asyncio.Queue[wire.Envelope](KEPT))
        self._watchers.append(watcher)

        async def envelopes() -> AsyncIterator[wire.Envelope]:
            while True:
                yield await watcher[1].get()

        try:
            yield envelopes()
        finally:
            self._watchers.remove(watcher)
