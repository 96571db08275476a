# SPDX-License-Identifier: Apache-2.0
"""The snapshot log, published: what SQLite has and JetStream has not yet goes out in order, each event once.

An event's message id is its number, so that one sent twice around a crash is stored once.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from soci.errors import BusUnavailable
from soci_bus.events import SnapshotChanged
from soci_bus.nats import NatsBus
from soci_snapshotter.store import SnapshotStore

BATCH = 200
"""Events read from the log at a time."""
LOOK_EVERY = 0.5
"""Seconds between two looks for new events; nobody waits for them."""
AWAY_WAIT = 5.0
"""Seconds until the next try after the bus was away."""


async def publish_log(store: SnapshotStore, bus: NatsBus, thread: ThreadPoolExecutor) -> None:
    """Publish for as long as the service runs."""
    loop = asyncio.get_running_loop()
    while True:
        batch = await loop.run_in_executor(thread, partial(store.unpublished, BATCH))
        try:
            for seq, at_ns, change in batch:
                number = seq if change.what == "prepared" else change.id
                event = SnapshotChanged(str(number), seq, change.what, change.name, change.parent)
                await bus.publish_now(event, at_ns=at_ns, message_id=f"snapshot-{bus.node}-{seq}-{at_ns}")
        except BusUnavailable:
            await asyncio.sleep(AWAY_WAIT)
            continue
        if batch:
            await loop.run_in_executor(thread, partial(store.published, batch[-1][0]))
        if len(batch) < BATCH:
            await asyncio.sleep(LOOK_EVERY)
