# SPDX-License-Identifier: Apache-2.0
"""What the registry sends when many nodes launch one image at once: with peers, without, and to one node alone.

Each node is a network namespace with a NATS leaf and a fetcher; the registry stands behind a counting proxy. Every run
has an image of its own, and each node asks for the same part of its spans in an order of its own. Needs root. See
bench/README.md.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import random
import secrets
import shutil
import tarfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass

import click

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci_bus.asks import FetchSpans, PrepareLayer
from soci_bus.nats import NatsBus, connect
from soci_dev.cluster import Cluster
from soci_dev.folders import cache_folder
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_registry import NoCredentials, Registry, RegistrySettings

SPAN_BYTES = 4 << 20
SHARE = 0.6
"""Of a layer's spans that a launch asks for."""
ASK_SPANS = 2
ASKS_AT_ONCE = 4
LIMIT_S = 120.0
ACQUAINTED_S = 6.0
"""Two intervals between the notices of a small cluster."""
SETTINGS = 'cache_budget = "1000gb"\n'


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in the registry."""

    image: str  # repository and tag
    layer: Digest
    size: int
    ztoc: Digest
    ztoc_size: int
    spans: int


@dataclass(frozen=True, slots=True)
class Run:
    """What a run took."""

    seconds: float
    size: int  # bytes from the registry
    requests: int


async def pushed(registry: str, size: int) -> Layer:
    """A layer of about ``size`` compressed bytes that the registry has not seen."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("data")
        info.size = size
        tar.addfile(info, io.BytesIO(random.randbytes(size)))
    blob = gzip.compress(stream.getvalue(), 1, mtime=0)
    builder = ZtocBuilder("gzip", SPAN_BYTES)
    builder.feed(blob)
    built = builder.finish()
    name = f"bench/{secrets.token_hex(6)}:1"
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as client:
        repository = client.repository(f"{registry}/{name}")
        await repository.push_blob(blob)
        await repository.push_blob(built.ztoc_bytes)
    digest = sha256_digest(built.ztoc_bytes)
    spans = len(built.ztoc.span_digests)
    return Layer(name, sha256_digest(blob), len(blob), digest, len(built.ztoc_bytes), spans)


async def launch(bus: NatsBus, registry: str, layer: Layer, seed: int) -> None:
    """One node's part."""
    reference = f"{registry}/{layer.image}"
    await bus.ask(PrepareLayer(reference, layer.layer, layer.size, layer.ztoc, layer.ztoc_size), timeout=LIMIT_S)
    starts = list(range(0, int(layer.spans * SHARE), ASK_SPANS))
    random.Random(seed).shuffle(starts)
    permits = asyncio.Semaphore(ASKS_AT_ONCE)

    async def one(first: int) -> None:
        async with permits:
            last = min(first + ASK_SPANS, layer.spans) - 1
            await bus.ask(FetchSpans(reference, layer.layer, layer.ztoc, first, last), timeout=LIMIT_S)

    await asyncio.gather(*map(one, starts))


async def run(cluster: Cluster, proxy: Proxy, nodes: int, layers: int, size: int) -> Run:
    """An image of ``layers`` new layers, on the first ``nodes`` at once."""
    made = [await pushed(proxy.upstream, size) for _ in range(layers)]
    async with AsyncExitStack() as stack:
        url = ",".join(cluster.nats_urls)
        names = cluster.nodes[:nodes]
        buses = [await stack.enter_async_context(connect(url, node=name, name="bench")) for name in names]
        proxy.reset()
        begun = time.monotonic()
        await asyncio.gather(
            *(launch(bus, cluster.registry, layer, seed) for seed, bus in enumerate(buses) for layer in made)
        )
        return Run(time.monotonic() - begun, proxy.counts.body_bytes, proxy.counts.requests)


def measured(proxy: Proxy, nodes: int, layers: int, size: int, *, peers: bool) -> tuple[Run, Run]:
    """One node alone, then all at once."""
    folder = cache_folder() / "run" / "peers"
    with Cluster(folder, nodes=nodes, registry=proxy.address, peers=peers, settings=SETTINGS) as cluster:
        time.sleep(ACQUAINTED_S)
        alone = asyncio.run(run(cluster, proxy, 1, layers, size))
        return alone, asyncio.run(run(cluster, proxy, nodes, layers, size))


@click.command()
@click.option("--nodes", default=10, show_default=True)
@click.option("--layers", default=3, show_default=True)
@click.option("--mib", default=48, show_default=True, help="Of a layer, compressed.")
@click.option("--mbit", default=0.0, help="Megabits a second of the way to the registry; 0 is no limit.")
@click.option("--rtt-ms", default=0.0, help="Of the way to the registry.")
def main(*, nodes: int, layers: int, mib: int, mbit: float, rtt_ms: float) -> None:
    """Launch one image on many nodes at once."""
    folder = cache_folder() / "run" / "peers-registry"
    shutil.rmtree(folder, ignore_errors=True)
    with Stack(folder, services=(), containerd=False) as stack:
        bandwidth = int(mbit * 125_000) or None
        for peers in (True, False):
            with Proxy(stack.registry, rtt_s=rtt_ms / 1000, bandwidth=bandwidth) as proxy:
                one, all_ = measured(proxy, nodes, layers, mib << 20, peers=peers)
            click.echo(
                f"{nodes} nodes {'with' if peers else 'without'} peers, of one node alone: registry bytes "
                f"{all_.size / one.size:.3f}, requests {all_.requests / one.requests:.2f}, "
                f"seconds {all_.seconds / one.seconds:.2f} ({all_.seconds:.2f} of {one.seconds:.2f})"
            )


if __name__ == "__main__":
    main()
