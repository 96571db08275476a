# SPDX-License-Identifier: Apache-2.0
"""Asks another node's fetcher for spans that it owns: an HTTP client. See `soci_fetcher.peers_door` for the answers."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import aiohttp
from yarl import URL

from soci.errors import InvalidConfig, Unavailable
from soci_fetcher.peers_auth import Asked, new_nonce
from soci_fetcher.peers_members import Member

CONNECT_SECONDS: Final = 1.0
"""For a connection, TLS with it."""
SILENT_SECONDS: Final = 2.0
"""Until an answer begins: a peer that has nothing yet says so long before."""
SENDING_SECONDS: Final = 5.0
SLOWEST_RATE: Final = 1 << 20
"""An answer that has begun takes no longer than the one, and its bytes at the other's rate."""
COMING_SECONDS: Final = 30.0
"""So much longer a peer may say that bytes are coming: it waits for a registry that may be slow for all."""
CONNECTIONS: Final = 64
"""To all peers together."""
KEEP_ALIVE_SECONDS: Final = 30.0
READ_BUFFER_BYTES: Final = 1 << 20
WHY_BYTES: Final = 1000
"""Bytes of an error's text that are read."""
AGAIN_FIRST: Final = 0.02
AGAIN_MOST: Final = 1.0
"""Seconds between two questions for what is coming: doubled, up to the latter, where the peer answers at once, as it
does when too many ask; else it waits a while itself."""
AGAIN_AT_ONCE: Final = 0.1
"""Seconds that "at once" means."""

_ELSEWHERE = 424


class PeerFailedError(Unavailable):
    """The peer gave no bytes; ``fault``: and that is its own doing."""

    def __init__(self, text: str, *, fault: bool) -> None:
        super().__init__(text)
        self.fault = fault


class RegistryWantedError(Unavailable):
    """To ask another peer would be in vain: the registry will not give these bytes to the one that was asked."""


class PeerLateError(RegistryWantedError):
    """The peer was at it, and for too long; another one would only ask the same registry anew."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for: ``path`` names a run of ``size`` compressed bytes."""

    path: str
    image: str
    ztoc_size: int
    size: int
    why: str


def deadline_of(size: int) -> float:
    """Seconds that so many bytes may take from a peer that has to fetch them first."""
    return COMING_SECONDS + sending_seconds(size)


def sending_seconds(size: int) -> float:
    """Seconds that an answer of so many bytes may take."""
    return SENDING_SECONDS + size / SLOWEST_RATE


class PeerClient:
    """An async context manager, one a process."""

    def __init__(
        self, secret: bytes, node: str, tls: ssl.SSLContext | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._secret = secret
        self._node = node
        self._tls = tls
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=CONNECTIONS, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=self._tls or True
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, member: Member, wanted: Wanted, coming: Callable[[bool], None]) -> bytes:
        """The bytes, exactly as many, unchecked; ``coming`` hears whether the peer waits for them (or gives them).

        Raises `PeerFailedError` or `RegistryWantedError`.
        """
        clock = asyncio.get_running_loop().time
        waits, pause = clock() + COMING_SECONDS, AGAIN_FIRST
        try:
            while True:
                asked = clock()
                response = await self._asked(member, wanted)
                try:
                    coming(response.status == 202)
                    content = await _read(member, response, wanted)
                finally:
                    response.release()  # closes it where its body was not read to the end
                if content is not None:
                    return content
                if clock() > waits:
                    raise PeerLateError(f"{member.node} ({member.url}) still waits for the registry")
                pause = min(2 * pause, AGAIN_MOST) if clock() - asked < AGAIN_AT_ONCE else AGAIN_FIRST
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  no secret
        except (aiohttp.ClientError, OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            what = str(error) or type(error).__name__
            raise PeerFailedError(f"{member.node} ({member.url}): {what[:300]}", fault=True) from error

    async def _asked(self, member: Member, wanted: Wanted) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("the client is not open")
        asked = Asked(
            "GET",
            wanted.path,
            self._node,
            member.start,
            f"{self._clock():.3f}",
            new_nonce(),
            wanted.image,
            str(wanted.ztoc_size),
            wanted.why,
        )
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_SECONDS)
        async with asyncio.timeout(CONNECT_SECONDS + SILENT_SECONDS):
            return await self._session.get(
                URL(member.url + wanted.path, encoded=True),
                headers=asked.headers(self._secret),
                timeout=timeout,
                allow_redirects=False,
            )


async def _read(member: Member, response: aiohttp.ClientResponse, wanted: Wanted) -> bytes | None:
    if response.status == 200:
        if response.content_length != wanted.size:
            told = f"{response.content_length} bytes, not {wanted.size}"
            raise PeerFailedError(f"{member.node} ({member.url}) gives {told}", fault=True)
        async with asyncio.timeout(sending_seconds(wanted.size)):
            return await response.content.readexactly(wanted.size)
    async with asyncio.timeout(SILENT_SECONDS):
        told = (await response.content.read(WHY_BYTES)).decode(errors="replace").strip()
    if response.status == 202:
        return None
    text = f"{member.node} ({member.url}) answers {response.status}: {told}"
    if response.status == _ELSEWHERE:
        raise RegistryWantedError(text)
    # 502 is its registry's doing, 503 its load's; both pass, and another one is asked meanwhile.
    raise PeerFailedError(text, fault=response.status not in {502, 503})


def client_tls(cert: str, key: str, ca: str) -> ssl.SSLContext | None:
    """The client's side of TLS: our certificate for those who want one. None where none is configured."""
    if not cert:
        return None
    try:
        context = ssl.create_default_context(cafile=ca or None)
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfig(f"peer_tls_cert, peer_tls_key or peer_tls_ca cannot be used: {error}") from error
    return context
