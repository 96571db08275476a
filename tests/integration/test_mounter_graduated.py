# SPDX-License-Identifier: Apache-2.0
"""Layers of which all is here, mounted from their own file: nothing of ours is between the kernel and the bytes."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci_cache import LayerStore
from soci_cache.proof import COMPLETE, read_whole
from soci_cache.tidy import Wish, tidy
from soci_mounter import graduate, kernel
from support.mounter_bench import NEEDS_EROFS, Bench, described
from support.mounter_layers import Made, everything, make, noise
from support.mounter_process import Holder

pytestmark = [pytest.mark.root, NEEDS_EROFS]
_LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def full() -> Made:
    return make(everything())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, "erofs")
    try:
        yield made
    finally:
        made.close()


def drop_pages(path: Path) -> None:
    """Have the kernel forget what it read of the files below."""
    for one in path.rglob("*"):
        if one.is_file() and not one.is_symlink():
            with one.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def eventually(found: Path) -> None:
    deadline = time.monotonic() + 20
    while not found.exists():
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def graduated(bench: Bench, full: Made) -> tuple[Path, Path]:
    """A native mount of a layer that was mounted lazily before, and the layer's folder."""
    server = bench.start()
    bench.mount(server, "lazy", full)
    place = full.complete(bench.root / "cache")
    eventually(place / graduate.FILE)
    assert (place / graduate.FILE).read_text() == graduate.AGREE
    return bench.mount(server, "m1", full), place


def test_a_complete_layer_is_read_without_us(bench: Bench, full: Made) -> None:
    """The next mount shows the same as the lazy one, and not one read reaches the device server."""
    path, _ = graduated(bench, full)
    (server,) = bench.servers
    before = described(bench.root / "mounts/lazy")
    assert "lazy" in server.ask("reads")
    assert described(path) == before
    drop_pages(path)
    assert described(path) == before
    assert "m1" not in server.ask("reads")
    assert kernel.mounts_at(path)[0][2].endswith("/m1.native")
    told = {one["mount"]: (one["way"], one["state"], one["here"] == one["spans"] > 0) for one in server.ask("list")}
    assert told == {"lazy": ("erofs", "complete", True), "m1": ("native", "native", True)}


def test_a_native_mount_needs_none_of_our_processes(bench: Bench, full: Made) -> None:
    """Mounter and holder killed: all of it is readable; the successor goes on with that very mount, and takes it away."""
    path, _ = graduated(bench, full)
    assert bench.holder
    bench.holder.end(signal.SIGKILL)
    bench.servers[0].end(signal.SIGKILL)
    mounted = kernel.mounted_at(path)
    drop_pages(path)
    assert (path / "big").read_bytes() == noise(1_500_000, 2)
    bench.holder = Holder(bench.root)
    with (path / "big").open("rb"):  # or its device's number might be given to another mount
        server = bench.start()
    assert sorted(server.ask("check", mounts=["m1", "lazy"])) == ["lazy", "m1"]
    assert kernel.mounted_at(path) == mounted
    # The lazy one had to be mounted anew, and is native now, too.
    assert kernel.mounts_at(bench.root / "mounts/lazy")[0][2].endswith("/lazy.native")
    server.ask("unmount", mount="m1")
    assert kernel.mounted_at(path) == []
    assert not list((bench.root / "mounter/images").glob("m1.*"))


def test_eviction_leaves_a_native_mount_alone(bench: Bench, full: Made) -> None:
    """No span of it goes, whatever the budget; a folder that goes takes no byte from a container that still reads."""
    path, place = graduated(bench, full)
    bench.servers[0].end(signal.SIGKILL)  # no reader's lock is held any more
    cache = bench.root / "cache"
    key = (full.layer, full.ztoc_digest)
    done = tidy(cache, Wish({key}, budget=1))
    assert (done.spans, done.layers) == (0, [])
    assert (whole := read_whole(place))
    assert whole.verdict == COMPLETE
    with (path / "big").open("rb") as file:
        assert tidy(cache, Wish(set(), budget=1, grace=0.0)).layers == [key]
        assert not place.exists()
        drop_pages(path)
        assert file.read() == noise(1_500_000, 2)


def test_a_table_of_contents_that_lies_stays_on_our_device(bench: Bench, full: Made) -> None:
    """A complete layer whose headers say something else is reported, and its next mount is lazy as before."""
    server = bench.start()
    bench.mount(server, "lazy", full)
    place = full.complete(bench.root / "cache")
    eventually(place / graduate.FILE)
    server.end()
    (place / graduate.FILE).write_text(graduate.DIFFER + "name")
    path = bench.mount(bench.start(), "m1", full)
    assert kernel.mounts_at(path)[0][2].endswith("/m1.erofs")
    assert (path / "big").read_bytes() == noise(1_500_000, 2)


def test_after_a_boot_the_layer_is_native_at_once(bench: Bench, full: Made) -> None:
    """With all mounts gone and another boot's map, the record alone brings the native mount back, once spans are proven."""
    path, place = graduated(bench, full)
    bench.servers[0].end()
    assert bench.holder
    bench.holder.end()
    for one in (*(bench.root / "mounts").iterdir(), bench.root / "mounter/data"):
        kernel.clear(one)
    spans = place / "spans"
    content = bytearray(spans.read_bytes())
    content[16:52] = b"another-boot".ljust(36, b"-")
    spans.write_bytes(content)
    bench.holder = Holder(bench.root)
    bench.start()
    assert kernel.mounts_at(path)[0][2].endswith("/m1.native")
    assert (path / "big").read_bytes() == noise(1_500_000, 2)
    with LayerStore(bench.root / "cache").read(full.layer, full.ztoc_digest) as reader:
        assert reader.complete()
