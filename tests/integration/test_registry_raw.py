# SPDX-License-Identifier: Apache-2.0
"""Our own wire for ranges against servers that behave and misbehave byte by byte, on both event loops."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import ssl
import subprocess
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import pytest
import uvloop

from soci.digest import sha256_digest
from soci.errors import DeadlineExceeded, RegistryUnavailable, SociError
from soci_registry import NoCredentials, Registry, RegistrySettings, Repository
from soci_registry.route import Route
from soci_registry.urls import Place
from soci_registry.wire_raw import KEPT_PER_HOST

SETTINGS = RegistrySettings(
    use_environment_proxies=False,
    min_wait=0.01,
    range_max_wait=0.02,
    range_tries=2,
    range_bad_answer_tries=2,
    stall_timeout=0.25,
    header_timeout=0.25,
    range_deadline=20,
)
BLOB = random.Random(3).randbytes(2_000_000)
DIGEST = sha256_digest(BLOB)

Turn = Callable[[Reader, Writer, int, int], Awaitable[bool]]
"""Answers one request for bytes [start, end); whether another may follow."""


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[None]], None]:
    def runs(work: Awaitable[None]) -> None:
        async def main() -> None:
            await work

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())

    return runs


@dataclass
class Server:
    """``turns`` answer the first requests, ``after`` all others."""

    after: Turn
    turns: list[Turn] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    tls: ssl.SSLContext | None = None
    address: str = ""
    gone: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                start, end = head.split(b"bytes=")[1].split(b"\r\n")[0].split(b"-")
                turn = self.turns.pop(0) if self.turns else self.after
                if not await turn(reader, writer, int(start), int(end) + 1):
                    return
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.gone += 1
            writer.close()


def head_of(start: int, end: int, more: str = "", length: int | None = None) -> bytes:
    size = end - start if length is None else length
    return (
        f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{len(BLOB)}\r\n"
        f"Content-Length: {size}\r\n{more}\r\n"
    ).encode()


async def sound(_reader: Reader, writer: Writer, start: int, end: int) -> bool:
    writer.write(head_of(start, end) + BLOB[start:end])
    await writer.drain()
    return True


def once(content: bytes) -> Turn:
    """These bytes, and the end."""

    async def turn(_reader: Reader, writer: Writer, _start: int, _end: int) -> bool:
        writer.write(content)
        return False

    return turn


def slices(*sizes: int) -> Turn:
    """A sound answer that arrives in pieces."""

    async def turn(_reader: Reader, writer: Writer, start: int, end: int) -> bool:
        content, at = head_of(start, end) + BLOB[start:end], 0
        for size in sizes:
            writer.write(content[at : at + size])
            at += size
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(content[at:])
        return True

    return turn


def client(settings: RegistrySettings = SETTINGS) -> Registry:
    return Registry(settings=settings, credentials=NoCredentials())


async def read(it: Registry, server: Server, start: int, end: int) -> bytes:
    return await it.repository(f"{server.address}/team/app").blob_range(DIGEST, start, end)


def test_ranges_are_exact(run: Callable[[Awaitable[None]], None]) -> None:
    """Every byte of ranges of all sizes is right, however the answer is cut on its way; connections are used again."""

    async def work() -> None:
        turns = [slices(), slices(*[1] * 200), slices(90, 3, 1), slices(60_000, 70_000), slices(65_536, 65_536)]
        async with Server(sound, [*turns]) as server, client() as it:
            for size in (1, 10, 65_000, 65_536, 200_000, 1_999_999):
                assert await read(it, server, 1, 1 + size) == BLOB[1 : 1 + size]
            assert server.connections == 1

    run(work())


def test_many_at_once(run: Callable[[Awaitable[None]], None]) -> None:
    """Ranges that overlap in time don't mix, and no more connections than the limit are kept afterwards."""

    async def work() -> None:
        async with Server(sound) as server, client(replace(SETTINGS, connections_per_host=40)) as it:
            for _ in range(3):
                spans = [(at * 7919, at * 7919 + 100_000) for at in range(60)]
                got = await asyncio.gather(*(read(it, server, *span) for span in spans))
                assert got == [BLOB[start:end] for start, end in spans]
                assert 0 < sum(map(len, it._ranges._kept.values())) <= KEPT_PER_HOST

    run(work())


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


