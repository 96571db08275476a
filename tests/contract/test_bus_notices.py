# SPDX-License-Identifier: Apache-2.0
"""Notices, asked of both buses: the one in memory and the one over a real NATS."""

from __future__ import annotations

import secrets

import nats
import pytest

from soci_bus import wire
from soci_bus.memory import MemoryBus
from soci_bus.nats import connect
from soci_bus.notices import PeerTold
from support.bus import LIMIT, until


def told(node: str, number: int = 1) -> PeerTold:
    """A notice of ``node``."""
    return PeerTold(node, "http://10.0.0.1:4421", "ab" * 16, 1, number, 3.0, 1e9, leaving=False, mac="cd" * 32)


async def test_a_notice_in_memory() -> None:
    """Who listens hears it as it was told."""
    bus = MemoryBus()
    heard: list[PeerTold] = []
    await bus.hear(PeerTold, heard.append)
    await bus.tell(told("n1"))
    assert heard == [told("n1")]


async def test_a_notice_reaches_every_node(nats_url: str) -> None:
    """All nodes hear it, the teller too; who comes later does not."""
    names = [f"n{secrets.token_hex(4)}" for _ in range(3)]
    async with (
        connect(nats_url, node=names[0], name="a", wait=LIMIT) as one,
        connect(nats_url, node=names[1], name="b", wait=LIMIT) as two,
    ):
        ours: list[PeerTold] = []
        theirs: list[PeerTold] = []
        await one.hear(PeerTold, ours.append)
        await two.hear(PeerTold, theirs.append)
        await one.tell(told(names[0]))
        await until(lambda: ours == theirs == [told(names[0])], "both heard it")


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"x" * 5000, wire.encode(told("another"))])
async def test_a_hostile_notice_is_passed_over(nats_url: str, body: bytes) -> None:
    """What does not parse, or speaks for another node than its subject does, is not passed on; the next one is."""
    node = f"n{secrets.token_hex(4)}"
    foreign = await nats.connect(nats_url)
    try:
        async with connect(nats_url, node=node, name="a", wait=LIMIT) as bus:
            heard: list[PeerTold] = []
            await bus.hear(PeerTold, heard.append)
            await foreign.publish(wire.notice_subject(node, PeerTold.word), body)
            await foreign.flush()
            await bus.tell(told(node, 2))
            await until(lambda: told(node, 2) in heard, "the good one came")
            assert [one for one in heard if one.node in {node, "another"}] == [told(node, 2)]
    finally:
        await foreign.close()


async def test_telling_while_nats_is_away() -> None:
    """It is lost, at once and without an error."""
    async with connect("nats://127.0.0.1:1", node="n1", name="a") as bus:
        await bus.tell(told("n1"))
