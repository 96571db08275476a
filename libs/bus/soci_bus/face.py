# SPDX-License-Identifier: Apache-2.0
"""The bus's face: what a service sees of it, whether NATS or memory is behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from soci.launch import TraceParent
from soci_bus.asks import Ask
from soci_bus.events import Event
from soci_bus.notices import Notice
from soci_bus.wire import Envelope

Answer = TypeVar("Answer")
AskT = TypeVar("AskT", bound=Ask[Any])
NoticeT = TypeVar("NoticeT", bound=Notice)

LONGEST_ASK = 300.0
"""Seconds: an ask that would wait longer is cut to this."""


@dataclass(frozen=True, slots=True)
class Context:
    """What came with an ask: its trace, and how many seconds the asker still waits."""

    trace: TraceParent | None
    timeout: float


Handler = Callable[[Any, Context], Awaitable[Any]]
JobHandler = Callable[[Any, str], Awaitable[None]]


class Bus(Protocol):
    """Asks, events and jobs. `soci_bus.nats.connect` and `soci_bus.memory.MemoryBus` are the two that exist."""

    node: str

    async def ask(self, ask: Ask[Answer], *, timeout: float, trace: TraceParent | None = None) -> Answer:  # noqa: ASYNC109
        """Ask this node's server of the verb; raises what it raised, `BusUnavailable` or `DeadlineExceeded`."""
        ...

    async def serve(self, cls: type[AskT], handler: Handler, *, queue: str = "") -> None:
        """Answer asks of a class from now on; servers with the same ``queue`` share them."""
        ...

    def publish(self, event: Event) -> None:
        """Queue an event for the stream; never waits and never fails (see `soci_bus.events`)."""
        ...

    async def tell(self, notice: Notice) -> None:
        """Say it to all nodes that listen now; it is lost where NATS is away. Never fails, never waits for NATS."""
        ...

    async def hear(self, cls: type[NoticeT], heard: Callable[[NoticeT], None]) -> None:
        """Pass on every node's notices of a class from now on, our own too; what does not parse is passed over."""
        ...

    async def submit(self, job: Ask[Any], job_id: str) -> None:
        """Put a job on the work queue; it is there once this returns."""
        ...

    async def work(self, cls: type[AskT], handler: JobHandler) -> None:
        """Take jobs of a class, one at a time, from now on."""
        ...

    def history(self, noun: str = "*", id: str = "*", happened: str = "*") -> AsyncIterator[Envelope]:  # noqa: A002
        """The stored events that match, oldest first, up to now."""
        ...

    def watching(self, id: str) -> AbstractAsyncContextManager[AsyncIterator[Envelope]]:  # noqa: A002
        """Events of one id as they happen, all that follow the beginning of the ``async with`` block."""
        ...