RANGE = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 100-199/2000000\r\n"
BODY = BLOB[100:200]


@pytest.mark.parametrize(
    "answer",
    [
        RANGE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY[:1], BODY[1:99], BODY[99:]),
        RANGE + b"\r\n" + BODY,
        RANGE.replace(b"1.1", b"1.0") + b"Content-Length: 100\r\n\r\n" + BODY,
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 Go\r\n\r\n" + RANGE + b"Content-Length: 100\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + BLOB,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(BLOB[:150], BLOB[150:]),
    ],
    ids=["chunked", "until the end", "HTTP/1.0", "interim", "whole", "whole in chunks"],
)
def test_other_sound_answers(run: Callable[[Awaitable[None]], None], answer: bytes) -> None:
    """All framings of the range, and the whole blob in its place, are read at the first try."""

    async def work() -> None:
        async with Server(once(answer)) as server, client() as it:
            assert await read(it, server, 100, 200) == BODY
            assert len(server.requests) == 1

    run(work())


LIES = [
    RANGE + b"Content-Length: 100\r\n\r\n" + BODY[:50],
    RANGE + b"Content-Length: 100\r\n\r\n" + BODY + b"x",
    RANGE + b"Content-Length: 101\r\n\r\n" + BODY + b"x",
    RANGE + b"Content-Length: 99\r\n\r\n" + BODY[:99],
    RANGE + b"Content-Length: 100\r\nContent-Length: 100\r\n\r\n" + BODY,
    RANGE + b"Content-Length: 100\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(BODY),
    RANGE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, b"x"),
    RANGE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY[:99]),
    RANGE + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY)[:-4],
    RANGE + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n" + BODY,
    RANGE + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 100_000,
    RANGE + b"\r\n" + BODY + b"x",
    RANGE + b"\r\n" + BODY[:99],
    RANGE + b"Content-Length: 100\n\n" + BODY,
    RANGE + b"X: y\r\n folded\r\nContent-Length: 100\r\n\r\n" + BODY,
    RANGE + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n" + BODY,
    RANGE + b"X: y\r\n" * 100_000 + b"\r\n" + BODY,
    b"HTTP/1.1 100 Go\r\n\r\n" * 100_000 + RANGE + b"Content-Length: 100\r\n\r\n" + BODY,
    b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\n" + RANGE + b"Content-Length: 100\r\n\r\n" + BODY,
    b"HTTP/1.1 204 None\r\n\r\n",
    b"HTTP/1.1 404 No\r\nContent-Length: 999999999999\r\n\r\n" + b"x" * 1_000_000,
    b"x" * 1_000_000,
    b"",
]


@pytest.mark.parametrize("answer", LIES, ids=map(str, range(len(LIES))))
def test_lies_are_refused(run: Callable[[Awaitable[None]], None], answer: bytes) -> None:
    """Whatever a server sends in place of a range, the range fails after its tries, and the next one is right."""

    async def work() -> None:
        async with Server(sound, [once(answer)] * 2) as server, client() as it:
            with pytest.raises(SociError):
                await read(it, server, 100, 200)
            server.turns.clear()
            assert await read(it, server, 100, 200) == BODY

    run(work())


