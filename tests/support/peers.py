# SPDX-License-Identifier: Apache-2.0
"""Fetchers of several nodes of one cluster, each with its own cache, over a real NATS and a real registry."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soci.span import Spans
from soci_bus.asks import PrepareLayer, SpansFetched
from soci_bus.events import Event
from soci_bus.nats import NatsBus, connect
from soci_cache import LayerStore
from soci_fetcher.layers import LayerFetcher
from soci_fetcher.links import Links
from soci_fetcher.peers import peering
from soci_fetcher.peers_members import Member
from soci_fetcher.peers_ring import blocks, key_of
from soci_fetcher.peers_source import PeerSource
from soci_fetcher.source import RegistrySource
from soci_fetcher.spans import SpanFetcher
from soci_registry import NoCredentials, Registry
from soci_runtime.config import Config
from soci_runtime.flights import Flights
from support.bus import LIMIT, until
from support.fetching import CONTEXT, PATIENCE, check, spans_of
from support.mounter_layers import Made


def secret_file(folder: Path) -> Path:
    """A file that holds the secret of a cluster of its own."""
    file = folder / "secret"
    file.write_text(secrets.token_hex(32))
    file.chmod(0o600)
    return file


@dataclass
class Node:
    """One node's fetcher."""

    name: str
    store: LayerStore
    layers: LayerFetcher
    spans: SpanFetcher
    source: PeerSource
    bus: NatsBus
    events: list[Event] = field(default_factory=list)

    def told(self, kind: type[Event]) -> list[Any]:
        """The events of a class."""
        return [event for event in self.events if isinstance(event, kind)]

    async def prepare(self, reference: str, made: Made) -> None:
        """Have the layer's zTOC."""
        ask = PrepareLayer(reference, made.layer, len(made.blob), made.ztoc_digest, len(made.ztoc_bytes))
        await self.layers.prepare(ask, CONTEXT)

    async def fetch(
        self, reference: str, made: Made, first: int = 0, last: int = -1, why: str = "miss"
    ) -> SpansFetched:
        """Have spans in the cache, by default all."""
        last = len(made.ztoc.span_digests) - 1 if last < 0 else last
        return await self.spans.fetch(spans_of(reference, made, first, last, why), CONTEXT)

    def check(self, made: Made) -> list[int]:
        """The spans that are here; each must have its bytes."""
        return check(self.store, made)

    @property
    def mine(self) -> Member:
        """What others know of us."""
        return self.source._members.mine


def owners(made: Made, node: Node) -> set[str]:
    """The nodes that own blocks of a layer."""
    spans = Spans.of(made.ztoc)
    cut = blocks(spans, range(spans.count))
    keys = [key_of(made.layer, made.ztoc_digest, block) for block, _ in cut]
    return {node.source._members.choose(key, 1)[0].node for key in keys}


@asynccontextmanager
async def joined(folder: Path, name: str, nats_url: str, **changed: Any) -> AsyncIterator[Node]:
    """One node of the cluster, its registry client named as it is; ``changed`` are settings."""
    cache = folder / "caches" / name
    secret = str(folder / "secret")
    config = replace(Config(peer_listen="127.0.0.1:0", peer_secret_file=secret, node=name), **changed)
    events: list[Event] = []
    async with (
        Registry(settings=replace(PATIENCE, user_agent=name), credentials=NoCredentials()) as registry,
        AsyncExitStack() as last,
        Flights() as flights,
        connect(nats_url, node=name, name=name, wait=LIMIT) as bus,
    ):
        bus.publish = events.append  # type: ignore[method-assign,assignment]
        store = LayerStore(cache)
        layers = LayerFetcher(store, registry, events.append, cache / "whole")
        parts: dict[str, Any] = {"store": store, "layers": layers, "flights": flights, "last": last}
        async with peering(config, bus, registry=RegistrySource(registry, Links()), **parts) as source:
            assert isinstance(source, PeerSource)
            spans = SpanFetcher(store, source, events.append, flights, attempts=3)
            last.callback(spans.close)
            yield Node(name, store, layers, spans, source, bus, events)


@asynccontextmanager
async def cluster(folder: Path, names: Sequence[str], nats_url: str, **changed: Any) -> AsyncIterator[list[Node]]:
    """Several nodes that know one another."""
    if not (folder / "secret").exists():
        secret_file(folder)
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(joined(folder, name, nats_url, **changed)) for name in names]
        await acquainted(nodes)
        yield nodes


async def acquainted(nodes: Sequence[Node]) -> None:
    """Wait until each knows all."""
    names = {node.name for node in nodes}
    await until(lambda: all(names <= set(node.source._members.nodes) for node in nodes), "all know one another")


async def everywhere(nodes: Sequence[Node], reference: str, made: Made, why: str = "miss") -> None:
    """All nodes bring the whole layer at once."""
    await asyncio.gather(*(node.prepare(reference, made) for node in nodes))
    await asyncio.gather(*(node.fetch(reference, made, why=why) for node in nodes))
