# SPDX-License-Identifier: Apache-2.0
"""The example configurations of deploy/nats, run as they are but for hosts and ports: leaves joined by a cluster."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import nats
import nats.js.errors
import pytest
from nats.js.api import RetentionPolicy

from soci.errors import BusUnavailable
from soci_bus.asks import FindIndex, IndexFound
from soci_bus.events import NO_LAUNCH, FetchFailed
from soci_bus.face import Context
from soci_bus.nats import NatsBus, connect
from soci_bus.nats_link import EVENTS_STREAM, JOBS_STREAM
from soci_bus.notices import PeerTold
from soci_dev.processes import Daemon, free_port
from soci_dev.tools import find
from support.bus import D1, D2, LIMIT

EXAMPLES = Path(__file__).parents[2] / "deploy" / "nats"
MEMBERS = 3
START_LIMIT_S = 20.0


def greets(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as link:
            return b"INFO" in link.recv(4096)
    except OSError:
        return False


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Daemon, str]]]:
    """Two nodes' servers, behind a cluster of three: daemons and addresses."""
    folder = tmp_path_factory.mktemp("nats")
    ports = [[free_port() for _ in range(3)] for _ in range(MEMBERS)]  # clients, routes, leaves
    found: dict[str, tuple[Daemon, str]] = {}
    with ExitStack() as stack:

        def start(name: str, example: str, changes: dict[str, str], **environment: str) -> None:
            text = (EXAMPLES / example).read_text()
            for old, new in changes.items():
                assert old in text
                text = text.replace(old, new)
            file = folder / f"{name}.conf"
            file.write_text(text)
            words: list[str | Path] = [find("nats-server"), "-c", file]
            daemon = Daemon(name, words, folder / f"{name}.log", os.environ | environment, folder)
            stack.callback(daemon.kill)
            port = int(re.findall(r"(?:^port|listen): (?:127.0.0.1:)?(\d+)", text, re.MULTILINE)[0])
            daemon.wait(lambda: greets(port), "answering", START_LIMIT_S)
            found[name] = daemon, f"nats://127.0.0.1:{port}"

        for number, (clients, routes, leaf) in enumerate(ports, 1):
            changes = {"port: 4222": f"port: {clients}", "port: 6222": f"port: {routes}", "port: 7422": f"port: {leaf}"}
            changes |= {f"nats-{one}:6222": f"127.0.0.1:{ports[one - 1][1]}" for one in range(1, MEMBERS + 1)}
            changes["/var/lib/nats"] = str(folder / f"store-{number}")
            start(f"nats-{number}", "cluster.conf", changes, NATS_NAME=f"nats-{number}", NATS_PASSWORD="pass")
        urls = ", ".join(f'"nats://node:pass@127.0.0.1:{leaf}"' for _, _, leaf in ports)
        for number in (1, 2):
            changes = {"127.0.0.1:4222": f"127.0.0.1:{free_port()}"}
            start(f"leaf-{number}", "leaf.conf", changes, NODE_NAME=f"leaf-{number}", NATS_LEAF_URLS=f"[{urls}]")
        yield found


async def test_what_crosses_and_what_stays(servers: dict[str, tuple[Daemon, str]]) -> None:
    """Notices of peers and events reach all nodes; what a node asks its own services stays on it."""
    leaves = [servers[name][1] for name in ("leaf-1", "leaf-2")]
    found = IndexFound(D2, "explicit", ())

    async def find_index(_ask: FindIndex, _context: Context) -> IndexFound:
        return found

    async with (
        connect(leaves[0], node="n1", name="one", wait=LIMIT) as one,
        connect(leaves[1], node="n2", name="two", wait=LIMIT) as two,
        connect(leaves[1], node="n1", name="pretends to be on the first") as stranger,
    ):
        heard: list[PeerTold] = []
        await two.hear(PeerTold, heard.append)
        notice = PeerTold("n1", "http://h:1", "ab", 1, 1, 3.0, 1e9, leaving=False, mac="")
        async with asyncio.timeout(LIMIT):
            while notice not in heard:  # nothing is kept of a notice: the servers may not yet know who listens
                await one.tell(notice)
                await asyncio.sleep(0.1)
        await one.serve(FindIndex, find_index)
        assert await one.ask(FindIndex("r/a:1", D1), timeout=LIMIT) == found
        with pytest.raises(BusUnavailable, match="no process answers"):
            await stranger.ask(FindIndex("r/a:1", D1), timeout=LIMIT)
        one.publish(FetchFailed(NO_LAUNCH, D1, "spans 0..1", "why"))
        await one.flush_events(LIMIT)
        assert [envelope.node async for envelope in two.history("fetch")] == ["n1"]


async def reasons(bus: NatsBus) -> list[str]:
    """Why fetches failed, by the stored events, as soon as the cluster gives them."""
    async with asyncio.timeout(LIMIT):
        while True:
            with suppress(BusUnavailable):  # it is still choosing who leads
                told = [envelope.event async for envelope in bus.history("fetch")]
                return [event.why for event in told if isinstance(event, FetchFailed)]


async def test_streams_that_were_made_with_replicas(servers: dict[str, tuple[Daemon, str]]) -> None:
    """They stay as an administrator made them, and events go on where a server of the cluster is killed."""
    client = await nats.connect(servers["nats-1"][1])
    try:
        jetstream = client.jetstream(domain="sociable")
        for name in (EVENTS_STREAM, JOBS_STREAM):
            with suppress(nats.js.errors.NotFoundError):
                await jetstream.delete_stream(name)
        await jetstream.add_stream(name=EVENTS_STREAM, subjects=["soci.evt.>"], num_replicas=3)
        retention = RetentionPolicy.WORK_QUEUE
        await jetstream.add_stream(name=JOBS_STREAM, subjects=["soci.job.>"], num_replicas=3, retention=retention)
        async with connect(servers["leaf-1"][1], node="n1", name="one", wait=LIMIT) as bus:
            bus.publish(FetchFailed(NO_LAUNCH, D1, "spans 0..1", "first"))
            await bus.flush_events(LIMIT)
            assert (await jetstream.stream_info(EVENTS_STREAM)).config.num_replicas == 3
            servers["nats-2"][0].kill()
            bus.publish(FetchFailed(NO_LAUNCH, D1, "spans 0..1", "second"))
            await bus.flush_events(LIMIT)
            assert await reasons(bus) == ["first", "second"]
    finally:
        await client.close()