def test_a_kept_connection_that_has_ended_is_no_failure(run: Callable[[Awaitable[None]], None]) -> None:
    """A server that closes a connection between two requests costs no try; a byte that nobody asked for ends one."""

    async def closing(reader: Reader, writer: Writer, start: int, end: int) -> bool:
        await sound(reader, writer, start, end)
        return False

    async def chatty(reader: Reader, writer: Writer, start: int, end: int) -> bool:
        await sound(reader, writer, start, end)
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 206 OK\r\n\r\n")
        return True

    async def hanging_up(_reader: Reader, _writer: Writer, _start: int, _end: int) -> bool:
        return False  # after the request came: to the client it looks as if the connection had been closed before

    async def work() -> None:
        turns: list[Turn] = [closing, chatty, sound, hanging_up]
        once_only = replace(SETTINGS, range_tries=1, range_bad_answer_tries=1)
        async with Server(sound, turns) as server, client(once_only) as it:
            for at in range(5):
                assert await read(it, server, at, at + 1000) == BLOB[at : at + 1000]
                await asyncio.sleep(0.1)
            assert len(server.requests) == 6
            assert server.connections == 4
            server.turns = [hanging_up, hanging_up]  # a new connection that breaks is a failure
            with pytest.raises(RegistryUnavailable):
                await read(it, server, 0, 1000)

    run(work())


async def unfinished(_reader: Reader, writer: Writer, _start: int, _end: int) -> bool:
    writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 5000)
    await writer.drain()
    await asyncio.sleep(0.2)
    writer.write(head_of(0, 10) + b"the wrong " * 1000)
    return True


async def parting(_reader: Reader, writer: Writer, start: int, end: int) -> bool:
    writer.write(head_of(start, end, "Connection: close\r\n") + BLOB[start:end])
    return True


@pytest.mark.parametrize("turn", [unfinished, parting], ids=["unread body", "said goodbye"])
def test_connections_that_are_not_used_again(run: Callable[[Awaitable[None]], None], turn: Turn) -> None:
    """Neither one whose answer was not read to its end, nor one that the server will close."""

    async def work() -> None:
        async with Server(sound, [turn, turn]) as server, client(replace(SETTINGS, range_tries=3)) as it:
            for _ in range(3):
                assert await read(it, server, 0, 10) == BLOB[:10]
            assert server.connections == 3

    run(work())


def drip(pause: float, before_head: int) -> Turn:
    """A byte now and then, of the head or of the body."""

    async def turn(_reader: Reader, writer: Writer, start: int, end: int) -> bool:
        content = head_of(start, end) + BLOB[start:end]
        at = before_head or len(head_of(start, end))
        writer.write(content[:at])
        while True:
            await asyncio.sleep(pause)
            writer.write(content[at : at + 1])
            await writer.drain()
            at += 1

    return turn


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (drip(30, 10), "no answer within 0.25 s"),
        (drip(0.02, 10), "no answer within 0.25 s"),
        (drip(30, 0), "no byte for 0.25 s"),
        (drip(0.02, 0), "too slow"),
    ],
    ids=["silent head", "slow head", "silent body", "slow body"],
)
def test_slowness_is_given_up(run: Callable[[Awaitable[None]], None], turn: Turn, says: str) -> None:
    """A head that does not come, silence, and a drip below the least rate each end a try, whose connection is closed."""

    async def work() -> None:
        async with Server(sound, [turn, turn]) as server, client() as it:
            with pytest.raises(RegistryUnavailable, match=says):
                await read(it, server, 0, 100_000)
            assert await read(it, server, 0, 100_000) == BLOB[:100_000]
            assert server.connections == 3

    run(work())


def test_silence_is_borne_for_less_where_somebody_waits(run: Callable[[Awaitable[None]], None]) -> None:
    """A range that somebody waits for is gone on with over another connection; another one has more patience."""

    async def pausing(_reader: Reader, writer: Writer, start: int, end: int) -> bool:
        content = head_of(start, end) + BLOB[start:end]
        writer.write(content[:-1000])
        await writer.drain()
        await asyncio.sleep(0.7)
        writer.write(content[-1000:])
        return True

    async def work() -> None:
        settings = replace(SETTINGS, stall_timeout=20, urgent_stall_timeout=0.3)
        async with Server(sound, [pausing, sound, pausing]) as server, client(settings) as it:
            repository = it.repository(f"{server.address}/team/app")
            for urgent in (True, False):
                assert await repository.blob_range(DIGEST, 0, 100_000, urgent=urgent) == BLOB[:100_000]
            wanted = [head.split(b"bytes=")[1].split(b"\r\n")[0] for head in server.requests]
            assert wanted == [b"0-99999", b"99000-99999", b"0-99999"]

    run(work())


