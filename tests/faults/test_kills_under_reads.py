# SPDX-License-Identifier: Apache-2.0
"""The bus and fetchers killed in the midst of reads: right bytes, late, and a cache in which nothing is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from soci_dev.faults import Fault, Seen, Stall
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import pulls
from support.pulls import Node, Pushed, read, read_tree

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

DEADLINE_S = 50.0
STALL_S = 20.0
SEEN_S = 20.0
KEEP_BYTES = 50_000
"""Of an answer: more than none, and less than a span."""


@pytest.fixture(scope="module")
def one_fetcher(make_stack: Callable[..., Stack]) -> Node:
    """A node with one fetcher."""
    return pulls.node(make_stack, DEADLINE_S)


@pytest.fixture(scope="module")
def two_fetchers(make_stack: Callable[..., Stack]) -> Node:
    """A node with two."""
    return pulls.node(make_stack, DEADLINE_S, fetchers=2)


class Held:
    """A hook that holds up answers for a layer in the midst of their bodies until it is told to let all pass."""

    def __init__(self, layer: str) -> None:
        self.seen = threading.Event()
        self._layer = layer
        self._open = False

    def __call__(self, seen: Seen) -> Fault | None:
        if self._open or not seen.is_blob or self._layer not in seen.path:
            return None
        self.seen.set()
        return Stall(STALL_S, keep=KEEP_BYTES)

    def open(self) -> None:
        """Let all further requests pass."""
        self._open = True


@contextmanager
def held(node: Node, folder: Path) -> Iterator[tuple[Held, Pushed, Path]]:
    """A lazy image and its ``data`` folder; requests for its spans stop in mid-body."""
    with Proxy(node.stack.registry) as proxy:
        pushed = pulls.push(proxy.upstream, folder)
        hook = proxy.hook = Held(pushed.layer)
        with node.rootfs(node.pull(proxy.address, pushed)) as data:
            yield hook, pushed, data
            assert read_tree(data) == pushed.files
            node.here()
    node.alive()


def test_the_only_fetcher_killed_and_started_again(one_fetcher: Node, tmp_path: Path) -> None:
    """A reader whose fetcher is killed gets its bytes from the fetcher that comes after."""
    stack = one_fetcher.stack
    with held(one_fetcher, tmp_path) as (hook, pushed, data), ThreadPoolExecutor(1) as readers:
        late = readers.submit(read, data, 2)
        assert hook.seen.wait(SEEN_S)
        stack.kill("fetcher-1")
        one_fetcher.here()
        hook.open()
        stack.start("fetcher-1")
        assert late.result() == pushed.files[2]


def test_one_of_two_fetchers_killed_and_not_started_again(two_fetchers: Node, tmp_path: Path) -> None:
    """The other one does its work."""
    stack = two_fetchers.stack
    with held(two_fetchers, tmp_path) as (hook, pushed, data), ThreadPoolExecutor(pulls.FILES) as readers:
        late = [readers.submit(read, data, number) for number in range(pulls.FILES)]
        assert hook.seen.wait(SEEN_S)
        stack.kill("fetcher-1")
        try:
            hook.open()
            assert tuple(one.result() for one in late) == pushed.files
        finally:
            stack.start("fetcher-1")


def test_the_bus_killed_and_started_again_under_reads(two_fetchers: Node, tmp_path: Path) -> None:
    """Asks whose answer was lost are asked again; nobody has to be started again but the bus."""
    stack = two_fetchers.stack
    with held(two_fetchers, tmp_path) as (hook, pushed, data), ThreadPoolExecutor(pulls.FILES) as readers:
        late = [readers.submit(read, data, number) for number in range(pulls.FILES)]
        assert hook.seen.wait(SEEN_S)
        stack.kill("nats")
        hook.open()
        stack.start("nats")
        assert tuple(one.result() for one in late) == pushed.files
