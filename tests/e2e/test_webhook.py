# SPDX-License-Identifier: Apache-2.0
"""An image is pushed, the registry tells the indexer, and the next launch is lazy: nobody asked for an index."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from soci_bus.events import Event, IndexBegun, IndexMade, LayerIndexed
from soci_bus.nats import connect
from soci_dev import image
from soci_dev.processes import free_port
from soci_dev.stack import Stack
from soci_dev.tarball import member
from support import lazy
from support.images import _busybox, noise

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

WAIT_SECONDS = 60
LARGE = 24 << 20
"""Bytes, of which gzip leaves more than the least that a layer must have for a zTOC."""


@pytest.fixture(scope="module")
def told_stack(make_stack: Any, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A stack whose registry tells the indexer of every push."""
    port = free_port()
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text(f'[sociable]\nwebhook_address = "127.0.0.1:{port}"\nwebhook_token = "secret"\n')
    endpoint = {
        "name": "indexer",
        "url": f"http://127.0.0.1:{port}/notifications",
        "headers": {"Authorization": ["Bearer secret"]},
        "timeout": "2s",
        "threshold": 3,
        "backoff": "200ms",
        "ignoredmediatypes": [],
    }
    stack: Stack = make_stack(
        flags={"indexer": ["--config", str(config)]}, registry_settings={"notifications": {"endpoints": [endpoint]}}
    )
    return stack


async def test_a_push_alone_makes_an_image_lazy(told_stack: Stack, tmp_path: Path) -> None:
    """Push and run, with no command of ours between the two. What the indexer pushed itself is told of too, and makes
    no more work."""
    layers = [
        image.add_layer(tmp_path, _busybox()),
        image.add_layer(tmp_path, [member("data", content=noise(5, LARGE))]),
    ]
    built = image.write_image(tmp_path, layers, cmd=["/bin/sh", "/hello"])
    seen: list[Event] = []
    async with (
        connect(told_stack.nats_url, node=told_stack.node, name="test", wait=WAIT_SECONDS) as bus,
        bus.watching("*") as events,
        asyncio.timeout(WAIT_SECONDS),
    ):
        reference = await asyncio.to_thread(image.push, built, told_stack.registry, "by-itself", "1")
        async for envelope in events:
            seen.append(envelope.event)
            if isinstance(envelope.event, IndexMade):
                break
    made = seen[-1]
    assert isinstance(made, IndexMade)
    assert (made.manifest, made.image) == (built.digest, f"{reference}@{built.digest}")
    assert [type(event) for event in seen] == [IndexBegun, LayerIndexed, LayerIndexed, IndexMade]

    assert lazy.good(lazy.soci(told_stack, "run", "--plain-http", reference)).startswith("hello\n")
    (launched,) = lazy.launches(told_stack, reference)
    assert lazy.modes(launched) == ["whole", "lazy"], "the small layer is under the indexer's minimum"
    async with asyncio.timeout(WAIT_SECONDS):
        while not any("its config is" in why for why in passed_over(told_stack)):
            await asyncio.sleep(0.1)


def passed_over(stack: Stack) -> list[str]:
    """Why the indexer made nothing of a push, from its log."""
    lines = (stack.logs / "indexer.log").read_text().splitlines()
    return [str(json.loads(line)["why"]) for line in lines if "needs no index" in line]
