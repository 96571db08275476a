# SPDX-License-Identifier: Apache-2.0
"""All pages of `LayersInUse` as one answer, or none: a part of it must never be taken for the whole."""

from __future__ import annotations

from soci.errors import InvalidMessage, Unavailable
from soci_bus.asks import LayersInUse, UsedLayer
from soci_bus.face import Bus

PAGE_SECONDS = 10.0
"""How long the snapshotter may take for a page."""
MOST_PAGES = 1000
"""Pages of one answer."""
TRIES = 5
"""Times that the answer is asked for from the start because other layers came into use meanwhile."""


async def layers_in_use(bus: Bus) -> tuple[UsedLayer, ...]:
    """The lazy layers that this node's snapshots use, each once, as of one moment.

    Raises what the bus raises, `InvalidMessage` where the pages do not end, and `Unavailable` where they never agree.
    """
    for _ in range(TRIES):
        found = await _one_answer(bus)
        if found is not None:
            return found
    raise Unavailable(f"other layers came into use each of {TRIES} times that they were asked for")


async def _one_answer(bus: Bus) -> tuple[UsedLayer, ...] | None:
    found: list[UsedLayer] = []
    after = generation = ""
    for _ in range(MOST_PAGES):
        page = await bus.ask(LayersInUse(after), timeout=PAGE_SECONDS)
        if generation and page.generation != generation:
            return None
        found += page.layers
        if not page.next:
            return tuple(found)
        if page.next <= after:
            raise InvalidMessage(f"the page of layers in use behind {after[:200]!r} goes on behind {page.next[:200]!r}")
        after, generation = page.next, page.generation
    raise InvalidMessage(f"more than {MOST_PAGES} pages of layers in use")
