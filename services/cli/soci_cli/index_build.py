# SPDX-License-Identifier: Apache-2.0
"""``soci index build``: ask the indexer for a SOCI index of an image in its registry."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import click

from soci.errors import DeadlineExceeded, from_code
from soci.oci import parse_platform
from soci.reference import parse_reference
from soci_bus.asks import BuildIndex
from soci_bus.events import Event, IndexFailed, IndexMade, LayerIndexed
from soci_bus.face import Bus
from soci_bus.nats import connect
from soci_bus.wire import Envelope
from soci_cli.border import run_command
from soci_cli.values import DEFAULT_PLATFORM, Globals, human_bytes

CONNECT_SECONDS: Final = 5.0
"""How long the bus may take to answer at first."""

TAKEN_SECONDS: Final = 30.0
"""How long an indexer may be busy with other jobs before it takes ours."""
SILENCE_SECONDS: Final = 1800.0
"""The longest that one layer may take before we stop waiting; the job itself goes on."""

Tell = Callable[[LayerIndexed], None]


async def build(bus: Bus, job: BuildIndex, tell: Tell) -> tuple[IndexMade, list[LayerIndexed]]:
    """Put the job on the queue and follow its events to the end. Raises what the indexer failed of."""
    job_id = secrets.token_hex(8)
    layers: list[LayerIndexed] = []
    async with bus.watching(job_id) as events:  # before the job is there, so that no event of it is missed
        await bus.submit(job, job_id)
        event = await _next(events, TAKEN_SECONDS, "no indexer took the job: is soci-indexer running?")
        while True:
            if isinstance(event, LayerIndexed):
                layers.append(event)
                tell(event)
            elif isinstance(event, IndexMade):
                return event, layers
            elif isinstance(event, IndexFailed):
                raise from_code(event.code, event.why)
            event = await _next(events, SILENCE_SECONDS, "the indexer said nothing more")


async def _next(events: AsyncIterator[Envelope], limit: float, otherwise: str) -> Event:
    try:
        async with asyncio.timeout(limit):
            return (await anext(events)).event
    except TimeoutError as error:
        raise DeadlineExceeded(f"{otherwise} (waited {limit:.0f} s)") from error


def layer_line(event: LayerIndexed) -> str:
    """One line of progress."""
    what = event.skipped or f"zTOC of {human_bytes(event.ztoc_size)} ({event.seconds:.2f} s)"
    return f"layer {event.layer[:19]}  {human_bytes(event.layer_size):>10}  {what}"


def as_json(made: IndexMade, layers: list[LayerIndexed]) -> dict[str, Any]:
    """The answer of ``--json``."""
    return {
        "image": made.image,
        "index": made.index,
        "manifest": made.manifest,
        "discovery": made.discovery,
        "layers": [
            {
                "layer": layer.layer,
                "size": layer.layer_size,
                "ztoc": layer.ztoc,
                "ztoc_size": layer.ztoc_size,
                "skipped": layer.skipped,
            }
            for layer in layers
        ],
    }


@click.command("build")
@click.argument("image")
@click.option("--platform", default=DEFAULT_PLATFORM, show_default=True, help="os/architecture[/variant].")
@click.option(
    "--span-size", type=click.IntRange(1), default=1 << 22, show_default=True, help="Bytes of a span, uncompressed."
)
@click.option(
    "--min-layer-size", type=click.IntRange(0), default=10 << 20, show_default=True, help="Smaller layers get no zTOC."
)
@click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(  # noqa: PLR0913  one parameter a flag
    flags: Globals, image: str, platform: str, span_size: int, min_layer_size: int, *, json_output: bool
) -> None:
    """Build the SOCI index of IMAGE and push it beside the image."""
    job = BuildIndex(str(parse_reference(image)), str(parse_platform(platform)), span_size, min_layer_size)

    def tell(event: LayerIndexed) -> None:
        if not json_output:
            print(layer_line(event), file=sys.stderr, flush=True)

    async def work() -> tuple[IndexMade, list[LayerIndexed]]:
        async with connect(flags.nats_url, node=flags.node, name="soci", wait=CONNECT_SECONDS) as bus:
            return await build(bus, job, tell)

    made, layers = run_command(work, flags)
    if json_output:
        print(json.dumps(as_json(made, layers), indent=2))
    else:
        print(f"{made.image}: index {made.index} for manifest {made.manifest}, found by {made.discovery}")
