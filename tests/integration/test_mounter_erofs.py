# SPDX-License-Identifier: Apache-2.0
"""Layers shown by EROFS: mounts that outlive the mounter, whoever of mounter and holder dies when."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci_mounter import holder, kernel
from support.mounter_bench import NEEDS_EROFS, Bench, described
from support.mounter_layers import Made, everything, item, make, noise
from support.mounter_process import Holder

pytestmark = [pytest.mark.root, NEEDS_EROFS]


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


def test_a_reader_does_not_notice_that_the_mounter_was_killed(bench: Bench, full: Made) -> None:
    """Killed while a read waits for its bytes, the mounter is started anew: the read ends well, on the same mount."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    server.ask("fail", how="hang")
    reader = subprocess.Popen(["cat", path / "big"], stdout=subprocess.PIPE)
    time.sleep(0.3)
    server.end(signal.SIGKILL)
    assert reader.poll() is None
    mounted = kernel.mounted_at(path)
    bench.start()
    content, _ = reader.communicate(timeout=20)
    assert (reader.returncode, content) == (0, noise(1_500_000, 2))
    assert kernel.mounted_at(path) == mounted


def test_the_kernel_reads_far_ahead(bench: Bench, full: Made) -> None:
    """A mount's read-ahead is raised from the kernel's 128 KiB, where the machine lets us."""
    before = kernel.erofs_devices()
    bench.mount(bench.start(), "m1", full)
    limits = [Path("/sys/class/bdi", name, "read_ahead_kb") for name in kernel.erofs_devices() - before]
    if len(limits) != 1 or not os.access(limits[0], os.W_OK):
        pytest.skip("somebody else mounts here, or /sys is read-only")
    assert int(limits[0].read_text()) == kernel.EROFS_READ_AHEAD_KIB


def test_an_open_file_and_a_directory_survive_restarts(bench: Bench, full: Made) -> None:
    """A container's open files, its working directory and an overlay above go on working, whatever ended the mounter."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    before = described(path)
    with (path / "big").open("rb", buffering=0) as file:
        assert file.read(1000) == noise(1_500_000, 2)[:1000]
        for number in (signal.SIGKILL, signal.SIGTERM):
            status = server.end(number)
            assert status == (0 if number == signal.SIGTERM else -number)
            assert len(os.listdir(path / "many")) == 700  # noqa: PTH208
            server = bench.start()
            assert server.ask("check", mounts=["m1", "m2"]) == ["m1"]
        assert file.read() == noise(1_500_000, 2)[1000:]
    assert described(path) == before


def test_a_layer_shown_after_a_restart_and_one_before_share_the_connection(bench: Bench, full: Made) -> None:
    """A successor mounts more layers, and takes away those of its predecessor."""
    server = bench.start()
    one = bench.mount(server, "m1", full)
    server.end(signal.SIGKILL)
    server = bench.start()
    two = bench.mount(server, "m2", make([item("name", b"x")]))
    assert (two / "name").read_bytes() == b"x"
    server.ask("unmount", mount="m1")
    assert not one.exists()
    assert kernel.mounted_at(one) == []
    assert len(kernel.mounted_at(bench.root / "mounter/data")) == 1


def test_the_holder_may_die(bench: Bench, full: Made) -> None:
    """While the mounter lives nothing is noticed; a new holder is given the connection, and then the mounter may die."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    assert bench.holder
    bench.holder.end(signal.SIGKILL)
    assert (path / "etc/late").read_bytes() == b"late"
    bench.holder = Holder(bench.root)
    deadline = time.monotonic() + 20
    while (held := holder.get(bench.root / "mounter" / holder.SOCKET, "device")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.close(held)
    server.end(signal.SIGKILL)
    bench.start()
    assert (path / "big").read_bytes() == noise(1_500_000, 2)


def test_without_a_holder_a_successor_mounts_anew(bench: Bench, full: Made) -> None:
    """Mounter and holder killed: the old mount fails and does not hang, the next mounter shows the layer again."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    assert bench.holder
    with (path / "big").open("rb", buffering=0) as file:
        bench.holder.end(signal.SIGKILL)
        server.end(signal.SIGKILL)
        with pytest.raises(OSError) as info:
            file.read()
        assert info.value.errno == errno.EIO
    bench.holder = Holder(bench.root)
    successor = bench.start()
    assert successor.ask("check", mounts=["m1"]) == ["m1"]
    assert (path / "big").read_bytes() == noise(1_500_000, 2)


def test_reads_go_on_after_the_table_was_forgotten(bench: Bench, full: Made) -> None:
    """What nobody used goes from memory; files that were never read before are read, and checked, all the same."""
    server = bench.start(keep=0.0)
    path = bench.mount(server, "m1", full)
    assert (path / "bin/tool").read_bytes() == noise(300_000)
    time.sleep(0.3)
    assert server.ask("forgotten") == [True]
    assert (path / "big").read_bytes() == noise(1_500_000, 2)
    assert server.ask("forgotten") in ([True], [False])
    time.sleep(0.3)
    server.ask("mount", mount="m2", lower=(), **bench.layer(full))
    assert (bench.root / "mounts/m2/etc/late").read_bytes() == b"late"


def test_from_erofs_to_fuse_and_back(bench: Bench, full: Made) -> None:
    """Killed and started in the other way, the mounter shows the layer at the same path; no old reader hangs."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    with (path / "big").open("rb", buffering=0) as file:
        server.end(signal.SIGKILL)
        bench.mode = "fuse"
        server = bench.start()
        with pytest.raises(OSError) as info:
            file.read()
        assert info.value.errno == errno.EIO
    assert (path / "big").read_bytes() == noise(1_500_000, 2)
    assert [kind for _, kind in kernel.mounted_at(path.parent)] == ["fuse.soci"]
    server.end(signal.SIGKILL)
    bench.mode = "erofs"
    bench.start()
    assert [kind for _, kind in kernel.mounted_at(path)] == ["erofs"]
    assert (path / "big").read_bytes() == noise(1_500_000, 2)


def test_a_layer_that_erofs_cannot_show_is_shown_by_fuse(bench: Bench) -> None:
    """An attribute of 64 KiB has no place in an EROFS inode: the same path shows the layer all the same, twice."""
    loud = make([item("loud", b"x", pax_headers={"SCHILY.xattr.user.a": "v" * 65_536}), item("file", b"content")])
    server = bench.start()
    path = bench.mount(server, "m1", loud)
    for _ in range(2):
        assert path.is_symlink()
        assert (path / "file").read_bytes() == b"content"
        assert len(os.getxattr(path / "loud", "user.a")) == 65_536
        server.end(signal.SIGKILL)
        server = bench.start()
    server.ask("unmount", mount="m1")
    assert not os.path.lexists(path)


def test_a_mounter_whose_device_is_taken_away_ends(bench: Bench, full: Made) -> None:
    """When somebody unmounts the device's file system the process exits with an error, for its supervisor to see."""
    server = bench.start()
    bench.mount(server, "m1", full)
    assert bench.holder
    bench.holder.end(signal.SIGKILL)
    kernel.clear(bench.root / "mounts" / "m1")
    kernel.clear(bench.root / "mounter" / "data")
    assert server.process.wait(20) == 1
