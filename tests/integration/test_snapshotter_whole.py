# SPDX-License-Identifier: Apache-2.0
"""All layers of an image under way at once: what is handed over is exact, and whatever dies meanwhile leaves nothing."""

from __future__ import annotations

import asyncio
import gzip
import os
import secrets
import shutil
import stat
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import Mismatch, NotFound, SociError, Unavailable, Unsupported
from soci_bus.asks import FetchLayer, ReadImageConfig
from soci_bus.face import Bus
from soci_bus.memory import MemoryBus
from soci_bus.nats import connect
from soci_cache.arriving import progress
from soci_dev import image
from soci_dev.faults import Corrupt, Delay, Hook, Status
from soci_dev.folders import cache_folder
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_dev.tarball import Member, member
from soci_snapshotter import unpacker
from soci_snapshotter import whole as module
from soci_snapshotter.unpack import unpack
from soci_snapshotter.usage import disk_usage
from soci_snapshotter.whole import Arrived, WantedLayer, WholeLayers
from support.bus import until
from support.fetching import fetching
from support.images import implied_directories, noise, torture_image
from support.snapshotter import Calls
from support.treecmp import Seen, differences, look

pytestmark = pytest.mark.root

DIR = tarfile.DIRTYPE


@dataclass(frozen=True)
class Pushed:
    """An image in a registry, seen through the proxy."""

    reference: str
    built: image.Image
    diff_ids: Sequence[Digest]

    @property
    def manifest(self) -> Digest:
        return Digest(self.built.digest)

    @property
    def wanted(self) -> list[WantedLayer]:
        return [
            WantedLayer(Digest(layer["digest"]), layer["size"], layer["mediaType"], diff_id)
            for layer, diff_id in zip(self.built.layers, self.diff_ids, strict=True)
        ]

    def blob(self, number: int) -> Path:
        digest: str = self.built.layers[number]["digest"]
        return self.built.folder / "blobs/sha256" / digest.partition(":")[2]


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a real file system: overlay's xattrs and devices."""
    folder = Path(tempfile.mkdtemp(prefix="whole-", dir=cache_folder()))
    yield folder
    shutil.rmtree(folder)


@asynccontextmanager
async def running(disk: Path, **options: Any) -> AsyncIterator[WholeLayers]:
    """Whole layers over a fetcher of this process, and a real registry behind it."""
    bus = MemoryBus()
    async with fetching(disk / "cache") as fetcher:
        await bus.serve(FetchLayer, fetcher.layers.fetch)
        async with over(bus, disk, **options) as whole:
            yield whole
    assert list((disk / "unpack").iterdir()) == []


@asynccontextmanager
async def over(bus: Bus, disk: Path, **options: Any) -> AsyncIterator[WholeLayers]:
    async with WholeLayers(bus, disk / "unpack", **options) as whole:
        yield whole


def push(folder: Path, proxy: Proxy, *layers: Sequence[Member], compression: Any = None) -> Pushed:
    made = [image.add_layer(folder, members, compression=compression) for members in layers]
    built = image.write_image(folder, made)
    reference = image.push(built, proxy.address, "u/" + secrets.token_hex(6))
    proxy.reset()
    return Pushed(reference, built, [Digest(one.diff_id) for one in made])


def upper(disk: Path, number: int) -> Path:
    """An empty snapshot's directory."""
    place = disk / "snapshots" / str(number) / "fs"
    place.mkdir(parents=True)
    return place


async def claim_all(whole: WholeLayers, pushed: Pushed, disk: Path) -> list[Path]:
    """Every layer, the lowest first, as containerd asks for them."""
    tops: list[Path] = []
    for number, one in enumerate(pushed.wanted):
        target = upper(disk, number)
        size, inodes = await whole.claim(pushed.manifest, one.layer, target, tops)
        exact = disk_usage(target)
        assert inodes == exact[1]
        assert size == pytest.approx(exact[0], rel=0.01, abs=100_000)  # the file system may still be deciding
        tops.insert(0, target)
    return tops[::-1]


