# SPDX-License-Identifier: Apache-2.0
"""Several fetcher processes of one node on one span cache: no span twice, no ask lost."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci.errors import BusUnavailable, InvalidInput
from soci.span import Spans
from soci_bus.face import Bus
from soci_bus.nats import connect
from soci_cache import LayerStore
from soci_cache.presence import Presence
from soci_dev.faults import Delay, Seen
from soci_dev.processes import Daemon
from soci_dev.proxy import Proxy
from soci_dev.stack import SERVICE_LIMIT_S, Stack
from support.bus import until
from support.fetching import check, push_layer, spans_of
from support.images import noise
from support.mounter_layers import Made, item, make

pytestmark = pytest.mark.timeout(120)
ASK_SECONDS = 60.0


@pytest.fixture(scope="module")
def made() -> Made:
    """A gzip layer of some thirty spans."""
    return make([item("text", noise(11, 4_000_000))], span_size=1 << 17)


@pytest.fixture
def cache(tmp_path: Path, made: Made) -> Path:
    """A span cache with the layer prepared, below the fetchers' root."""
    made.put(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
async def reference(registry: str, proxy: Proxy, made: Made) -> str:
    """The layer in the registry, seen through the proxy, whose counts are at zero."""
    name = await push_layer(registry, made)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


class Fetchers:
    """Fetcher processes on one root; each may have a node name of its own, so that a test can choose whom it asks."""

    def __init__(self, root: Path, nats_url: str) -> None:
        self.root = root
        self.nats_url = nats_url
        self.running: dict[str, Daemon] = {}

    def start(self, name: str, node: str) -> Daemon:
        """Start one and wait until it serves."""
        words: list[str | Path] = ["--root", self.root, "--nats-url", self.nats_url, "--node", node]
        command: list[str | Path] = [sys.executable, "-m", "soci_fetcher", *words]
        daemon = Daemon(name, command, self.root / f"{name}.log", os.environ, self.root)
        self.running[name] = daemon
        daemon.wait(daemon.said_ready, "ready", SERVICE_LIMIT_S)
        return daemon


@pytest.fixture
def fetchers(tmp_path: Path, daemons: Stack) -> Iterator[Fetchers]:
    found = Fetchers(tmp_path, daemons.nats_url)
    try:
        yield found
    finally:
        for daemon in found.running.values():
            daemon.stop()


class Asked:
    """A hook: how often each compressed byte at which a span starts was asked for, all answers a little late."""

    def __init__(self, made: Made, seconds: float) -> None:
        self._geometry = Spans.of(made.ztoc)
        self._seconds = seconds
        self.spans: Counter[int] = Counter()
        self.first: Callable[[], None] | None = None

    def __call__(self, seen: Seen) -> Delay | None:
        if not (seen.is_blob and seen.range):
            return None
        start, end = (int(word) for word in seen.range.removeprefix("bytes=").split("-"))
        for span in range(self._geometry.count):
            place, stop = self._geometry.compressed(span)
            self.spans[span] += start <= place and stop <= end + 1
        first, self.first = self.first, None
        if first:
            first()
        return Delay(self._seconds)


async def ask(bus: Bus, reference: str, made: Made, first: int, last: int) -> None:
    await bus.ask(spans_of(reference, made, first, last), timeout=ASK_SECONDS)


async def served(bus: Bus, reference: str, made: Made) -> None:
    """Wait until the bus knows who answers."""
    while True:
        try:
            await ask(bus, reference, made, -1, -1)
        except BusUnavailable:
            await asyncio.sleep(0.05)
        except InvalidInput:
            return


async def test_two_processes_ask_for_no_span_twice(
    cache: Path, fetchers: Fetchers, proxy: Proxy, reference: str, made: Made
) -> None:
    """The same spans asked of both at the same time come from the registry once, and both answer."""
    proxy.hook = asked = Asked(made, 0.2)
    last = len(made.ztoc.span_digests) - 1
    for name in ("a", "b"):
        fetchers.start(name, name)
    async with (
        connect(fetchers.nats_url, node="a", name="t") as one,
        connect(fetchers.nats_url, node="b", name="t") as two,
    ):
        for bus in (one, two):
            await served(bus, reference, made)
        asks = [ask(bus, reference, made, n, min(n + 5, last)) for n in range(0, last + 1, 3) for bus in (one, two)]
        await asyncio.gather(*asks)
    assert check(LayerStore(cache), made) == list(range(last + 1))
    assert asked.spans == Counter(range(last + 1))


async def test_what_a_killed_process_was_at_the_other_brings(
    cache: Path, fetchers: Fetchers, proxy: Proxy, reference: str, made: Made
) -> None:
    """A fetcher killed while its spans are on their way holds nobody up: who waited for it fetches them."""
    proxy.hook = asked = Asked(made, 1.0)
    killed = fetchers.start("a", "a")
    fetchers.start("b", "b")
    async with (
        connect(fetchers.nats_url, node="a", name="t") as one,
        connect(fetchers.nats_url, node="b", name="t") as two,
    ):
        for bus in (one, two):
            await served(bus, reference, made)
        lost = asyncio.create_task(ask(one, reference, made, 2, 6))
        await until(lambda: asked.spans[2], "the first one's request")
        waiting = asyncio.create_task(ask(two, reference, made, 2, 6))
        await asyncio.sleep(0.1)
        assert asked.spans == Counter(range(2, 7))
        killed.kill()
        await waiting
        lost.cancel()
        await asyncio.wait([lost])
    assert check(LayerStore(cache), made) == [2, 3, 4, 5, 6]
    assert {asked.spans[span] for span in range(2, 7)} == {2}


async def test_fetchers_come_and_go_without_a_failed_ask(
    cache: Path, fetchers: Fetchers, proxy: Proxy, reference: str, made: Made
) -> None:
    """Three of a queue group, stopped and started one after the other under load: every ask is answered."""
    proxy.hook = asked = Asked(made, 0.1)
    names = ("a", "b", "c")
    for name in names:
        fetchers.start(name, "node")
    done = asyncio.Event()
    last = len(made.ztoc.span_digests) - 1
    answered = 0

    async def reader(bus: Bus, number: int) -> None:
        nonlocal answered
        while not done.is_set():
            span = (answered * 7 + number) % (last + 1)
            await ask(bus, reference, made, span, span)
            answered += 1
            _empty(cache, made, span)

    async with connect(fetchers.nats_url, node="node", name="t") as bus, asyncio.TaskGroup() as group:
        await served(bus, reference, made)
        for number in range(6):
            group.create_task(reader(bus, number))
        for name in names:
            wanted = answered + 6
            await until(lambda: answered > wanted, "asks answered")  # noqa: B023  awaited here
            assert await asyncio.to_thread(fetchers.running[name].stop) == 0
            await asyncio.to_thread(fetchers.start, name, "node")
        done.set()
    assert sum(asked.spans.values()) > last
    assert check(LayerStore(cache), made) is not None


def _empty(cache: Path, made: Made, span: int) -> None:
    """Take a span's mark away, so that the next ask fetches it again."""
    presence = Presence(LayerStore(cache).directory(made.layer, made.ztoc_digest) / "spans", writable=True)
    presence.clear(span)
    presence.close()
