# SPDX-License-Identifier: Apache-2.0
"""The fetchers of a cluster as one: each tells that it is there, serves what it owns, and asks the others for theirs.

Off unless ``peer_listen`` is set. Three tasks: the server's, one that tells, one (the bus's) that hears.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

from soci.errors import InvalidConfig
from soci_bus.face import Bus
from soci_bus.notices import PeerTold
from soci_cache import LayerStore
from soci_fetcher.layers import LayerFetcher
from soci_fetcher.peers_auth import Guard, is_proven, read_secret, sign_notice
from soci_fetcher.peers_client import PeerClient, client_tls
from soci_fetcher.peers_door import Door, listening, server_tls
from soci_fetcher.peers_members import VERSION, Member, Members, interval, is_sound
from soci_fetcher.peers_own import Owned
from soci_fetcher.peers_source import PeerSource
from soci_fetcher.source import RegistrySource, Source
from soci_runtime.config import Config
from soci_runtime.flights import Flights
from soci_runtime.logs import log

FIRST_SECONDS: Final = (0.5, 1.0, 1.5)
"""Between the first notices: who comes is to be known soon."""
JITTER: Final = 0.1
"""Share of the interval by which notices are early, at random: a cluster started at once does not speak at once."""
LEAVE_SECONDS: Final = 1.0
"""How long the word that we leave may take."""
_ANYWHERE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104  compared with, not bound to


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen, and what others are told; ``url`` empty: made of host and port."""

    host: str
    port: int
    url: str = ""

    def told(self, port: int, *, tls: bool) -> str:
        """The address that others are told, once the port is known."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if not self.url:
            return f"{'https' if tls else 'http'}://{host}:{port}"
        parts = urlsplit(self.url)
        if parts.port not in {None, self.port}:
            return self.url  # something between us and the others changes the port
        name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{name}:{port}"


def parse_listen(listen: str, url: str, *, tls: bool) -> Listen:
    """``peer_listen`` and ``peer_url``; `InvalidConfig` where one is none, or the first alone says too little."""
    host, _, port = listen.rpartition(":")
    if not port.isascii() or not port.isdecimal() or int(port) > 65_535 or ("[" in host) != (":" in host):
        raise InvalidConfig(f"peer_listen {listen[:100]!r} is not host:port")
    found = Listen(host.strip("[]"), int(port), url)
    if not url and found.host in _ANYWHERE:
        raise InvalidConfig(f"peer_listen {listen} says nowhere in particular: set peer_url (SOCIABLE_PEER_URL) too")
    told = PeerTold("n", url or found.told(1, tls=tls), "s", VERSION, 1, 1.0, 0.0, leaving=False, mac="")
    with suppress(ValueError):
        if is_sound(told) and urlsplit(told.url).scheme == ("https" if tls else "http"):
            return found
    wanted = "https, for there is a certificate" if tls else "http, for there is no peer_tls_cert"
    raise InvalidConfig(f"peer_url {told.url[:100]!r} is not an address alone, or not {wanted}")


class Cluster:
    """Who is there: told by each, heard by all."""

    def __init__(self, mine: Member, secret: bytes) -> None:
        self.members = Members(mine, time.monotonic())
        self._secret = secret
        self._number = 0

    def heard(self, notice: PeerTold) -> None:
        """Take in a notice that somebody sent; what is not proven is passed over in silence."""
        if is_sound(notice) and is_proven(self._secret, notice, time.time()):
            now = time.monotonic()
            if self.members.hear(notice, now):
                what = "a peer left" if notice.leaving else "a peer is there"
                log.info(what, node=notice.node, url=notice.url, nodes=len(self.members.nodes))

    def notice(self, every: float, *, leaving: bool = False) -> PeerTold:
        """Our next notice."""
        self._number += 1
        mine = self.members.mine
        made = PeerTold(
            mine.node, mine.url, mine.start, VERSION, self._number, every, time.time(), leaving=leaving, mac=""
        )
        return replace(made, mac=sign_notice(self._secret, made))

    async def run(self, bus: Bus, owned: Owned) -> None:
        """Tell that we are there, again and again, and miss those who do not."""
        first = iter(FIRST_SECONDS)
        while True:
            every = interval(len(self.members.all()))
            await bus.tell(self.notice(every))
            seconds = next(first, every)
            await asyncio.sleep(seconds * (1 - JITTER * random.random()))  # noqa: S311  no secret
            if self.members.expire(time.monotonic()):
                log.info("peers fell silent", nodes=len(self.members.nodes))
            owned.sweep()


@asynccontextmanager
async def peering(  # noqa: PLR0913  the parts of a fetcher that it stands on
    config: Config,
    bus: Bus,
    *,
    store: LayerStore,
    registry: RegistrySource,
    layers: LayerFetcher,
    flights: Flights,
    last: AsyncExitStack,
) -> AsyncIterator[Source]:
    """The source of spans: ``registry`` itself, or the cluster before it where that is configured.

    We are one of the cluster for the block. The source works until ``last`` ends, which is to be after all that
    uses it and after ``flights``.
    """
    if not config.peer_listen:
        yield registry
        return
    cert, key, ca = config.peer_tls_cert, config.peer_tls_key, config.peer_tls_ca
    listen = parse_listen(config.peer_listen, config.peer_url, tls=bool(cert))
    secret = read_secret(config.peer_secret_file)
    start = secrets.token_hex(16)
    owned = Owned(store, registry, layers.prepare_alone, flights)
    async with AsyncExitStack() as stack:
        last.callback(owned.close)
        client = await last.enter_async_context(PeerClient(secret, config.node, client_tls(cert, key, ca)))
        door = Door(owned, Guard(secret, start))
        bound = await stack.enter_async_context(listening(door, listen.host, listen.port, server_tls(cert, key, ca)))
        mine = Member(config.node, start, listen.told(bound, tls=bool(cert)))
        cluster = Cluster(mine, secret)
        await bus.hear(PeerTold, cluster.heard)
        source = PeerSource(
            registry,
            owned=owned,
            members=cluster.members,
            client=client,
            ztocs=layers.ztoc,
            seen=registry.seen,
            publish=bus.publish,
        )
        layers.ztocs = source.ztoc
        log.info("peers are served", url=mine.url)
        async with _telling(cluster, bus, owned):
            yield source


@asynccontextmanager
async def _telling(cluster: Cluster, bus: Bus, owned: Owned) -> AsyncIterator[None]:
    """Tell for the block that we are there, and at its end that we leave."""
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(cluster.run(bus, owned))
        try:
            yield
        except BaseException as error:  # noqa: BLE001  raised again below, outside the group, as itself
            failure = error
        telling.cancel()
    with suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_SECONDS):
            await bus.tell(cluster.notice(interval(1), leaving=True))
    if failure is not None:
        raise failure
