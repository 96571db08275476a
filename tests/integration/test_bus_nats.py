# SPDX-License-Identifier: Apache-2.0
"""The bus over a NATS that is not there yet, goes away, comes back, forgets, and lacks JetStream."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.errors import BusUnavailable, InvalidInput, InvalidMessage
from soci_bus import asks, events, nats_events, nats_jobs, nats_link
from soci_bus.face import Context
from soci_bus.nats import connect
from support.bus import D1, D2, LIMIT, NatsServer, failing, until

ASK = asks.FindIndex("r/a:1", D1)
FOUND = asks.IndexFound(D2, "explicit", ())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS of this test's own, not started."""
    nats_server = NatsServer(tmp_path)
    yield nats_server
    nats_server.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ask waits less long for a NATS that is away, and a worker for an answer that went with it."""
    monkeypatch.setattr(nats_link, "RECONNECT_GRACE", 0.2)
    monkeypatch.setattr(nats_jobs, "JOB_POLL", 0.5)


async def answer(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
    return FOUND


class Told:
    """What the bus found worth telling."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, what: str, error: BaseException | None) -> None:
        self.lines.append(f"{what}: {error}")

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


@pytest.mark.usefixtures("impatient")
async def test_nats_killed_and_started_again(server: NatsServer) -> None:
    """While it is away asks fail as `BusUnavailable`; then they work, events arrive once, and jobs are taken."""
    server.start()
    told, jobs = Told(), list[str]()

    async def handler(_job: asks.BuildIndex, job_id: str) -> None:
        jobs.append(job_id)

    async with (
        connect(server.url, node="n1", name="a", wait=LIMIT, trouble=told) as bus,
        connect(server.url, node="n1", name="b", wait=LIMIT) as other,
    ):
        await other.serve(asks.FindIndex, answer, queue="q")
        await other.work(asks.BuildIndex, handler)
        assert await bus.ask(ASK, timeout=LIMIT) == FOUND
        bus.publish(events.IndexBegun("e", "before"))
        await bus.flush_events(LIMIT)
        async with bus.watching("later") as watched:
            await asyncio.to_thread(server.kill)
            await until(lambda: "NATS is away" in told, "the loss told")
            with pytest.raises(BusUnavailable, match="NATS is away"):
                await bus.ask(ASK, timeout=LIMIT)
            with pytest.raises(BusUnavailable, match="NATS is away"):
                await bus.submit(asks.BuildIndex("r/a"), "j0")
            with pytest.raises(BusUnavailable, match="NATS is away"):
                _ = [one async for one in bus.history()]
            for number in range(200):
                bus.publish(events.IndexBegun("e", str(number)))
            await asyncio.to_thread(server.start)
            await until(lambda: bus.up.is_set() and other.up.is_set(), "both back")
            assert await bus.ask(ASK, timeout=LIMIT) == FOUND
            await bus.flush_events(LIMIT)
            kept = [one.event async for one in bus.history(id="e")]
            assert kept == [events.IndexBegun("e", text) for text in ("before", *map(str, range(200)))]
            await until(bus._link.streams.is_set, "streams")
            await bus.submit(asks.BuildIndex("r/a"), "j1")
            await until(lambda: jobs == ["j1"], "the job done")
            other.publish(events.IndexBegun("later", "x"))
            async with asyncio.timeout(LIMIT):
                assert (await anext(watched)).event == events.IndexBegun("later", "x")
    assert len([line for line in told.lines if "cannot be reached" in line]) <= 2


async def test_an_ask_under_way_fails_when_nats_goes(server: NatsServer) -> None:
    """Its answer is lost, so it does not wait for its deadline but fails at once."""
    server.start()
    asked = asyncio.Event()

    async def never(_ask: asks.FindIndex, _context: Context) -> asks.IndexFound:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        connect(server.url, node="n1", name="a", wait=LIMIT) as bus,
        connect(server.url, node="n1", name="b", wait=LIMIT) as other,
    ):
        await other.serve(asks.FindIndex, never)
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(failing(bus.ask(ASK, timeout=299)))
            await asked.wait()
            await asyncio.to_thread(server.kill)
            async with asyncio.timeout(LIMIT):
                assert isinstance(await asking, BusUnavailable)
        other._answers.copy().pop().cancel()


