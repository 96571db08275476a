# SPDX-License-Identifier: Apache-2.0
"""The bus inside one process, with the same face and the same encoding, for tests of what stands at the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from soci.errors import BusUnavailable, DeadlineExceeded, SociError
from soci.launch import TraceParent
from soci_bus import wire
from soci_bus.asks import Ask
from soci_bus.events import Event
from soci_bus.face import Context, Handler, JobHandler

Answer = TypeVar("Answer")
AskT = TypeVar("AskT", bound=Ask[Any])


class MemoryBus:
    """See `soci_bus.face.Bus`. Messages are encoded and decoded as on the wire, so that a type error shows here."""

    def __init__(self, node: str = "here") -> None:
        self.node = node
        self.events: list[wire.Envelope] = []
        self._servers: dict[str, tuple[type[Ask[Any]], Handler]] = {}
        self._workers: dict[str, tuple[type[Ask[Any]], JobHandler]] = {}

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """Ask whoever serves the verb here."""
        if ask.verb not in self._servers:
            raise BusUnavailable(f"no process answers {ask.verb}")
        cls, handler = self._servers[ask.verb]
        try:
            async with asyncio.timeout(timeout):
                body = wire.encode(await handler(wire.decode(wire.encode(ask), cls), Context(trace, timeout)))
            headers = None
        except SociError as error:
            body, headers = str(error).encode(), wire.error_headers(error)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{ask.verb} gave no answer within {timeout:g} s") from error
        answer: Answer = wire.read_answer(headers, body, ask)
        return answer

    async def serve(self, cls: type[AskT], handler: Handler, *, queue: str = "") -> None:  # noqa: ARG002
        """Answer asks of ``cls``; the newest server wins."""
        self._servers[cls.verb] = (cls, handler)

    def publish(self, event: Event) -> None:
        """Keep the event in ``events``."""
        subject = wire.event_subject(self.node, event)
        headers = {wire.TIME_HEADER: str(time.time_ns())}
        envelope = wire.decode_event(subject, headers, wire.encode(event), len(self.events) + 1)
        if envelope:
            self.events.append(envelope)

    async def submit(self, job: Ask[Any], job_id: str) -> None:
        """Do the job at once."""
        if job.verb not in self._workers:
            raise BusUnavailable(f"no process works on {job.verb}")
        cls, handler = self._workers[job.verb]
        await handler(wire.decode(wire.encode(job), cls), job_id)

    async def work(self, cls: type[AskT], handler: JobHandler) -> None:
        """Work on jobs of ``cls``."""
        self._workers[cls.verb] = (cls, handler)

    async def history(self, noun: str = "*", id: str = "*", happened: str = "*") -> AsyncIterator[wire.Envelope]:  # noqa: A002
        """The events kept so far that match."""
        for envelope in list(self.events):
            event = envelope.event
            if all(fnmatchcase(*pair) for pair in ((event.noun, noun), (event.id, id), (event.happened, happened))):
                yield envelope

    @asynccontextmanager
    async def watching(self, id: str) -> AsyncIterator[AsyncIterator[wire.Envelope]]:  # noqa: A002
        """Events of one id as they are kept, all that follow the beginning of the block."""
        seen = len(self.events)

        async def envelopes() -> AsyncIterator[wire.Envelope]:
            at = seen
            while True:
                for envelope in self.events[at:]:
                    at += 1
                    if envelope.event.id == id:
                        yield envelope
                await asyncio.sleep(0.01)

        yield envelopes()
