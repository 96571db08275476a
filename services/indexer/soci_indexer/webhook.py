# SPDX-License-Identifier: Apache-2.0
"""The indexer's bell: an HTTP listener that a registry tells of pushes, each of which becomes a job.

Off unless configured. It answers as soon as the jobs are on the queue, and says 503 where they cannot be: registries
then tell again. Whoever may ring it may have images read and indexes pushed with this indexer's credentials; so it
binds to this machine only, or wants a token.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from aiohttp import web

from soci.errors import InvalidConfig, InvalidInput, SociError, Unavailable
from soci_bus.asks import BuildIndex
from soci_indexer.notifications import CONTENT_TYPE, MAX_BODY_BYTES, parse_notification
from soci_runtime.logs import log

PATH: Final = "/notifications"
DEFAULT_HOST: Final = "127.0.0.1"
READ_SECONDS: Final = 10.0
"""How long a notification may take to come in."""
SUBMIT_SECONDS: Final = 5.0
"""How long the queue may take to take its jobs."""
MAX_REQUESTS: Final = 32
"""Requests at a time; more are told to come again."""
CLOSE_SECONDS: Final = 2.0
"""How long requests under way get on the way out."""
_MAX_PORT: Final = 65_535

Submit = Callable[[BuildIndex, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(text: str) -> Address:
    """``host:port``, ``[v6]:port``, or a port on this machine alone; `InvalidConfig` for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not port.isascii() or int(port) > _MAX_PORT or ("[" in host) != (":" in host):
        raise InvalidConfig(f"webhook_address {text[:100]!r} is not host:port")
    return Address(host.strip("[]") or DEFAULT_HOST, int(port))


class Webhook:
    """Answers ``POST /notifications``. ``submit`` puts a job on the queue, and raises `SociError` where it cannot."""

    def __init__(self, submit: Submit, *, token: str, registry: str, min_layer_size: int) -> None:
        self._submit = submit
        self._token = token.encode()
        self._registry = registry
        self._min_layer_size = min_layer_size
        self._under_way = 0

    async def answer(self, request: web.Request) -> web.Response:
        """One notification."""
        if self._under_way >= MAX_REQUESTS:
            return _refuse(503, "busy: tell again")
        self._under_way += 1
        try:
            return await self._answer(request)
        finally:
            self._under_way -= 1

    async def _answer(self, request: web.Request) -> web.Response:
        if not self._known(request.headers.get("Authorization", "")):
            return _refuse(401, "this webhook wants its token", {"WWW-Authenticate": "Bearer"})
        if request.content_type != CONTENT_TYPE:
            return _refuse(415, f"a notification is {CONTENT_TYPE}, not {request.content_type[:100]}")
        try:
            async with asyncio.timeout(READ_SECONDS):
                body = await request.read()
            told = parse_notification(body, self._registry)
            async with asyncio.timeout(SUBMIT_SECONDS):
                for pushed in told.pushed:
                    job = BuildIndex(pushed.image, min_layer_size=self._min_layer_size, by="webhook")
                    await self._submit(job, pushed.job_id)
        except web.HTTPRequestEntityTooLarge:
            return _refuse(413, f"a notification has at most {MAX_BODY_BYTES} bytes")
        except TimeoutError:
            return _refuse(503, "took too long: tell again")
        except InvalidInput as error:
            log.warning("a notification was refused", peer=request.remote, error=error)
            return _refuse(400, str(error))
        except SociError as error:
            log.warning("a notification could not be taken", error=error)
            return _refuse(503, f"tell again: {error}")
        for pushed in told.pushed:
            log.info("a registry told of a push", image=pushed.image, job=pushed.job_id)
        return web.json_response({"taken": len(told.pushed), "ignored": told.ignored})

    def _known(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        # compare_digest takes as long for a wrong token as for the right one.
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
        return not self._token or (scheme.lower() == "bearer" and same)


def _refuse(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers=headers)


@asynccontextmanager
async def listening(
    address: str, token: str, registry: str, submit: Submit, *, min_layer_size: int
) -> AsyncIterator[Address]:
    """Listen while the block runs; the address is the real one, its port included. Layers with fewer bytes than
    ``min_layer_size`` get no zTOC.

    Raises `InvalidConfig` for an address that is none, and for one that others reach where there is no token;
    `Unavailable` where it cannot be bound.
    """
    wanted = parse_address(address)
    if not wanted.local and not token:
        raise InvalidConfig(f"webhook_address {address} is reached from elsewhere: set webhook_token too")
    webhook = Webhook(submit, token=token, registry=registry, min_layer_size=min_layer_size)
    application = web.Application(client_max_size=MAX_BODY_BYTES)
    application.router.add_post(PATH, webhook.answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, wanted.host, wanted.port).start()
        except OSError as error:
            raise Unavailable(f"webhook_address {address}: {error.strerror or error}") from error
        bound = runner.addresses[0]
        yield Address(str(bound[0]), int(bound[1]))
    finally:
        await runner.cleanup()
