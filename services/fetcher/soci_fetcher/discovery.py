# SPDX-License-Identifier: Apache-2.0
"""Index look-ups as the bus asks for them: `soci_indexing.discovery` finds the index, here it is read."""

from __future__ import annotations

from soci.errors import NoIndex, SociError
from soci.index import SociIndex, parse_index
from soci_bus.asks import FindIndex, IndexedLayer, IndexFound
from soci_indexing.discovery import locate
from soci_registry import Repository


async def find_index(repository: Repository, ask: FindIndex, *, v1: bool, v2: bool) -> IndexFound:
    """The index for ``ask.manifest``; `NoIndex` says why there is none, whatever the reason was."""
    try:
        located = await locate(repository, ask.image, ask.manifest, ask.explicit, v1=v1, v2=v2)
        fetched = await repository.manifest(located.index)
        index = parse_index(fetched.content)
    except NoIndex:
        raise
    except SociError as error:
        raise NoIndex(f"{ask.image}: the SOCI index cannot be had: {error}") from error
    return IndexFound(located.index, located.found_by, layers_of(index))


def layers_of(index: SociIndex) -> tuple[IndexedLayer, ...]:
    """Which layer has which zTOC. Of two for one layer the later counts, as in the reference."""
    found = {entry.layer: IndexedLayer(entry.layer, entry.ztoc.digest, entry.ztoc.size) for entry in index.layers}
    return tuple(found.values())