def noisy(count: int = 6, size: int = 100_000) -> list[Member]:
    """Files that no other test has."""
    seed = secrets.randbelow(1 << 30)
    return [member(f"data/{number}", content=noise(seed + number, size)) for number in range(count)]


def slow_blobs(seconds: float) -> Hook:
    return lambda one: Delay(seconds) if one.is_blob else None


def torture(proxy: Proxy) -> Pushed:
    built = torture_image()
    reference = image.push(built, proxy.address, "torture")
    blobs = [built.folder / "blobs/sha256" / layer["digest"].partition(":")[2] for layer in built.layers]
    return Pushed(reference, built, [sha256_digest(gzip.decompress(blob.read_bytes())) for blob in blobs])


def seen(tops: Sequence[Path], timeless: frozenset[str]) -> list[dict[bytes, Seen]]:
    """Layers as they look, without the times that nobody says: of whiteouts, and of implied directories."""
    return [
        {
            path: replace(one, mtime_ns=None) if one.type == stat.S_IFCHR and one.rdev == 0 else one
            for path, one in look(top, timeless=timeless).items()
        }
        for top in tops
    ]


@pytest.mark.parametrize("unpacks", [1, 3])
async def test_the_same_as_one_after_the_other(unpacks: int, disk: Path, proxy: Proxy) -> None:
    """Layers that were unpacked before those below them were there look as if they had been, implied directories with
    their times included; by threads and by processes."""
    pushed = torture(proxy)
    tops: list[Path] = []
    for number, one in enumerate(pushed.wanted):
        top = disk / "plain" / str(number)
        top.mkdir(parents=True)
        unpack(pushed.blob(number), top, media_type=one.media_type, diff_id=one.diff_id, lower=tops)
        tops.insert(0, top)
    async with running(disk, max_unpacks=unpacks) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        ours = await claim_all(whole, pushed, disk)
    # nothing says the times of roots, nor of directories that no layer below has
    timeless = frozenset({"", "made", "new"} | {name for name in implied_directories() if not _below(tops, name)})
    for mine, other in zip(seen(ours, timeless), seen(tops[::-1], timeless), strict=True):
        assert differences(mine, other) == []


def _below(tops: Sequence[Path], name: str) -> bool:
    return sum((top / name).is_dir() for top in tops) > 1


@pytest.mark.timeout(180)
async def test_the_same_as_containerd(disk: Path, bare_stack: Stack) -> None:
    """Layer by layer what containerd's own pull puts into its snapshots."""
    with Proxy(bare_stack.registry) as proxy:
        pushed = torture(proxy)
        bare_stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", pushed.reference)
        chain, theirs = "", list[Path]()
        for diff_id in pushed.diff_ids:
            chain = str(sha256_digest(f"{chain} {diff_id}".encode())) if chain else str(diff_id)
        calls = Calls(bare_stack.containerd_address, "overlayfs", bare_stack.namespace)
        with closing(calls):
            (mount,) = calls.view("look", chain)
            calls.remove("look")
        (options,) = [word for word in mount.options if word.startswith("lowerdir=")]
        theirs = [Path(folder) for folder in options.removeprefix("lowerdir=").split(":")][::-1]
        async with running(disk) as whole:
            whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
            ours = await claim_all(whole, pushed, disk)
    timeless = frozenset({"", *implied_directories()})
    for mine, other in zip(seen(ours, timeless), seen(theirs, timeless), strict=True):
        assert differences(mine, other) == []


async def test_all_come_at_once_and_each_is_claimed_in_turn(disk: Path, proxy: Proxy) -> None:
    """Every layer's request is made before the first layer is claimed, and no blob is fetched twice."""
    pushed = push(disk / "image", proxy, noisy(), noisy(), noisy())
    proxy.hook = slow_blobs(0.2)
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await until(lambda: proxy.counts.peak == 3, "three downloads at once")
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)  # all under way: nothing more happens
        ours = await claim_all(whole, pushed, disk)
    assert proxy.counts.blob_bytes == pushed.built.size
    assert all((top / "data/5").stat().st_size == 100_000 for top in ours)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_each_compression(disk: Path, proxy: Proxy, compression: str) -> None:
    """Unpacked while it comes."""
    members = noisy()
    pushed = push(disk / "image", proxy, members, compression=compression)
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        (top,) = await claim_all(whole, pushed, disk)
    assert (top / "data/3").read_bytes() == members[3][1]


