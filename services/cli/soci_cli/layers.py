# SPDX-License-Identifier: Apache-2.0
"""``soci layers``: the layers that this node's mounter shows, by which way, and how much of each is here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import click

from soci.errors import InvalidMessage
from soci_bus.asks import ShownLayer, ShownLayers
from soci_bus.nats import connect
from soci_cli.border import run_command
from soci_cli.tables import indented, table
from soci_cli.values import Globals, human_bytes

CONNECT_SECONDS: Final = 5.0
"""How long the bus may take to answer at first."""
PAGE_SECONDS: Final = 10.0
"""How long the mounter may take for a page."""
MOST_PAGES: Final = 1000
"""Pages of one answer."""
HEADERS: Final = ("MOUNT", "LAYER", "WAY", "STATE", "SPANS", "SIZE", "IMAGE")
SHORT: Final = len("sha256:") + 12
"""Characters of a digest in a table; ``--json`` has all of it."""


@click.group("layers")
def command() -> None:
    """See the layers that are mounted."""


async def _shown(flags: Globals) -> list[ShownLayer]:
    found: list[ShownLayer] = []
    after = ""
    async with connect(flags.nats_url, node=flags.node, name="soci", wait=CONNECT_SECONDS) as bus:
        for _ in range(MOST_PAGES):
            page = await bus.ask(ShownLayers(after), timeout=PAGE_SECONDS)
            found += page.layers
            if not page.next:
                return found
            if page.next <= after:
                break
            after = page.next
    raise InvalidMessage(f"the mounter's list does not end: it goes on behind {after[:200]!r}")


@command.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Print the mounts' names only.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON, with the reason for each layer's way.")
@click.pass_obj
def ls_command(flags: Globals, *, quiet: bool, json_output: bool) -> None:
    """List what the mounter shows: how, how much of each layer is here, and what it takes of the disk.

    \b
    WAY    fuse    by FUSE: names, attributes and bytes are our answers
           erofs   the kernel has the names and attributes, bytes are our answers
           native  the kernel reads the layer's file itself
    STATE  as in `soci cache ls`; native: nothing of ours is needed any more
    """  # noqa: D301  click's sign against wrapping
    found = run_command(lambda: _shown(flags), flags)
    if quiet:
        for one in found:
            print(one.mount)
    elif json_output:
        print(indented([as_json(one) for one in found]))
    else:
        print(table(HEADERS, [cells(one) for one in found]))


command.add_command(ls_command, "list")


def as_json(one: ShownLayer) -> dict[str, Any]:
    """A mount as plain data."""
    return asdict(one)


def cells(one: ShownLayer) -> tuple[str, ...]:
    """A mount as a line of the table."""
    spans = f"{one.here}/{one.spans}"
    return one.mount, one.layer[:SHORT], one.way, one.state, spans, human_bytes(one.size), one.image
