# SPDX-License-Identifier: Apache-2.0
"""Jobs over JetStream: a work queue, each job acknowledged when it is done and given to another worker when not."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.js import api

from soci.errors import InvalidMessage
from soci_bus import wire
from soci_bus.asks import Ask
from soci_bus.face import JobHandler
from soci_bus.nats_link import FOREIGN, JOBS_STREAM, RETRY_WAIT, Link, Once, Trouble

JOB_TRIES = 3
"""How often a job is given out before it is dropped."""
JOB_ACK_WAIT = 30.0
"""Seconds after which an unacknowledged job goes to another worker; a live worker says so thrice within them."""
JOB_LIMIT = 3600.0
"""Seconds that one try of a job may take."""
JOB_POLL = 5.0
"""Seconds of one request for a job. A request is lost with its NATS: so late a worker asks the next one."""
JOBS_AHEAD = 64
"""Jobs of one class that all workers together may have in hand."""


class Worker:
    """Takes jobs of one class, one at a time."""

    def __init__(self, link: Link, cls: type[Ask[Any]], handler: JobHandler, trouble: Trouble) -> None:
        self._link = link
        self._cls = cls
        self._handler = handler
        self._trouble = trouble

    async def run(self) -> None:
        """Work for as long as the bus is open. Cancelling it gives the job in hand back."""
        once = Once(self._trouble)
        while True:
            await self._link.streams.wait()
            try:
                subscription = await self._link.jetstream.pull_subscribe(
                    wire.job_subject(self._cls.verb, "*"),
                    durable=f"workers-{self._cls.verb}",
                    stream=JOBS_STREAM,
                    config=api.ConsumerConfig(
                        ack_policy=api.AckPolicy.EXPLICIT,
                        ack_wait=JOB_ACK_WAIT,
                        max_deliver=JOB_TRIES,
                        max_ack_pending=JOBS_AHEAD,
                    ),
                )
                try:
                    while True:
                        message = await self._next(subscription)
                        once.over()
                        if message:
                            await self._one(message)
                finally:
                    with suppress(*FOREIGN):
                        await subscription.unsubscribe()
            except FOREIGN as error:  # a NATS without its old disk has no such consumer any more: make it anew
                if self._link.client.is_closed:
                    return
                once.tell(f"waiting for {self._cls.verb} jobs", error)
                await asyncio.sleep(RETRY_WAIT)

    async def _next(self, subscription: Any) -> Msg | None:
        try:
            (message,) = await subscription.fetch(1, timeout=JOB_POLL)
        except TimeoutError:  # nats-py's is one too
            return None
        return message

    async def _one(self, message: Msg) -> None:
        try:
            job = wire.decode(message.data, self._cls)
        except InvalidMessage as error:
            self._trouble(f"a {self._cls.verb} job does not parse and is dropped", error)
            with suppress(*FOREIGN):
                await message.term()
            return
        try:
            async with asyncio.TaskGroup() as group, asyncio.timeout(JOB_LIMIT):
                beat = group.create_task(_still_here(message))
                try:
                    await self._handler(job, message.subject.rpartition(".")[2])
                finally:
                    beat.cancel()
        except asyncio.CancelledError:
            with suppress(*FOREIGN):
                await message.nak()  # at once to another worker: this one is going down
            raise
        except ExceptionGroup as group_error:  # one job's failure must not end the worker
            await self._failed(message, group_error.exceptions[0])
        else:
            with suppress(*FOREIGN):
                await message.ack()

    async def _failed(self, message: Msg, error: Exception) -> None:
        last = message.metadata.num_delivered >= JOB_TRIES
        self._trouble(f"a {self._cls.verb} job failed" + (" for the last time and is dropped" if last else ""), error)
        with suppress(*FOREIGN):
            if last:
                await message.term()
            else:
                await message.nak(delay=RETRY_WAIT)


async def _still_here(message: Msg) -> None:
    while True:
        await asyncio.sleep(JOB_ACK_WAIT / 3)
        with suppress(*FOREIGN):
            await message.in_progress()
