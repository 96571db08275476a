# SPDX-License-Identifier: Apache-2.0
"""The indexer's HTTP listener, over real sockets: who may ring it, and what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from soci.errors import BusUnavailable, InvalidConfig, Unavailable
from soci_bus.asks import BuildIndex
from soci_indexer import webhook
from soci_indexer.notifications import CONTENT_TYPE, MAX_BODY_BYTES, parse_notification
from soci_indexer.webhook import PATH, listening, parse_address
from support.notifications import DIGEST, body, event

TYPE = {"Content-Type": CONTENT_TYPE}


LEAST = BuildIndex("").min_layer_size


@dataclass
class Bell:
    """A listener and what it put on the queue."""

    url: str = ""
    jobs: list[tuple[str, BuildIndex]] = field(default_factory=list)
    failure: Exception | None = None

    async def submit(self, job: BuildIndex, job_id: str) -> None:
        if self.failure:
            raise self.failure
        self.jobs.append((job_id, job))

    async def ring(self, content: bytes = body(event()), headers: dict[str, str] = TYPE) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.post(self.url + PATH, content=content, headers=headers)


@asynccontextmanager
async def bell(token: str = "", registry: str = "", least: int = LEAST) -> AsyncIterator[Bell]:
    it = Bell()
    async with listening("127.0.0.1:0", token, registry, it.submit, min_layer_size=least) as address:
        it.url = f"http://{address.host}:{address.port}"
        yield it


async def test_a_push_becomes_a_job() -> None:
    """The answer comes when the job is on the queue, and says what was taken and what was not."""
    async with bell() as it:
        answer = await it.ring(body(event(), event("pull")))
        assert (answer.status_code, answer.json()) == (200, {"taken": 1, "ignored": 1})
        (pushed,) = parse_notification(body(event())).pushed
        assert it.jobs == [(pushed.job_id, BuildIndex(f"registry.example:5000/team/app:v1@{DIGEST}", by="webhook"))]


async def test_the_configured_least_size_goes_with_the_job() -> None:
    """It is the indexer's setting, not that of whoever pushed."""
    async with bell(least=7) as it:
        await it.ring()
        assert it.jobs[0][1].min_layer_size == 7


async def test_the_configured_registry_is_used() -> None:
    """What the registry is called by the nodes, not by who pushed."""
    async with bell(registry="other.example") as it:
        await it.ring()
        assert it.jobs[0][1].image.startswith("other.example/team/app")


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", "Basic right", "Bearer righ", "Bearer \xe9", "right"])
async def test_without_the_token_nothing_is_read(sent: str) -> None:
    """Also where the token is nearly right, or under another scheme."""
    async with bell(token="right") as it:
        headers = {b"Authorization": sent.encode("latin-1"), b"Content-Type": CONTENT_TYPE.encode()}
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(it.url + PATH, content=body(event()), headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "token" in answer.text
        assert it.jobs == []


async def test_with_the_token_it_is_taken() -> None:
    """As distribution sends it, from its ``headers`` setting."""
    async with bell(token="right") as it:
        assert (await it.ring(headers=TYPE | {"Authorization": "Bearer right"})).status_code == 200
        assert len(it.jobs) == 1


async def test_bad_requests_are_refused_in_clear_words() -> None:
    """Another type, too many bytes, nonsense, another path or method: each its own status, and no job."""
    async with bell() as it:
        answers = [
            await it.ring(headers={"Content-Type": "application/json"}),
            await it.ring(b" " * (MAX_BODY_BYTES + 1)),
            await it.ring(b"nonsense"),
        ]
        assert [answer.status_code for answer in answers] == [415, 413, 400]
        for word, answer in zip((CONTENT_TYPE, str(MAX_BODY_BYTES), "JSON"), answers, strict=True):
            assert word in answer.text
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(it.url + PATH)).status_code == 405
            assert (await client.post(it.url + "/", content=b"")).status_code == 404
        assert it.jobs == []


async def test_a_push_that_cannot_be_queued_is_told_again() -> None:
    """Registries repeat what was answered with 503: nothing is lost while the bus is away."""
    async with bell() as it:
        it.failure = BusUnavailable("JetStream is away")
        answer = await it.ring()
        assert answer.status_code == 503
        assert "tell again" in answer.text
        it.failure = None
        assert (await it.ring()).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow sender holds its place for a bounded time only."""
    monkeypatch.setattr(webhook, "READ_SECONDS", 0.1)
    async with bell() as it:
        port = int(it.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\n".encode())
        writer.write(b"Content-Length: 100\r\n\r\n{")
        assert b"503" in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_an_open_listener_wants_a_token() -> None:
    """Whoever rings it makes the indexer work with its credentials: others than this machine need the secret."""
    for address in ("0.0.0.0:0", "[::]:0", "registry.example:0"):
        with pytest.raises(InvalidConfig, match="webhook_token"):
            async with listening(address, "", "", Bell().submit, min_layer_size=LEAST):
                pass


async def test_a_port_that_is_taken_is_an_error_with_its_name() -> None:
    """The indexer does not run without the bell that it was told to hang up."""
    async with bell() as it:
        taken = it.url.removeprefix("http://")
        with pytest.raises(Unavailable, match=taken):
            async with listening(taken, "", "", it.submit, min_layer_size=LEAST):
                pass


@pytest.mark.parametrize(
    ("text", "host", "port", "local"),
    [
        ("127.0.0.1:7070", "127.0.0.1", 7070, True),
        ("7070", "127.0.0.1", 7070, True),
        (":7070", "127.0.0.1", 7070, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:1", "::1", 1, True),
        ("0.0.0.0:1", "0.0.0.0", 1, False),
        ("bell.example:65535", "bell.example", 65535, False),
    ],
)
def test_addresses(text: str, host: str, port: int, local: bool) -> None:  # noqa: FBT001
    """A port alone is this machine's: a listener open to all is never an accident."""
    found = parse_address(text)
    assert (found.host, found.port, found.local) == (host, port, local)


@pytest.mark.parametrize("text", ["", "x", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """The message names the setting."""
    with pytest.raises(InvalidConfig, match="webhook_address"):
        parse_address(text)
