# SPDX-License-Identifier: Apache-2.0
"""A cold read, in order, of a lazily mounted layer, against what its registry and its inflating allow.

In each round, on the same machine: the layer's blob by ranges through our registry client and nothing else; the blob
inflated by ISA-L and nothing else; then all files of the layer, mounted by a mounter with an empty cache, read from
first to last. Printed is the speed of the read as a share of the slower one of the two. Needs root. See
bench/README.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import click
import uvloop
from isal import isal_zlib
from ztoc import texts

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci_bus.asks import MountLayer, PrepareLayer, UnmountLayer
from soci_bus.events import SpansArrived
from soci_bus.nats import connect
from soci_dev import image
from soci_dev.folders import cache_folder
from soci_dev.launching import drop_page_cache
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_dev.tarball import member
from soci_registry import NoCredentials, Registry, RegistrySettings

FILES = 4
READ = 1 << 20
RANGE = 16 << 20
REPOSITORY = "bench/read"
ASK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Layer:
    """The blob, and its zTOC beside it."""

    blob: Path
    digest: Digest
    ztoc: bytes
    spans: int
    checksum: str  # of all files, one after the other

    @property
    def size(self) -> int:
        """Compressed bytes."""
        return self.blob.stat().st_size


def make_layer(folder: Path, size: int) -> Layer:
    """Some large files of text, ``size`` bytes in all."""
    text, checksum = texts(3), hashlib.sha256()

    def members():  # noqa: ANN202  as `add_layer` takes them
        for number in range(FILES):
            content = text(size // FILES)
            checksum.update(content)
            yield member(f"file-{number}", content=content)

    made = image.add_layer(folder, members())
    blob = folder / "blobs" / "sha256" / made.digest.removeprefix("sha256:")
    builder = ZtocBuilder("gzip")
    with blob.open("rb") as file:
        while chunk := file.read(READ):
            builder.feed(chunk)
    built = builder.finish()
    return Layer(blob, Digest(made.digest), built.ztoc_bytes, len(built.ztoc.span_digests), checksum.hexdigest())


def inflated(layer: Layer) -> float:
    """Seconds that ISA-L takes for the whole blob."""
    begun, inflater = time.perf_counter(), isal_zlib.decompressobj(31)
    with layer.blob.open("rb") as file:
        while chunk := file.read(READ):
            inflater.decompress(chunk)
    return time.perf_counter() - begun


async def fetched(layer: Layer, reference: str) -> float:
    """Seconds that ranges of the whole blob take, one after the other."""
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as registry:
        repository = registry.repository(reference)
        await repository.blob_range(layer.digest, 0, 1)  # the connection is there
        begun = time.perf_counter()
        for start in range(0, layer.size, RANGE):
            await repository.blob_range(layer.digest, start, min(start + RANGE, layer.size))
        return time.perf_counter() - begun


def read_all(folder: Path) -> tuple[float, str]:
    """Seconds, and the checksum, of all files; the checksum's own time is not counted."""
    spent, checksum = 0.0, hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while True:
                begun = time.perf_counter()
                chunk = file.read(READ)
                spent += time.perf_counter() - begun
                if not chunk:
                    break
                checksum.update(chunk)
    return spent, checksum.hexdigest()


async def push(layer: Layer, reference: str) -> None:
    """The blob and its zTOC into the registry."""
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as registry:
        repository = registry.repository(reference)
        await repository.push_blob_file(layer.blob, layer.digest)
        await repository.push_blob(layer.ztoc)


async def lazily(stack: Stack, layer: Layer, reference: str, name: str) -> tuple[float, list[SpansArrived]]:
    """Seconds of a cold read through the mounter, and what its fetchers told of it."""
    ztoc = sha256_digest(layer.ztoc)
    async with connect(stack.nats_url, node=stack.node, name="bench", wait=10) as bus:
        before = sum([1 async for _ in bus.history("fetch")])
        ask = PrepareLayer(reference, layer.digest, layer.size, ztoc, len(layer.ztoc))
        await bus.ask(ask, timeout=ASK_SECONDS)
        shown = await bus.ask(MountLayer(name, reference, layer.digest, ztoc), timeout=ASK_SECONDS)
        drop_page_cache()
        seconds, checksum = await asyncio.to_thread(read_all, Path(shown.path))
        if checksum != layer.checksum:
            raise click.ClickException("the files that were read are not those that were written")
        await bus.ask(UnmountLayer(name), timeout=ASK_SECONDS)
        await asyncio.sleep(1)  # events travel
        events = [envelope.event async for envelope in bus.history("fetch")][before:]
    shutil.rmtree(stack.root / "cache" / "layers")
    return seconds, [event for event in events if isinstance(event, SpansArrived)]


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--mib", default=1024, show_default=True, help="Of the layer, uncompressed.")
@click.option("--fetchers", default=1, show_default=True)
@click.option("--rtt-ms", default=0.0, help="Of the way to the registry, for the client alone and for the read.")
@click.option("--mbit", default=0.0, help="Megabits a second of the way to the registry; 0 is no limit.")
def main(*, rounds: int, mib: int, fetchers: int, rtt_ms: float, mbit: float) -> None:
    """Read a lazily mounted layer from first to last."""
    folder = cache_folder() / "run" / "read"
    work = folder / "made"
    work.mkdir(parents=True, exist_ok=True)
    try:
        click.echo(f"making a layer of {mib} MiB")
        layer = make_layer(work, mib << 20)
        shares = []
        services = ("mounter", "fetcher")
        with (
            Stack(folder / "s", services=services, fetchers=fetchers, containerd=False) as stack,
            Proxy(stack.registry) as proxy,
        ):
            slow = bool(rtt_ms or mbit)
            proxy.rtt_s, proxy.bandwidth = rtt_ms / 1000, int(mbit * 125_000) or None
            uvloop.run(push(layer, f"{stack.registry}/{REPOSITORY}:1"))
            reference = f"{proxy.address if slow else stack.registry}/{REPOSITORY}:1"
            for number in range(rounds):
                wire, inflate = uvloop.run(fetched(layer, reference)), inflated(layer)
                seconds, runs = asyncio.run(lazily(stack, layer, reference, f"m{number}"))
                moved, requests = sum(run.compressed_bytes for run in runs), sum(run.requests for run in runs)
                shares.append(max(wire, inflate) / seconds)
                click.echo(
                    f"  read {seconds:.2f} s, client alone {wire:.2f} s, inflate alone {inflate:.2f} s; "
                    f"{requests} requests for {layer.spans} spans, {moved / layer.size:.3f} of the blob's bytes"
                )
        click.echo(f"share of the slower one: {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
