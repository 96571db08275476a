# SPDX-License-Identifier: Apache-2.0
"""A private registry as a process, and a server in front of it whose manners a test writes itself."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from soci_dev.processes import Daemon, free_port
from soci_dev.tools import find

START_LIMIT_S = 20.0

Manners = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
"""Answers a request, or None: pass it on to the registry."""


@contextmanager
def running_registry(folder: Path) -> Iterator[str]:
    """Debian's docker-registry with its storage in ``folder``; yields ``127.0.0.1:port``."""
    address = f"127.0.0.1:{free_port()}"
    config = folder / "registry.json"  # JSON is YAML
    settings = {
        "version": "0.1",
        "log": {"level": "error"},
        "http": {"addr": address, "secret": "tests"},
        "storage": {"delete": {"enabled": True}, "filesystem": {"rootdirectory": str(folder / "storage")}},
    }
    config.write_text(json.dumps(settings))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")}
    daemon = Daemon(
        "registry", [find("docker-registry"), "serve", config], folder / "registry.log", environment, folder
    )
    try:
        daemon.wait(lambda: _answers(f"http://{address}/v2/"), "answering", START_LIMIT_S)
        yield address
    finally:
        daemon.stop()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@dataclass
class Front:
    """A server on 127.0.0.1 before ``upstream``. ``seen`` is every request as (method, path, headers)."""

    upstream: str
    manners: Manners
    address: str = ""
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def requests(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers of the requests with ``part`` in their path and query."""
        return [headers for seen, path, headers in self.seen if seen == method and part in path]


@asynccontextmanager
async def front(upstream: str, manners: Manners, tls: ssl.SSLContext | None = None) -> AsyncIterator[Front]:
    """Run a `Front` in this event loop."""
    it = Front(upstream, manners)
    async with aiohttp.ClientSession(auto_decompress=False) as client:

        async def handle(request: web.Request) -> web.StreamResponse:
            headers = {name.lower(): value for name, value in request.headers.items()}
            it.seen.append((request.method, request.path_qs, headers))
            answer = await it.manners(request)
            return answer if answer is not None else await _pass_on(request, client, it.upstream)

        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
            it.address = f"127.0.0.1:{runner.addresses[0][1]}"
            yield it
        finally:
            await runner.cleanup()


async def _pass_on(request: web.Request, client: aiohttp.ClientSession, upstream: str) -> web.Response:
    url = URL(f"http://{upstream}{request.rel_url.raw_path_qs}", encoded=True)
    headers = CIMultiDict((name, value) for name, value in request.headers.items() if name != "Transfer-Encoding")
    async with client.request(
        request.method, url, headers=headers, data=await request.read(), allow_redirects=False
    ) as got:
        kept = CIMultiDict((name, value) for name, value in got.headers.items() if name != "Transfer-Encoding")
        body = await got.read()
        if request.method != "HEAD":
            kept.pop("Content-Length", None)
        return web.Response(status=got.status, headers=kept, body=body)
