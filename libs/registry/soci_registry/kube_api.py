# SPDX-License-Identifier: Apache-2.0
"""The two questions that we have for a Kubernetes API server: list some secrets, and tell of their changes.

Source: the Kubernetes API concepts, "Efficient detection of changes" and "Retrieving large results sets in chunks".
Answers are bounded; whatever goes wrong is `Unavailable`, and a version too old to go on from is `GoneError`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from soci.errors import InvalidConfig, Unavailable
from soci_registry.documents import items, table, text
from soci_registry.kube_login import SECRET_TYPE
from soci_registry.kubeconfig import Cluster, authorization, tls_of
from soci_registry.wire import describe
from soci_registry.wire_httpx import LOOPBACK

SECRETS_PATH = "/api/v1/secrets"
SELECTOR = f"type={SECRET_TYPE}"
PAGE_SECRETS = 100
PAGE_BYTES_MAX = 32 * 1024 * 1024
"""A secret has a mebibyte at most, and few have more than some KiB."""
PAGES_MAX = 1000
EVENT_BYTES_MAX = 4 * 1024 * 1024

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
WATCH_SECONDS = 240
"""The server ends a watch after so long; then it is begun again."""
WATCH_GRACE_SECONDS = 15.0
"""A watch that stays silent so much longer than that is a connection that has died without a word."""


TAKEN = "taken"
"""The first change of a watch: the server has taken it. Real kinds are written in capitals."""


class GoneError(Exception):
    """The server no longer knows this version: everything must be listed again."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some secrets, how to get the next ones (empty: there are none), and the version that the list shows."""

    secrets: list[Any]
    following: str
    version: str


@dataclass(frozen=True, slots=True)
class Change:
    """What happened (``ADDED``, ``MODIFIED``, ``DELETED``, ``BOOKMARK``), and the object."""

    kind: str
    secret: dict[str, Any]


class KubeApi:
    """A connection to one API server."""

    def __init__(self, client: httpx.AsyncClient, cluster: Cluster) -> None:
        self._client = client
        self._cluster = cluster

    async def page(self, following: str) -> Page:
        """Some of all namespaces' secrets with image pull logins, from ``following`` on."""
        parameters = {"fieldSelector": SELECTOR, "limit": str(PAGE_SECRETS)}
        if following:
            parameters["continue"] = following
        async with self._answer(parameters, ANSWER_SECONDS) as answer:
            body = b""
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > PAGE_BYTES_MAX:
                    raise Unavailable(f"{self._cluster.server}: a list of more than {PAGE_BYTES_MAX} bytes")
        return await asyncio.to_thread(_page, body, self._cluster.server)

    async def watch(self, version: str) -> AsyncGenerator[Change, None]:
        """`TAKEN`, then the changes since ``version``, until the server ends the watch. Raises `GoneError` too."""
        parameters = {
            "fieldSelector": SELECTOR,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async with self._answer(parameters, WATCH_SECONDS + WATCH_GRACE_SECONDS) as answer:
            yield Change(TAKEN, {})
            rest = b""
            async for chunk in answer.aiter_raw():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _change(line, self._cluster.server)
                if len(rest) > EVENT_BYTES_MAX:
                    raise Unavailable(f"{self._cluster.server}: an event of more than {EVENT_BYTES_MAX} bytes")

    @asynccontextmanager
    async def _answer(self, parameters: dict[str, str], silence: float) -> AsyncIterator[httpx.Response]:
        server = self._cluster.server
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if (value := await asyncio.to_thread(authorization, self._cluster)) is not None:
            headers["Authorization"] = value
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, read=silence)
        extensions = {"sni_hostname": self._cluster.server_name} if self._cluster.server_name else {}
        try:
            async with self._client.stream(
                "GET", server + SECRETS_PATH, params=parameters, headers=headers, timeout=timeout, extensions=extensions
            ) as answer:
                if answer.status_code == httpx.codes.GONE:
                    raise GoneError
                if answer.status_code != httpx.codes.OK:
                    hint = ": may its account list and watch secrets?" if answer.status_code in {401, 403} else ""
                    raise Unavailable(f"{server}: status {answer.status_code}{hint}")
                yield answer
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            raise Unavailable(f"{server}: {describe(error)}") from error


@asynccontextmanager
async def connected(cluster: Cluster) -> AsyncIterator[KubeApi]:
    """A connection to ``cluster``; `InvalidConfig` where its certificates cannot be used."""
    tls = await asyncio.to_thread(_tls, cluster)
    try:
        client = httpx.AsyncClient(verify=tls, mounts=dict.fromkeys(LOOPBACK), follow_redirects=False)
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise InvalidConfig(f"the environment's proxies cannot be used: {type(error).__name__}") from None
    async with client:
        yield KubeApi(client, cluster)


def _tls(cluster: Cluster) -> Any:
    with tempfile.TemporaryDirectory(prefix="soci-kube-") as scratch:
        return tls_of(cluster, Path(scratch))


def _json(body: bytes, server: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unavailable(f"{server}: the answer is not a JSON object")
    return found


def _page(body: bytes, server: str) -> Page:
    found = _json(body, server)
    meta = table(found.get("metadata"))
    version = text(meta.get("resourceVersion"))
    if not version:
        raise Unavailable(f"{server}: the answer is not a list")
    # In a list the items do not repeat what they are.
    secrets = [{"type": SECRET_TYPE, **table(one)} for one in items(found.get("items"))]
    return Page(secrets, text(meta.get("continue")), version)


def _change(line: bytes, server: str) -> Change:
    found = _json(line, server)
    kind, secret = text(found.get("type")), table(found.get("object"))
    if kind == "ERROR":
        code = secret.get("code")
        if code == httpx.codes.GONE:
            raise GoneError
        raise Unavailable(f"{server}: the watch failed with code {code if isinstance(code, int) else '?'}")
    return Change(kind, secret)
