# SPDX-License-Identifier: Apache-2.0
"""Where a layer's compressed bytes come from, behind one method: the registry here; other sources may stand before it.

What a source gives is unchecked. `soci_fetcher.spans` compares it with the spans' digests, and says which source was
wrong by the bytes that it gave.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from soci.digest import Digest
from soci.errors import SociError
from soci_fetcher.links import Links
from soci_registry import Registry, Repository

GIVEN_MAX = 256
"""Reads that are remembered, so that wrong bytes can be laid at somebody's door."""

MISS = "miss"
READ_AHEAD = "read-ahead"
LOAD_ORDER = "load-order"
FILL = "fill"
"""Why spans are asked for: a reader waits; its file goes on there; a load order names them; nothing else is to do."""


class Source(Protocol):
    """What gives bytes of layers."""

    async def read(self, image: str, layer: Digest, ztoc: Digest, start: int, end: int, why: str) -> bytes:  # noqa: PLR0913, PLR0917  what, whose, where, why
        """Bytes [start, end) of the layer's compressed blob: exactly as many, unchecked. `SociError` where not."""
        ...

    def distrust(self, layer: Digest, start: int, end: int) -> None:
        """What came of [start, end) was not the promised content: whoever gave it is left aside, if there is another.

        Said before the bytes are asked for again.
        """
        ...


class RegistrySource:
    """The registry of each image, or a mirror of it. What comes over the link is told to ``links``."""

    def __init__(self, registry: Registry, links: Links) -> None:
        self._registry = registry
        self._links = links
        self._given: deque[tuple[Digest, int, int, Repository]] = deque(maxlen=GIVEN_MAX)

    async def read(self, image: str, layer: Digest, ztoc: Digest, start: int, end: int, why: str) -> bytes:  # noqa: ARG002, PLR0913, PLR0917  see Source
        """See `Source`."""
        # A new `Repository` each time: one that is asked twice for the same bytes takes it that the first were wrong.
        repository = self._registry.repository(image)
        with self._links.request(repository.place.registry) as request:
            content = await repository.blob_range(layer, start, end, urgent=why == MISS)
            request.size = len(content)
        self._given.append((layer, start, end, repository))
        return content

    def distrust(self, layer: Digest, start: int, end: int) -> None:
        """See `Source`."""
        for given in list(self._given):
            of, first, last, repository = given
            if of == layer and first < end and start < last:
                self._given.remove(given)
                repository.distrust(layer)

    def seen(self, image: str) -> tuple[float, float]:
        """Bytes a second and seconds of a round trip to the image's registry; two zeros where it is not known yet."""
        try:
            return self._links.seen(self._registry.repository(image).place.registry)
        except SociError:
            return 0.0, 0.0
