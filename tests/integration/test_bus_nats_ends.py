# SPDX-License-Identifier: Apache-2.0
"""Jobs and asks when processes end: killed in the middle, or in good order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.errors import Unavailable
from soci_bus import asks, nats, nats_jobs
from soci_bus.face import Context
from soci_bus.nats import connect
from support.bus import D1, D2, LIMIT, NatsServer, failing, until

FOUND = asks.IndexFound(D2, "explicit", ())

WORKER = """
import asyncio, sys
from soci_bus import asks, nats_jobs
from soci_bus.nats import connect
nats_jobs.JOB_ACK_WAIT = 1.5
async def main():
    async def handler(job, job_id):
        print("took", job_id, flush=True)
        await asyncio.Event().wait()
    async with connect(sys.argv[1], node="n1", name="worker", wait=20) as bus:
        await bus.work(asks.BuildIndex, handler)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS of this test's own, not started."""
    nats_server = NatsServer(tmp_path)
    yield nats_server
    nats_server.kill()


async def test_a_job_of_a_killed_worker_goes_to_another(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker killed in the middle of a job takes it with it only until the job's acknowledgement is due."""
    monkeypatch.setattr(nats_jobs, "JOB_ACK_WAIT", 1.5)
    server.start()
    done: list[str] = []

    async def handler(_job: asks.BuildIndex, job_id: str) -> None:
        done.append(job_id)

    pipe = asyncio.subprocess.PIPE
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, server.url, stdout=pipe, env=os.environ)
    assert worker.stdout is not None
    try:
        async with connect(server.url, node="n1", name="a", wait=LIMIT) as bus:
            await bus.submit(asks.BuildIndex("r/a"), "j1")
            async with asyncio.timeout(LIMIT):
                assert await worker.stdout.readline() == b"took j1\n"
            worker.send_signal(signal.SIGKILL)
            await bus.work(asks.BuildIndex, handler)
            await until(lambda: done == ["j1"], "the job done by another")
    finally:
        if worker.returncode is None:
            worker.kill()
        await worker.communicate()


async def test_a_job_of_a_stopped_worker_is_given_back(server: NatsServer) -> None:
    """A worker that ends in good order gives the job in hand back, and the next one has it long before 30 s."""
    server.start()
    took, done = asyncio.Event(), asyncio.Event()

    async def slow(_job: asks.BuildIndex, _job_id: str) -> None:
        took.set()
        await asyncio.Event().wait()

    async def handler(_job: asks.BuildIndex, _job_id: str) -> None:
        done.set()

    async with connect(server.url, node="n1", name="b", wait=LIMIT) as other:
        async with connect(server.url, node="n1", name="a", wait=LIMIT) as bus:
            await bus.work(asks.BuildIndex, slow)
            await bus.submit(asks.BuildIndex("r/a"), "j1")
            await took.wait()
        await other.work(asks.BuildIndex, handler)
        async with asyncio.timeout(nats_jobs.JOB_ACK_WAIT - 5):
            await done.wait()


async def test_the_end_answers_what_was_taken(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way out a short ask is still answered, and the asker of a long one is told that it was given up."""
    monkeypatch.setattr(nats, "LAST_ANSWERS", 1.0)
    server.start()
    taken, leaving = asyncio.Semaphore(0), asyncio.Event()

    async def handler(ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        taken.release()
        await leaving.wait()
        if ask.image == "long":
            await asyncio.Event().wait()
        return FOUND

    async with connect(server.url, node="n1", name="a", wait=LIMIT) as asker, asyncio.TaskGroup() as group:
        async with connect(server.url, node="n1", name="b", wait=LIMIT) as bus:
            await bus.serve(asks.FindIndex, handler)
            short = group.create_task(asker.ask(asks.FindIndex("short", D1), timeout=LIMIT))
            long = group.create_task(failing(asker.ask(asks.FindIndex("long", D1), timeout=299)))
            await taken.acquire()
            await taken.acquire()
            leaving.set()
        assert await short == FOUND
        async with asyncio.timeout(LIMIT):
            error = await long
    assert isinstance(error, Unavailable)
    assert "going down" in str(error)