@pytest.mark.usefixtures("impatient")
async def test_started_before_nats(server: NatsServer) -> None:
    """What is served, worked on, told and asked before NATS is there holds once it is; why it waits is told once."""
    told, jobs = Told(), list[str]()

    async def handler(_job: asks.BuildIndex, job_id: str) -> None:
        jobs.append(job_id)

    async with connect(server.url, node="n1", name="a", trouble=told) as bus:
        await bus.serve(asks.FindIndex, answer)
        await bus.work(asks.BuildIndex, handler)
        bus.publish(events.IndexBegun("e", "early"))
        with pytest.raises(BusUnavailable, match="NATS is away"):
            await bus.ask(ASK, timeout=LIMIT)
        await until(lambda: "cannot be reached" in told, "why told")
        await asyncio.to_thread(server.start)
        await until(bus._link.streams.is_set, "NATS found")
        assert await bus.ask(ASK, timeout=LIMIT) == FOUND
        await bus.flush_events(LIMIT)
        assert [one.event async for one in bus.history(id="e")] == [events.IndexBegun("e", "early")]
        await bus.submit(asks.BuildIndex("r/a"), "j1")
        await until(lambda: jobs == ["j1"], "the job done")
    assert len([line for line in told.lines if "cannot be reached" in line]) == 1


@pytest.mark.usefixtures("impatient")
async def test_served_while_nats_is_away(server: NatsServer) -> None:
    """A subscription that is wanted in an outage is made after it."""
    server.start()
    told = Told()
    async with connect(server.url, node="n1", name="a", wait=LIMIT, trouble=told) as bus:
        await asyncio.to_thread(server.kill)
        await until(lambda: "NATS is away" in told, "the loss told")
        await bus.serve(asks.FindIndex, answer)
        await asyncio.to_thread(server.start)
        await until(bus.up.is_set, "NATS back")
        assert await bus.ask(ASK, timeout=LIMIT) == FOUND


@pytest.mark.usefixtures("impatient")
async def test_nats_comes_back_without_its_disk(server: NatsServer) -> None:
    """Streams and the workers' queue are made anew: events are stored and jobs done as before."""
    server.start()
    jobs: list[str] = []

    async def handler(_job: asks.BuildIndex, job_id: str) -> None:
        jobs.append(job_id)

    async with connect(server.url, node="n1", name="a", wait=LIMIT) as bus:
        await bus.work(asks.BuildIndex, handler)
        await bus.submit(asks.BuildIndex("r/a"), "j1")
        await until(lambda: jobs == ["j1"], "the first job done")
        await asyncio.to_thread(server.kill)
        await until(lambda: not bus.up.is_set(), "the loss seen")
        shutil.rmtree(server.folder / "storage")
        await asyncio.to_thread(server.start)
        await until(bus._link.streams.is_set, "streams made anew")
        bus.publish(events.IndexBegun("e", "after"))
        await bus.flush_events(LIMIT)
        assert [one.event async for one in bus.history(id="e")] == [events.IndexBegun("e", "after")]
        await bus.submit(asks.BuildIndex("r/a"), "j2")
        await until(lambda: jobs == ["j1", "j2"], "the second job done")