def test_kept_connections_that_lead_nowhere(run: Callable[[Awaitable[None]], None]) -> None:
    """Where the way of all kept connections is gone without a word, one of them is waited for and not each."""
    old: set[Writer] = set()
    dead = False

    async def turn(reader: Reader, writer: Writer, start: int, end: int) -> bool:
        if dead and writer in old:
            await asyncio.sleep(30)
        old.add(writer)
        await asyncio.sleep(0.05)
        return await sound(reader, writer, start, end)

    async def work() -> None:
        nonlocal dead
        async with Server(turn) as server, client() as it:
            await asyncio.gather(*(read(it, server, at, at + 10) for at in range(6)))
            assert server.connections == 6
            dead = True
            assert await read(it, server, 50, 60) == BLOB[50:60]  # there are two tries
            assert len(server.requests) == 8

    run(work())
    old.clear()


def test_who_gives_up_closes(run: Callable[[Awaitable[None]], None]) -> None:
    """A range whose deadline ends, or whose task is cancelled, leaves no connection and no memory in use behind."""

    async def work() -> None:
        settings = replace(SETTINGS, stall_timeout=30, header_timeout=30)
        async with Server(sound, [drip(30, 0), drip(30, 10)]) as server, client(settings) as it:
            repository = it.repository(f"{server.address}/team/app")
            with pytest.raises(DeadlineExceeded):
                await repository.blob_range(DIGEST, 0, 100_000, deadline=0.2)
            task = asyncio.create_task(read(it, server, 0, 100_000))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.1)
            assert not it._ranges._all
            assert await read(it, server, 0, 10) == BLOB[:10]

    run(work())


def test_nothing_is_open_after_the_end(run: Callable[[Awaitable[None]], None]) -> None:
    """With the registry's end all kept connections are closed."""

    async def work() -> None:
        async with Server(sound) as server:
            async with client() as it:
                await asyncio.gather(*(read(it, server, at, at + 100_000) for at in range(8)))
                assert it._ranges._all
            assert not it._ranges._all
            while server.gone < server.connections:
                await asyncio.sleep(0.01)

    run(work())