@pytest.mark.parametrize("listed", [0, 1])
async def test_the_root_of_a_layer(disk: Path, proxy: Proxy, listed: int) -> None:
    """Where the layer lists it, as it says; else as the snapshot's directory was made."""
    pushed = push(disk / "image", proxy, [*([member("./", DIR, mode=0o711, uid=3, gid=4)] * listed), member("f")])
    target = upper(disk, 0)
    os.chown(target, 7, 8)
    target.chmod(0o750)
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await whole.claim(pushed.manifest, pushed.wanted[0].layer, target, [])
    found = target.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == ((0o711, 3, 4) if listed else (0o750, 7, 8))


def wrong_diff_id(pushed: Pushed) -> WantedLayer:
    return replace(pushed.wanted[0], diff_id=sha256_digest(b"another"))


FAULTS: dict[str, tuple[Hook | None, Callable[[Pushed], WantedLayer] | None, type[SociError]]] = {
    "diff_id": (None, wrong_diff_id, Mismatch),
    # the time in gzip's header: what inflates is the same
    "blob-digest": (lambda one: Corrupt(4) if one.is_blob else None, None, Mismatch),
    "damage": (lambda one: Corrupt(200_000) if one.is_blob else None, None, SociError),
    "not-there": (lambda one: Status(404) if one.is_blob else None, None, NotFound),
    "type": (None, lambda pushed: replace(pushed.wanted[0], media_type="text/plain"), Unsupported),
    "size": (None, lambda pushed: replace(pushed.wanted[0], size=1000), SociError),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_layer_that_is_not_what_it_should_be(disk: Path, proxy: Proxy, fault: str) -> None:
    """The claim raises the reason and leaves the directory as it was; the next one begins anew, and may succeed."""
    hook, change, error = FAULTS[fault]
    pushed = push(disk / "image", proxy, noisy())
    target = upper(disk, 0)
    proxy.hook = hook
    wanted = [change(pushed)] if change else pushed.wanted
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, wanted)
        with pytest.raises(error):
            await whole.claim(pushed.manifest, pushed.wanted[0].layer, target, [])
        await until(lambda: not list((disk / "unpack").iterdir()), "nothing left of it")
        assert list(target.iterdir()) == []
        proxy.hook = None
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await whole.claim(pushed.manifest, pushed.wanted[0].layer, target, [])
    assert len(list((target / "data").iterdir())) == 6


async def test_a_directory_that_is_not_empty(disk: Path, proxy: Proxy) -> None:
    """Nothing is put over what is there."""
    pushed = push(disk / "image", proxy, noisy())
    target = upper(disk, 0)
    (target / "mine").touch()
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        with pytest.raises(SociError):
            await whole.claim(pushed.manifest, pushed.wanted[0].layer, target, [])
    assert [path.name for path in target.iterdir()] == ["mine"]


async def test_claims_of_what_was_not_begun(disk: Path, proxy: Proxy) -> None:
    """An unknown image or layer is `NotFound`; a layer that was claimed before, by another pull, comes again."""
    pushed = push(disk / "image", proxy, noisy(), noisy())
    layer = pushed.wanted[0].layer
    async with running(disk) as whole:
        with pytest.raises(NotFound):
            await whole.claim(pushed.manifest, layer, upper(disk, 0), [])
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted[:1])
        with pytest.raises(NotFound):
            await whole.claim(pushed.manifest, pushed.wanted[1].layer, upper(disk, 1), [])
        targets = [upper(disk, number) for number in (2, 3, 4)]
        await asyncio.gather(*(whole.claim(pushed.manifest, layer, target, []) for target in targets))
    assert [len(list((target / "data").iterdir())) for target in targets] == [6, 6, 6]


