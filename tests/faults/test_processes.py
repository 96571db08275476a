# SPDX-License-Identifier: Apache-2.0
"""Services, the bus and the registry killed under use: right bytes late, or an error; never a wrong byte."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_mounter import kernel
from soci_mounter.native import OLDEST_KERNEL
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


DIAL_SECONDS = 15.0
EROFS = kernel.has_file_system("erofs") and tuple(map(int, os.uname().release.split(".")[:2])) >= OLDEST_KERNEL
SEED = secrets.randbits(32)
FILES = 14
Pulled = tuple[str, str, dict[str, str]]


@pytest.fixture(scope="module")
def faulty(make_stack: Callable[..., Stack]) -> Stack:
    """A stack of one's own, whose parts are killed."""
    return make_stack(fetchers=2)


@pytest.fixture(scope="module")
def proxy(faulty: Stack) -> Iterator[Proxy]:
    with Proxy(faulty.registry) as running:
        yield running


@pytest.fixture(scope="module")
def pulled(faulty: Stack, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Pulled:
    """A lazily pulled image: its reference, its topmost chain id, and the checksum of each file in ``/data``.

    It is made once, for it takes long: each test reads files that no other one does.
    """
    built = lazy.seeded_image(tmp_path_factory.mktemp("image"), seed=SEED, files=FILES)
    reference = lazy.push(built, proxy, "processes")
    lazy.build_index(faulty, reference)
    lazy.good(lazy.soci(faulty, "pull", "--plain-http", reference))
    checksums = {str(number): hashlib.sha256(lazy.data_file(SEED, number)).hexdigest() for number in range(FILES)}
    return reference, lazy.top_chain(built), checksums


@pytest.fixture(autouse=True)
def dialled(faulty: Stack) -> None:
    """The test before may have killed the snapshotter."""
    wait_until_dialled(faulty)


def test_cached_bytes_need_no_bus_and_missing_ones_wait_for_it(faulty: Stack, pulled: Pulled) -> None:
    """While NATS is away, what is here is read; what is not waits, and reads right once NATS is back."""
    _, chain, checksums = pulled
    with lazy.rootfs(faulty, "sociable", chain) as root:
        assert hashlib.sha256((root / "data" / "0").read_bytes()).hexdigest() == checksums["0"]
        drop_pages(root / "data" / "0")
        faulty.kill("nats")
        try:
            assert hashlib.sha256((root / "data" / "0").read_bytes()).hexdigest() == checksums["0"]
            with ThreadPoolExecutor(1) as reader:
                late = reader.submit((root / "data" / "7").read_bytes)
                faulty.start("nats")
                assert hashlib.sha256(late.result()).hexdigest() == checksums["7"]
        finally:
            if faulty.daemons["nats"].returncode is not None:
                faulty.start("nats")


def wait_until_dialled(stack: Stack) -> None:
    """containerd backs off from a snapshotter that was away, for three seconds at most; then it dials again."""
    deadline = time.monotonic() + DIAL_SECONDS
    while stack.ctr("snapshots", "--snapshotter", "sociable", "ls", check=False).returncode != 0:
        assert time.monotonic() < deadline, "containerd does not dial the snapshotter again"
        time.sleep(0.1)


def drop_pages(path: Path) -> None:
    """Have the kernel forget what it cached of a file, so that the next read asks the mounter."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("service", ["mounter", "snapshotter"])
def test_after_a_kill_new_containers_run_and_nothing_is_fetched_again(
    faulty: Stack, proxy: Proxy, pulled: Pulled, service: str
) -> None:
    """A killed mounter or snapshotter comes back by itself: the same image runs from the cache, without a manual
    unmount and without the registry."""
    reference, _, _ = pulled
    words = ("run", "--plain-http", "--pull", "never", reference)
    assert lazy.good(lazy.soci(faulty, *words)).startswith("hello\n")
    faulty.kill(service)
    faulty.start(service)
    wait_until_dialled(faulty)
    proxy.reset()
    assert lazy.good(lazy.soci(faulty, *words)).startswith("hello\n")
    assert proxy.counts.get == 0


@pytest.mark.skipif(not EROFS, reason="needs a kernel that mounts EROFS from files")
def test_a_running_container_does_not_notice_a_killed_mounter(faulty: Stack, pulled: Pulled) -> None:
    """A container that was started before goes on reading, cold and cached, while the mounter is killed again and
    again: each read waits for the successor, and none fails."""
    reference, _, checksums = pulled
    script = "for i in 8 9 10 11 12 13; do /bin/busybox sha256sum /data/$i; /bin/busybox ls /data > /dev/null; done"
    command = faulty.soci_command("run", "--plain-http", "--pull", "never", reference, "/bin/sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline()]
        for _ in range(5):
            faulty.kill("mounter")
            faulty.start("mounter")
            lines.append(running.stdout.readline())
        assert running.wait(timeout=60) == 0
    assert [line.split()[0] for line in lines] == [checksums[str(number)] for number in range(8, 14)]


def test_a_running_container_outlives_the_snapshotter(faulty: Stack, pulled: Pulled) -> None:
    """What runs goes on reading lazily while the snapshotter is away: it is not on the read path."""
    reference, _, checksums = pulled
    script = "read go < /dev/null; for i in 1 2 3 4 5; do /bin/busybox sha256sum /data/$i; /bin/busybox sleep 0.2; done"
    command = faulty.soci_command("run", "--plain-http", "--pull", "never", reference, "/bin/sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        faulty.kill("snapshotter")
        rest = [running.stdout.readline() for _ in range(4)]
        faulty.start("snapshotter")
        assert running.wait(timeout=60) == 0
    assert [line.split()[0] for line in (first, *rest)] == [checksums[str(number)] for number in range(1, 6)]


def test_everything_restarts_with_the_registry_away(faulty: Stack, pulled: Pulled) -> None:
    """After all services were killed at once and the registry is gone, an image that was read runs from the cache."""
    reference, _, _ = pulled
    words = ("run", "--plain-http", "--pull", "never", reference)
    expected = lazy.good(lazy.soci(faulty, *words))
    names = ("mounter", "fetcher-1", "fetcher-2", "snapshotter")
    faulty.stop("registry")
    try:
        for name in names:
            faulty.kill(name)
        for name in names:
            faulty.start(name)
        wait_until_dialled(faulty)
        assert lazy.good(lazy.soci(faulty, *words)) == expected
    finally:
        faulty.start("registry")