async def test_a_full_event_queue_drops_the_oldest(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit while NATS is away is counted and told, and the newest events are those that arrive."""
    monkeypatch.setattr(nats_events, "EVENT_QUEUE", 10)
    told = Told()
    async with connect(server.url, node="n1", name="a", trouble=told) as bus:
        for number in range(25):
            bus.publish(events.IndexBegun("e", str(number)))
        assert bus.dropped == 15
        assert len([line for line in told.lines if "queue of 10 is full" in line]) == 4  # the 1st, 2nd, 4th, 8th
        await asyncio.to_thread(server.start)
        await until(bus.up.is_set, "NATS found")
        async with asyncio.timeout(LIMIT):
            await bus._sender._queue.join()
        kept = [one.event async for one in bus.history(id="e")]
    assert kept == [events.IndexBegun("e", str(number)) for number in range(15, 25)]


async def test_one_odd_event_does_not_silence_the_next(server: NatsServer) -> None:
    """An event that cannot be encoded, or is too large, is told of and left out."""
    server.start()
    told = Told()
    async with connect(server.url, node="n1", name="a", wait=LIMIT, trouble=told) as bus:
        for text in ("\udce4", "x" * (1 << 20), "good"):
            bus.publish(events.IndexBegun("e", text))
        await bus.flush_events(LIMIT)
        assert [one.event async for one in bus.history(id="e")] == [events.IndexBegun("e", "good")]
    assert len(told.lines) == 2


async def test_foreign_words_on_our_subjects(server: NatsServer) -> None:
    """Nonsense sent as ask, answer, event or job does no harm, and is told where it is ours to read."""
    server.start()
    told = Told()
    async with connect(server.url, node="n1", name="a", wait=LIMIT, trouble=told) as bus:
        await bus.serve(asks.FindIndex, answer)
        await bus.work(asks.BuildIndex, None)  # type: ignore[arg-type]
        stranger = bus._link.client
        reply = await stranger.request("soci.ask.n1.find-index", b"\xff", timeout=LIMIT)
        assert reply.headers["Soci-Error"] == "invalid-message"
        await stranger.publish("soci.ask.n1.find-index", b"\xff")  # wants no answer

        async def nonsense(message: object) -> None:
            await message.respond(b"\xc1")  # type: ignore[attr-defined]

        await stranger.subscribe("soci.ask.n1.check-mounts", cb=nonsense)
        with pytest.raises(InvalidMessage):
            await bus.ask(asks.CheckMounts(()), timeout=LIMIT)
        await bus._link.jetstream.publish("soci.job.build-index.x", b"\xff")
        await until(lambda: "job does not parse" in told, "the bad job told")
        await bus._link.jetstream.publish("soci.evt.n1.index.e.begun", b"\xff")
        await bus._link.jetstream.publish("soci.evt.n1.index.e", b"")
        bus.publish(events.IndexBegun("e", "good"))
        await bus.flush_events(LIMIT)
        assert [one.event async for one in bus.history(id="e")] == [events.IndexBegun("e", "good")]
        assert await bus.ask(ASK, timeout=LIMIT) == FOUND


async def test_leaving_while_nats_is_away(server: NatsServer) -> None:
    """A bus can be left at any time: before NATS came, and after it went."""
    async with asyncio.timeout(LIMIT):
        async with connect(server.url, node="n1", name="a") as bus:
            await bus.serve(asks.FindIndex, answer)
            bus.publish(events.IndexBegun("e", "x"))
        await asyncio.to_thread(server.start)
        async with connect(server.url, node="n1", name="a", wait=LIMIT) as bus:
            await bus.serve(asks.FindIndex, answer)
            await asyncio.to_thread(server.kill)
            await until(lambda: not bus.up.is_set(), "the loss seen")


async def test_an_error_inside_comes_out_as_itself(server: NatsServer) -> None:
    """The block's own exception is not wrapped in a group, nor kept by a handler that still runs."""
    server.start()
    with pytest.raises(ZeroDivisionError):
        async with connect(server.url, node="n1", name="a", wait=LIMIT):
            raise ZeroDivisionError


@pytest.mark.usefixtures("impatient")
async def test_without_jetstream(tmp_path: Path) -> None:
    """A NATS without JetStream is named as the reason, in error and trouble; asks work all the same."""
    plain = NatsServer(tmp_path, jetstream=False)
    plain.start()
    told = Told()
    try:
        with pytest.raises(BusUnavailable, match="without JetStream: start nats-server with -js"):
            async with connect(plain.url, node="n1", name="a", wait=2):
                pass
        async with connect(plain.url, node="n1", name="a", trouble=told) as bus:
            await bus.serve(asks.FindIndex, answer)
            assert await bus.ask(ASK, timeout=LIMIT) == FOUND
            await until(lambda: "without JetStream" in told, "why told")
            with pytest.raises(BusUnavailable, match="without JetStream"):
                await bus.submit(asks.BuildIndex("r/a"), "j1")
            with pytest.raises(BusUnavailable, match="without JetStream"):
                _ = [one async for one in bus.history()]
        assert len(told.lines) == 1
    finally:
        plain.kill()


async def test_no_nats_within_the_wait(server: NatsServer) -> None:
    """Who wants to wait only so long is told what to do; a password in the address is not."""
    with pytest.raises(BusUnavailable, match=rf"127.0.0.1:{server.port} within 0.2 s .*nats-server -js") as caught:
        async with connect(f"nats://me:secret@127.0.0.1:{server.port}", node="n1", name="a", wait=0.2):
            pass
    assert "secret" not in str(caught.value)


async def test_who_serves_is_heard_at_once() -> None:
    """When `serve` returns the server has the subscription: it answered a PING that came behind it."""
    lines: list[bytes] = []

    async def nats_by_hand(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":1048576}\r\n')
        while line := await reader.readline():
            lines.append(line.strip())
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    listener = await asyncio.start_server(nats_by_hand, "127.0.0.1", 0, family=socket.AF_INET)
    port = listener.sockets[0].getsockname()[1]
    async with listener, connect(f"nats://127.0.0.1:{port}", node="n1", name="a") as bus:
        await until(bus.up.is_set, "connected")
        await bus.serve(asks.FindIndex, answer, queue="q")
        behind = lines[next(at for at, line in enumerate(lines) if line.startswith(b"SUB soci.ask")) :]
        assert b"PING" in behind


async def test_something_else_answers(tmp_path: Path) -> None:
    """A port where no NATS is behind is trouble, told once, and no crash."""
    del tmp_path
    told = Told()

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-x\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(greet, "127.0.0.1", 0, family=socket.AF_INET)
    port = listener.sockets[0].getsockname()[1]
    async with listener, connect(f"nats://127.0.0.1:{port}", node="n1", name="a", trouble=told) as bus:
        await until(lambda: "cannot be reached" in told, "trouble")
        assert not bus.up.is_set()


@pytest.mark.parametrize("url", ["", "http://x", "nats://", "nats://h:0x", "nats://h:99999", "nats://[::1", "a,,b"])
async def test_an_address_that_is_none(url: str) -> None:
    """It is refused before anything is begun."""
    with pytest.raises(InvalidInput, match="not the address"):
        async with connect(url, node="n1", name="a"):
            pass