async def test_a_claim_that_is_given_up(disk: Path, proxy: Proxy) -> None:
    """The layer goes on for the next one."""
    pushed = push(disk / "image", proxy, noisy())
    layer = pushed.wanted[0].layer
    proxy.hook = slow_blobs(0.2)
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        one = asyncio.ensure_future(whole.claim(pushed.manifest, layer, upper(disk, 0), []))
        await until(lambda: proxy.counts.requests > 0, "the download")
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await whole.claim(pushed.manifest, layer, upper(disk, 1), [])
    assert proxy.counts.blob_bytes == pushed.built.size


async def test_dropped(disk: Path, proxy: Proxy) -> None:
    """Whoever waits is told, at whatever point it is; nothing is left on disk, and the download ends."""
    pushed = push(disk / "image", proxy, noisy(), noisy(), noisy())
    proxy.hook = lambda one: Delay(30) if pushed.built.layers[2]["digest"] in one.path else None
    async with running(disk, max_unpacks=1) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), [])
        last = asyncio.ensure_future(whole.claim(pushed.manifest, pushed.wanted[2].layer, upper(disk, 2), []))
        await until(lambda: whole._jobs[pushed.manifest, pushed.wanted[2].layer].claims, "the claim")
        assert len(list((disk / "unpack").iterdir())) == 2
        await whole.drop(pushed.manifest)
        with pytest.raises(Unavailable):
            await last
        assert list((disk / "unpack").iterdir()) == []
        with pytest.raises(NotFound):
            await whole.claim(pushed.manifest, pushed.wanted[1].layer, upper(disk, 1), [])
        await whole.drop(pushed.manifest)


async def test_dropped_at_once(disk: Path, proxy: Proxy) -> None:
    """Before any of it began."""
    pushed = push(disk / "image", proxy, noisy())
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        one = asyncio.ensure_future(whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), []))
        await whole.drop(pushed.manifest)
        with pytest.raises((Unavailable, NotFound)):
            await one


async def test_what_nobody_claims_is_deleted(disk: Path, proxy: Proxy) -> None:
    """After its time; it can be claimed all the same, and is then brought again."""
    pushed = push(disk / "image", proxy, noisy())
    async with running(disk, unclaimed=0.05) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await until(lambda: proxy.counts.blob_bytes, "the download")
        await until(lambda: not list((disk / "unpack").iterdir()), "the end of its time")
        await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), [])
    assert proxy.counts.blob_bytes == 2 * pushed.built.size


async def test_what_an_earlier_process_left(disk: Path) -> None:
    """It is deleted at the start, whatever it is; the folder is for root alone."""
    scratch = disk / "unpack"
    (scratch / "7/fs/a/b").mkdir(parents=True)
    (scratch / "7/blob").touch()
    (scratch / "file").touch()
    (scratch / "link").symlink_to(disk)
    scratch.chmod(0o755)
    async with running(disk):
        assert list(scratch.iterdir()) == []
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    assert disk.exists()


