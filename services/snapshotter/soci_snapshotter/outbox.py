# SPDX-License-Identifier: Apache-2.0
"""The snapshot log, published: what SQLite has and JetStream has not yet goes out in order, each event once.

An event's message id is its number, so that one sent twice around a crash is stored once.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from soci.errors import InvalidMessage, SociError
from soci_bus.events import Event, SnapshotChanged
from soci_runtime.logs import log
from soci_snapshotter.store import SnapshotStore


class Publisher(Protocol):
    """What is needed of the bus."""

    node: str

    async def publish_now(self, event: Event, *, at_ns: int, message_id: str) -> None:
        """Store one event; `BusUnavailable`, `InvalidMessage`."""
        ...


BATCH = 200
"""Events read from the log at a time."""
LOOK_EVERY = 0.5
"""Seconds between two looks for new events; nobody waits for them."""
AWAY_WAIT = 5.0
"""Seconds until the next try after the bus was away."""


async def publish_log(store: SnapshotStore, bus: Publisher, thread: ThreadPoolExecutor) -> None:
    """Publish for as long as the service runs. Trouble with bus or disk is waited out: nobody depends on this."""
    told = ""
    while True:
        try:
            sent = await publish_batch(store, bus, thread)
        except SociError as error:
            if str(error) != told:
                told = str(error)
                log.warning("the snapshot log is not published now", error=error)
            await asyncio.sleep(AWAY_WAIT)
            continue
        told = ""
        if sent < BATCH:
            await asyncio.sleep(LOOK_EVERY)


async def publish_batch(store: SnapshotStore, bus: Publisher, thread: ThreadPoolExecutor) -> int:
    """Publish the oldest events that are not out yet, at most `BATCH`; how many. Notes each that went, come what may.

    An event that no message can hold is left out, and told: it must not stop those behind it.
    """
    loop = asyncio.get_running_loop()
    batch = await loop.run_in_executor(thread, partial(store.unpublished, BATCH))
    done = 0
    try:
        for seq, at_ns, change in batch:
            event = SnapshotChanged(str(change.id), seq, change.what, change.name, change.parent)
            try:
                await bus.publish_now(event, at_ns=at_ns, message_id=f"snapshot-{bus.node}-{seq}-{at_ns}")
            except InvalidMessage as error:
                log.warning("an event of the snapshot log cannot be published", sequence=seq, error=error)
            done = seq
    finally:
        if done:
            await loop.run_in_executor(thread, partial(store.published, done))
    return len(batch)
