# SPDX-License-Identifier: Apache-2.0
"""Reading a mounted layer, against the same tree unpacked, both below an overlayfs, as containers have them.

The arms: ``erofs`` and ``fuse`` show a layer of which all spans are in the cache, ``native`` one that is proven, too.
Each round takes them and the unpacked tree in a drawn order; printed are medians of the ratios within the rounds.
Needs root, and drops the machine's page cache. See bench/README.md.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci.inflate import inflate_span
from soci.toc import Ztoc
from soci_bus.asks import MountLayer, UnmountLayer
from soci_bus.nats import connect
from soci_cache import LayerStore
from soci_cache.proof import keep_tail, prove
from soci_dev.folders import cache_folder
from soci_dev.launching import drop_page_cache
from soci_dev.stack import Stack

ARMS = {"erofs": "erofs", "native": "erofs", "fuse": "fuse"}
"""Each with its ``mount_mode``."""
FILES, OPENED, BIG = 50_000, 2_000, 128 << 20
PER_LAYER, LAYERS = 10_000, 8
TIMES = 8
"""How often the large file is read in order."""
RANDOM_READS = 100_000
READ = 1 << 20
ASK_SECONDS = 60.0
PROVE_SECONDS = 30.0
SETTLE_SECONDS = 30.0
"""After which the mounter has let go of what it needs no more."""


@dataclass(frozen=True, slots=True)
class Made:
    """A layer: its tar, its blob and its table of contents."""

    tar: Path
    blob: bytes
    ztoc_bytes: bytes
    ztoc: Ztoc

    def put(self, cache: Path, *, whole: bool) -> tuple[Digest, Digest]:
        """All spans into a cache, and with ``whole`` proven; the layer's key."""
        key = sha256_digest(self.blob), sha256_digest(self.ztoc_bytes)
        store, place = LayerStore(cache), LayerStore(cache).directory(*key)
        diff_id = Digest("sha256:" + hashlib.file_digest(self.tar.open("rb"), "sha256").hexdigest()) if whole else None
        store.prepare(*key, self.ztoc_bytes, diff_id).close()
        with store.write(*key) as writer:
            for span in range(writer.spans.count):
                start, end = writer.spans.compressed(span)
                writer.fill(span, inflate_span(self.ztoc, writer.spans, span, self.blob[start:end]))
            if whole:
                keep_tail(place, self.tar.read_bytes()[writer.spans.uncompressed_size :])
                prove(place, writer.spans)
        return key


def make(folder: Path, files: int, big: int, seed: int) -> Made:
    """A layer of small files in folders of 100, and perhaps a large one, from a tree that stays beside it."""
    tree, source = folder / f"tree-{seed}", random.Random(seed)
    for number in range(files):
        path = tree / f"{number // 10_000}" / f"{number // 100}" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.randbytes(8) * source.randrange(20, 200))
    if big:
        (tree / "big").write_bytes(source.randbytes(READ) * (big // READ))
    tar = folder / f"{seed}.tar"
    subprocess.run(["tar", "-C", tree, "-cf", tar, "."], check=True)
    blob = gzip.compress(tar.read_bytes(), 1, mtime=0)
    builder = ZtocBuilder("gzip")
    builder.feed(blob)
    built = builder.finish()
    return Made(tar, blob, built.ztoc_bytes, built.ztoc)


@contextmanager
def below_overlay(folder: Path, lower: Path) -> Iterator[Path]:
    """An overlayfs on ``lower``, as a container has it."""
    places = [folder / name for name in ("upper", "work", "top")]
    for place in places:
        place.mkdir(parents=True)
    upper, work, top = places
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, top], check=True)
    try:
        yield top
    finally:
        subprocess.run(["umount", top], check=True)


class Arm:
    """A mounter of its own, with one layer mounted."""

    def __init__(self, stack: Stack, made: Made, *, whole: bool) -> None:
        self.stack, self.key = stack, made.put(stack.root / "cache", whole=whole)
        self.mounts: list[float] = []  # seconds
        self.path = self.mount("layer")
        if whole:
            place = LayerStore(stack.root / "cache").directory(*self.key)
            ends = time.monotonic() + PROVE_SECONDS
            while not (place / "headers").exists() and time.monotonic() < ends:
                time.sleep(0.1)
            self.unmount("layer")
            self.mount("layer")

    def mount(self, name: str, key: tuple[Digest, Digest] | None = None) -> Path:
        """Mount by a message, timed without the connection."""

        async def ask() -> str:
            async with connect(self.stack.nats_url, node=self.stack.node, name="bench", wait=10) as bus:
                begun = time.perf_counter()
                shown = await bus.ask(MountLayer(name, "registry/bench", *(key or self.key)), timeout=ASK_SECONDS)
                self.mounts.append(time.perf_counter() - begun)
                return shown.path

        return Path(asyncio.run(ask()))

    def unmount(self, name: str) -> None:
        """Take a mount away."""

        async def ask() -> None:
            async with connect(self.stack.nats_url, node=self.stack.node, name="bench", wait=10) as bus:
                await bus.ask(UnmountLayer(name), timeout=ASK_SECONDS)

        asyncio.run(ask())

    def pss(self) -> int:
        """Bytes of the mounter's proportional share of memory."""
        pid = self.stack.daemons["mounter"].pid
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def stat_all(root: Path) -> None:
    """Names and attributes of all files."""
    subprocess.run(["find", root, "-printf", "%s %m\n"], check=True, stdout=subprocess.DEVNULL)