async def test_limits(disk: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers beyond the limit are begun when they are claimed; so is one of an image that was forgotten, but not."""
    monkeypatch.setattr(module, "JOBS", 1)
    monkeypatch.setattr(module, "PLANS", 1)
    pushed = push(disk / "image", proxy, noisy(), noisy())
    other = push(disk / "other", proxy, noisy())
    async with running(disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await claim_all(whole, pushed, disk)
        whole.begin(other.reference, other.manifest, other.wanted)
        with pytest.raises(NotFound):
            await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 9), [])


async def test_one_at_a_time_of_an_image(disk: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many layers are unpacked at once as an image may have, though there are more workers."""
    now = most = 0
    unpack_one = unpacker._Process.unpack

    async def counted(place: Any, wish: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await unpack_one(place, wish)
        finally:
            now -= 1

    monkeypatch.setattr(unpacker._Process, "unpack", counted)
    pushed = push(disk / "image", proxy, noisy(), noisy(), noisy())
    for per_image, expected in ((1, 1), (2, 2)):
        most = 0
        proxy.hook = slow_blobs(0.1)
        place = disk / str(per_image)
        place.mkdir()
        async with running(place, max_unpacks=3, max_unpacks_per_image=per_image) as whole:
            whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
            await claim_all(whole, pushed, place)
        assert most == expected


async def test_a_worker_that_dies(disk: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer is `Unavailable`, and can be claimed again; the others come."""
    pushed = push(disk / "image", proxy, noisy())
    workers: list[unpacker._Process] = []
    unpack_one = unpacker._Process.unpack

    async def kept(place: unpacker._Process, wish: Any) -> Any:
        workers.append(place)
        return await unpack_one(place, wish)

    monkeypatch.setattr(unpacker._Process, "unpack", kept)
    proxy.hook = slow_blobs(0.3)
    async with running(disk, max_unpacks=2) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        one = asyncio.ensure_future(whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), []))
        await until(lambda: workers, "a worker")
        workers[0]._process.kill()
        with pytest.raises(Unavailable, match="ended in the middle"):
            await one
        await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 1), [])
    assert len(workers) == 2
    assert all(worker._process.returncode is not None for worker in workers)


async def test_workers_without_work_end(disk: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used again while there is work, and not kept for ever."""
    monkeypatch.setattr(unpacker, "IDLE_SECONDS", 0.0)
    pushed = push(disk / "image", proxy, noisy(), noisy())
    async with running(disk, max_unpacks=2, max_unpacks_per_image=1, unclaimed=0.1) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        await claim_all(whole, pushed, disk)
        await until(lambda: not whole._unpackers._idle, "no worker")


@pytest.mark.timeout(120)
async def test_a_fetcher_that_dies(disk: Path, make_stack: Callable[..., Stack]) -> None:
    """Another one goes on where it ended, and the reader behind it notices nothing."""
    stack = make_stack(services=("fetcher",), fetchers=2, containerd=False)
    stack.stop("fetcher-2")
    with Proxy(stack.registry, bandwidth=1_500_000) as proxy:
        pushed = push(disk / "image", proxy, noisy(20, 400_000))
        async with connect(stack.nats_url, node=stack.node, name="test", wait=20) as bus, over(bus, disk) as whole:
            config = await bus.ask(ReadImageConfig(pushed.reference, pushed.manifest), timeout=20)
            assert config.sizes == tuple(one.size for one in pushed.wanted)
            whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
            blob = disk / "unpack/1/blob"
            await until(lambda: progress(blob)[0] > 0, "the first bytes")
            await asyncio.to_thread(stack.start, "fetcher-2")
            stack.kill("fetcher-1")
            proxy.bandwidth = None
            await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), [])
    assert len(list((disk / "snapshots/0/fs/data").iterdir())) == 20


async def test_no_fetcher_at_all(disk: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim ends with an error after a few tries."""
    monkeypatch.setattr("soci_snapshotter.fetching.RETRY_SECONDS", 0.01)
    pushed = push(disk / "image", proxy, noisy())
    async with over(MemoryBus(), disk) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted)
        with pytest.raises(Unavailable):
            await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), [])


async def test_blobs_can_be_kept(disk: Path, proxy: Proxy) -> None:
    """Who wants to keep them sees each whole blob once, before the layer is handed over; a failure is the layer's."""
    pushed = push(disk / "image", proxy, noisy(), noisy())
    kept: dict[Digest, bytes] = {}

    async def keep(arrived: Arrived) -> None:
        assert (arrived.image, arrived.manifest, arrived.namespace) == (pushed.reference, pushed.manifest, "k8s.io")
        kept[arrived.wanted.layer] = arrived.path.read_bytes()
        if len(kept) == 2:
            raise Unavailable("no room")

    async with running(disk, keep=keep) as whole:
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted[:1], namespace="k8s.io")
        await whole.claim(pushed.manifest, pushed.wanted[0].layer, upper(disk, 0), [])
        whole.begin(pushed.reference, pushed.manifest, pushed.wanted[1:], namespace="k8s.io")
        with pytest.raises(Unavailable, match="no room"):
            await whole.claim(pushed.manifest, pushed.wanted[1].layer, upper(disk, 1), [])
    assert {sha256_digest(content) for content in kept.values()} == set(kept) == {one.layer for one in pushed.wanted}