def test_a_name_with_a_dead_address(run: Callable[[Awaitable[None]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first address of a name refuses, or link-local ones are among them, another one is used."""
    dead = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 1))
    local = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))

    async def work() -> None:
        async with Server(sound) as server, client() as it:
            port = int(server.address.partition(":")[2])
            good = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
            answers = [[dead, local, good], [local]]

            async def resolve(*_: object, **__: object) -> list[object]:
                return list(answers.pop(0) if len(answers) > 1 else answers[0])

            loop = asyncio.get_running_loop()
            monkeypatch.setattr("soci_registry.dial.asyncio.get_running_loop", lambda: Loop(loop, resolve))
            repository = it.repository(f"localhost:{port}/team/app")
            assert await repository.blob_range(DIGEST, 0, 10) == BLOB[:10]
            it._ranges._kept.clear()
            with pytest.raises(RegistryUnavailable, match="link-local"):
                await repository.blob_range(DIGEST, 0, 10)

    run(work())


class Loop:
    """The loop with another resolver."""

    def __init__(self, loop: asyncio.AbstractEventLoop, resolve: Callable[..., Awaitable[list[object]]]) -> None:
        self._loop = loop
        self.getaddrinfo = resolve

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(folder / "key"), "-out", str(folder / "cert")]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    return folder


def test_tls(run: Callable[[Awaitable[None]], None], certificate: Path) -> None:
    """Over TLS ranges are as exact, broken ones are gone on with, and a stranger's certificate is refused at once."""

    async def broken(_reader: Reader, writer: Writer, start: int, end: int) -> bool:
        writer.write(head_of(start, end) + BLOB[start : start + 500_000])
        return False

    async def work() -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate / "cert", certificate / "key")
        async with Server(sound, [sound, slices(10, 70_000), broken], tls=tls) as server:
            base = f"https://{server.address.replace('127.0.0.1', 'localhost')}"
            route = Route.only(Place("reg.example", base, "team/app"))
            async with client(replace(SETTINGS, ca_file=str(certificate / "cert"))) as it:
                repository = Repository(route, it._mirrors)
                for size in (1_999_000, 300_000, 1_500_000, 10):
                    assert await repository.blob_range(DIGEST, 5, 5 + size) == BLOB[5 : 5 + size]
                assert len(server.requests) == 5
            async with client() as it:
                with pytest.raises(RegistryUnavailable, match=r"certificate is not trusted$"):
                    await Repository(route, it._mirrors).blob_range(DIGEST, 0, 10)
            assert len(server.requests) == 5

    run(work())


class Wild:
    """A server of many manners, drawn: broken, silent and aborted answers, 503, chunks, odd pieces."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    async def __call__(self, _reader: Reader, writer: Writer, start: int, end: int) -> bool:
        content, chance = head_of(start, end) + BLOB[start:end], self.rng.random()
        if chance < 0.1:
            writer.write(content[: self.rng.randrange(len(content) + 1)])
            return False
        if chance < 0.15:
            writer.transport.abort()
            return False
        if chance < 0.2:
            writer.write(b"HTTP/1.1 503 No\r\nContent-Length: 3\r\n\r\nabc")
            return True
        if chance < 0.3:
            coded = chunked(*(BLOB[at : min(end, at + 70_001)] for at in range(start, end, 70_001)))
            head = head_of(start, end).partition(b"Content-Length")[0]
            content = head + b"Transfer-Encoding: chunked\r\n\r\n" + coded
        while content:
            size = self.rng.choice([50, 500, 65_536, 1 << 20])
            writer.write(content[:size])
            content = content[size:]
            await asyncio.sleep(0)
        await writer.drain()
        return True


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_ranges_are_exact_whatever_happens(
    run: Callable[[Awaitable[None]], None], certificate: Path, *, secure: bool
) -> None:
    """Many ranges at once from a server that breaks a fifth of its answers, some given up midway: no byte is wrong."""

    async def work() -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if secure else None
        if tls is not None:
            tls.load_cert_chain(certificate / "cert", certificate / "key")
        settings = replace(SETTINGS, range_tries=200, range_bad_answer_tries=200, stall_timeout=20, header_timeout=20)
        wild = Wild(5)
        async with (
            Server(wild, tls=tls) as server,
            client(replace(settings, ca_file=str(certificate / "cert"))) as it,
        ):
            scheme = "https" if secure else "http"
            place = Place("reg.example", f"{scheme}://localhost:{server.address.partition(':')[2]}", "team/app")
            repository = Repository(Route.only(place), it._mirrors)

            async def lane() -> None:
                for _ in range(15):
                    start = wild.rng.randrange(len(BLOB))
                    end = min(len(BLOB), start + wild.rng.choice([1, 100, 70_000, 1_000_000]))
                    reading = asyncio.create_task(repository.blob_range(DIGEST, start, end))
                    if wild.rng.random() < 0.1:
                        await asyncio.sleep(wild.rng.random() * 0.01)
                        reading.cancel()
                    try:
                        assert await reading == BLOB[start:end]
                    except asyncio.CancelledError:
                        assert reading.cancelled()

            await asyncio.gather(*(lane() for _ in range(8)))
            assert len(it._ranges._all) <= KEPT_PER_HOST

    run(work())