def read_through(root: Path) -> None:
    """The large file, first to last, some times."""
    buffer = bytearray(READ)
    for _ in range(TIMES):
        with (root / "big").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_randomly(root: Path) -> None:
    """Pieces of 4 KiB of the large file."""
    source = random.Random(1)
    with (root / "big").open("rb", buffering=0) as file:
        for _ in range(RANDOM_READS):
            os.pread(file.fileno(), 4096, source.randrange(BIG // 4096) * 4096)


def open_cold(root: Path) -> None:
    """Some of the small files, in an order that is drawn, first of all from nothing in memory."""
    for number in random.Random(2).sample(range(FILES), OPENED):
        with (root / f"{number // 10_000}/{number // 100}/file-{number}").open("rb", buffering=0) as file:
            file.read(READ)


WORK: dict[str, tuple[Callable[[Path], None], bool]] = {
    f"find and stat of {FILES} files, warm": (stat_all, False),
    "a large file in order, warm": (read_through, False),
    "4 KiB here and there, warm": (read_randomly, False),
    f"open and read of {OPENED} small files, cold": (open_cold, True),
}


def timed(work: Callable[[Path], None], root: Path, *, cold: bool) -> float:
    """Seconds; warm work is done once before."""
    if cold:
        drop_page_cache()
    else:
        work(root)
    begun = time.perf_counter()
    work(root)
    return time.perf_counter() - begun


def compare(tops: dict[str, Path], rounds: int, source: random.Random) -> None:
    """Each work in each round on all arms, in a drawn order; prints a line a work and arm."""
    for name, (work, cold) in WORK.items():
        ratios, seconds = defaultdict(list), defaultdict(list)
        drop_page_cache()  # pages of the unpacked tree are larger while they are those that were written
        for _ in range(rounds):
            spent = {arm: timed(work, tops[arm], cold=cold) for arm in source.sample(list(tops), len(tops))}
            for arm, one in spent.items():
                ratios[arm].append(one / spent["unpacked"])
                seconds[arm].append(one)
        for arm in [arm for arm in ARMS if arm in tops]:
            least, most = min(ratios[arm]), max(ratios[arm])
            mine, its = (statistics.median(seconds[one]) * 1000 for one in (arm, "unpacked"))
            click.echo(
                f"{name:46} {arm:7} {statistics.median(ratios[arm]):5.2f} x unpacked"
                f" ({least:.2f} to {most:.2f}; {mine:.1f} ms and {its:.1f} ms)"
            )


def mounting(arms: dict[str, Arm], rounds: int) -> None:
    """Seconds of mounting the large layer."""
    for name, arm in arms.items():
        arm.unmount("layer")
        arm.mounts.clear()
        for _ in range(rounds):
            arm.mount("layer")
            arm.unmount("layer")
        click.echo(f"mounting {FILES} files{'':30} {name:7} {statistics.median(arm.mounts):5.2f} s")


def memory(arms: dict[str, Arm], made: list[Made]) -> None:
    """The mounter's share of memory for each more layer, of which some files are read."""
    for name, arm in arms.items():
        keys = [one.put(arm.stack.root / "cache", whole=name == "native") for one in made]
        arm.stack.stop("mounter")
        arm.stack.start("mounter")
        for number, key in enumerate(keys):
            path = arm.mount(f"m{number}", key)
            for file in range(0, PER_LAYER, 100):
                (path / f"0/{file // 100}/file-{file}").read_bytes()
            if number == 1:
                time.sleep(SETTLE_SECONDS)
                before = arm.pss()
        time.sleep(SETTLE_SECONDS)
        each = (arm.pss() - before) / (len(keys) - 2)
        click.echo(f"PSS for each layer of {PER_LAYER} files{'':18} {name:7} {each / (1 << 20):5.2f} MiB")


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the order.")
@click.option("--arm", "wanted", multiple=True, type=click.Choice(list(ARMS)), help="Only these arms.")
def main(*, rounds: int, seed: int, wanted: tuple[str, ...]) -> None:
    """Reads of a mounted layer against its tree unpacked; mounting; memory."""
    folder = cache_folder() / "run" / "mount"
    shutil.rmtree(folder / "made", ignore_errors=True)
    (folder / "made").mkdir(parents=True)
    names = wanted or tuple(ARMS)
    try:
        with ExitStack() as stack:
            click.echo("making the layers")
            made = make(folder / "made", FILES, BIG, 0)
            more = [make(folder / "made", PER_LAYER, 0, 1 + number) for number in range(LAYERS)]
            arms = {}
            for name in names:
                settings = f'[sociable]\nmount_mode = "{ARMS[name]}"\n'
                service = Stack(folder / name, registries=0, services=["mounter"], containerd=False, settings=settings)
                arms[name] = Arm(stack.enter_context(service), made, whole=name == "native")
            lowers = {"unpacked": folder / "made/tree-0", **{name: arm.path for name, arm in arms.items()}}
            with ExitStack() as open_now:
                tops = {
                    name: open_now.enter_context(below_overlay(folder / "made" / name, lower))
                    for name, lower in lowers.items()
                }
                compare(tops, rounds, random.Random(seed))
            mounting(arms, rounds)
            memory(arms, more)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
