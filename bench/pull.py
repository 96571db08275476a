# SPDX-License-Identifier: Apache-2.0
"""A whole pull of the demo's image: ours, all layers at once, against containerd's own onto overlayfs.

Ours is ``soci pull`` from its first line to its last, through containerd, its calls and our services; or, with
``--direct``, the bringing of the layers alone, without containerd, in this process.

Pairs of runs, one right after the other, in turns, from the same registry through the same proxy, the page cache
dropped before each. Each pair has a fresh file system (ext4 with a journal, on a loop device) with all daemons and all
that is pulled on it: where many files were deleted a moment ago, some file systems make new ones much more slowly.
What is printed is the median of the pairs' ratios. Needs root. See bench/README.md.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from soci.digest import Digest
from soci_bus.asks import ReadImageConfig
from soci_bus.nats import connect
from soci_dev import image
from soci_dev.demo_image import REPOSITORY, demo_image
from soci_dev.folders import cache_folder
from soci_dev.launching import drop_page_cache
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_snapshotter.whole import WantedLayer, WholeLayers

OVERLAYFS = "overlayfs"
DISK_BYTES = 8 << 30
SETTINGS = """
[pull_modes.parallel_pull_unpack]
enable = true
max_concurrent_unpacks = {unpacks}
max_concurrent_unpacks_per_image = {per_image}
"""


@dataclass(frozen=True, slots=True)
class Pull:
    """Seconds until the pull returns, and until all that it wrote is on disk as well."""

    done: float
    on_disk: float


def show(pull: Pull) -> str:
    """Both figures."""
    return f"{pull.done:.2f} s ({pull.on_disk:.2f} s on disk)"


def timed(begun: float) -> Pull:
    """The end of a pull that began then."""
    done = time.monotonic() - begun
    os.sync()
    return Pull(done, time.monotonic() - begun)


@contextmanager
def fresh_disk() -> Iterator[Path]:
    """The folder of a new file system."""
    folder = cache_folder() / "run" / "bench"
    file = folder.with_suffix(".img")
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as content:
        content.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", file], check=True)
    subprocess.run(["mount", "-o", "loop", file, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        file.unlink()
        folder.rmdir()


def theirs(stack: Stack, reference: str) -> Pull:
    """A pull by containerd."""
    drop_page_cache()
    begun = time.monotonic()
    stack.ctr("images", "pull", "--plain-http", "--snapshotter", OVERLAYFS, reference)
    return timed(begun)


def ours(stack: Stack, reference: str) -> Pull:
    """A pull by ``soci``, through containerd and the snapshotter."""
    drop_page_cache()
    begun = time.monotonic()
    stack.soci("pull", "--plain-http", reference)
    return timed(begun)


async def direct(stack: Stack, reference: str, manifest: Digest, unpacks: int, per_image: int) -> Pull:
    """All layers begun at once, then claimed one after the other, as containerd asks for them."""
    snapshots = stack.folder / "whole" / "snapshots"
    snapshots.mkdir(parents=True)
    async with (
        connect(stack.nats_url, node=stack.node, name="bench", wait=10) as bus,
        WholeLayers(bus, snapshots.parent / "unpack", max_unpacks=unpacks, max_unpacks_per_image=per_image) as whole,
    ):
        drop_page_cache()
        begun = time.monotonic()
        config = await bus.ask(ReadImageConfig(reference, manifest), timeout=60)
        rows = zip(config.layers, config.sizes, config.media_types, config.diff_ids, strict=True)
        whole.begin(reference, manifest, [WantedLayer(*row) for row in rows])
        lower: list[Path] = []
        for number, layer in enumerate(config.layers):
            upper = snapshots / str(number) / "fs"
            upper.mkdir(parents=True)
            await whole.claim(manifest, layer, upper, lower)
            lower.insert(0, upper)
        return timed(begun)


def row(name: str, pairs: Sequence[tuple[float, float]]) -> str:
    """One line of figures: ours and theirs, pair by pair."""
    ratios = sorted(mine / other for mine, other in pairs)
    mine, other = (statistics.median(values) for values in zip(*pairs, strict=True))
    return (
        f"{name:24} {statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(pairs)} pairs), "
        f"ours {mine:.2f} s, containerd {other:.2f} s"
    )


@click.command()
@click.option("--pairs", default=5, show_default=True, help="Pairs of runs.")
@click.option("--rtt-ms", default=0.0, help="Of the way to the registry.")
@click.option("--mbit", default=0.0, help="Megabits a second of the way to the registry; 0 is no limit.")
@click.option("--unpacks", default=-1, show_default=True, help="Layers unpacked at a time; -1 is one a core.")
@click.option("--unpacks-per-image", default=-1, show_default=True)
@click.option("--direct", "directly", is_flag=True, help="Bring the layers alone, without containerd.")
def main(*, pairs: int, rtt_ms: float, mbit: float, unpacks: int, unpacks_per_image: int, directly: bool) -> None:  # noqa: PLR0913  one parameter a flag
    """Pull the demo's image whole, in both ways."""
    built = demo_image(click.echo)
    found: list[tuple[Pull, Pull]] = []
    settings = SETTINGS.format(unpacks=unpacks, per_image=unpacks_per_image)
    services = ("fetcher",) if directly else ("fetcher", "snapshotter")
    for number in range(pairs):
        with (
            fresh_disk() as disk,
            Stack(disk / "s", services=services, settings=settings) as stack,
            Proxy(stack.registry) as proxy,
        ):
            reference = image.push(built, stack.registry, REPOSITORY)
            if rtt_ms or mbit:
                proxy.rtt_s, proxy.bandwidth = rtt_ms / 1000, int(mbit * 125_000) or None
                reference = reference.replace(stack.registry, proxy.address)
            if number % 2:
                other = theirs(stack, reference)
            if directly:
                mine = asyncio.run(direct(stack, reference, Digest(built.digest), unpacks, unpacks_per_image))
            else:
                mine = ours(stack, reference)
            if not number % 2:
                other = theirs(stack, reference)
        found.append((mine, other))
        click.echo(f"  ours {show(mine)}, containerd {show(other)}")
    click.echo(row("whole pull", [(mine.done, other.done) for mine, other in found]))
    click.echo(row("whole pull, on disk", [(mine.on_disk, other.on_disk) for mine, other in found]))


if __name__ == "__main__":
    main()
