# SPDX-License-Identifier: Apache-2.0
"""A disk that is full below the span cache: reads of what fits, EIO for the rest, and no wrong byte then or later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import pulls
from support.pulls import Node, fails, read, read_tree

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

DEADLINE_S = 2.0
MOUNT_SECONDS = 20.0
PLENTY_BYTES = 64 << 20
PAGE_BYTES = 4096


class Disk:
    """A file system of a size of its own, on the folder of the cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mount("mount", "-t", "tmpfs", "-o", f"size={PLENTY_BYTES},mode=0700", "tmpfs", str(folder))

    def resize(self, size: int) -> None:
        """Make it smaller or larger under its users."""
        self._mount("mount", "-o", f"remount,size={size}", str(self.folder))

    def leave(self, room: int) -> None:
        """Have so many bytes free."""
        found = os.statvfs(self.folder)
        self.resize((found.f_blocks - found.f_bfree) * found.f_frsize + room)

    def unmount(self) -> None:
        """Take it away."""
        self._mount("umount", "-l", str(self.folder))

    @staticmethod
    def _mount(*words: str) -> None:
        subprocess.run(words, check=True, timeout=MOUNT_SECONDS)


@pytest.fixture(scope="module")
def full(make_stack: Callable[..., Stack]) -> Iterator[Node]:
    """A node whose cache is on a disk of its own: see `disk`."""
    node = pulls.node(make_stack, DEADLINE_S)
    yield node
    node.alive()


@pytest.fixture
def disk(full: Node) -> Iterator[Disk]:
    """The disk, with plenty of room at first. Nothing of the cache is open when it comes and goes."""
    full.tars.clear()
    made = Disk(full.stack.root / "cache")
    try:
        yield made
    finally:
        made.unmount()


def test_what_does_not_fit_is_an_error_until_there_is_room(full: Node, disk: Disk, tmp_path: Path) -> None:
    """Without room for a span reads end with EIO, with a little room each one is right or EIO, nothing wrong is
    believed; once there is room all is read right, with nothing started again."""
    with Proxy(full.stack.registry) as proxy:
        pushed = pulls.push(proxy.upstream, tmp_path)
        with full.rootfs(full.pull(proxy.address, pushed)) as data:
            disk.leave(PAGE_BYTES)
            assert fails(data, 0)
            assert full.here()[pushed.layer] == []
            disk.leave(2 * pulls.FILE_BYTES)
            assert read(data, 0) == pushed.files[0]
            for number in range(pulls.FILES):
                assert fails(data, number) or read(data, number) == pushed.files[number]
            full.here()
            disk.resize(PLENTY_BYTES)
            assert read_tree(data) == pushed.files
            full.here()
            full.alive()


def test_a_layer_for_which_there_is_no_room_at_all_comes_another_way(full: Node, disk: Disk, tmp_path: Path) -> None:
    """Where not even the table of contents fits, the layer comes whole; the next one is lazy once there is room."""
    with Proxy(full.stack.registry) as proxy:
        for room in (PAGE_BYTES, PLENTY_BYTES):
            pushed = pulls.push(proxy.upstream, tmp_path / str(room))
            disk.resize(room)
            chain = full.pull(proxy.address, pushed, lazy=room == PLENTY_BYTES)
            with full.rootfs(chain) as data:
                assert read_tree(data) == pushed.files
            full.alive()
