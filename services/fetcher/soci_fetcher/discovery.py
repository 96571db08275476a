# SPDX-License-Identifier: Apache-2.0
"""Which SOCI index belongs to an image manifest.

Order: an index named by the client; the v2 annotation in the image manifest; a v1 index that refers to the manifest
(referrers API, or its tag fallback). The first that is there decides; one that is there but unusable ends the search,
so that a broken index is seen and not silently replaced by another.
"""

from __future__ import annotations

from soci.digest import Digest, parse_digest
from soci.errors import InvalidManifest, NoIndex, NotFound, SociError
from soci.index import INDEX_DIGEST_ANNOTATION, SOCI_INDEX_V1, SociIndex, parse_index
from soci.oci import Descriptor, Manifest, parse_manifest
from soci_bus.asks import FindIndex, IndexedLayer, IndexFound
from soci_registry import Repository


def choose_referrer(referrers: list[Descriptor]) -> Descriptor | None:
    """Of several v1 indexes, the one with the smallest digest: registries list them in no promised order."""
    return min(referrers, key=lambda descriptor: descriptor.digest, default=None)


async def find_index(repository: Repository, ask: FindIndex, *, v1: bool, v2: bool) -> IndexFound:
    """The index for ``ask.manifest``; `NoIndex` says why there is none, whatever the reason was."""
    try:
        digest, found_by = await _locate(repository, ask, v1=v1, v2=v2)
        fetched = await repository.manifest(digest)
        index = parse_index(fetched.content)
    except NoIndex:
        raise
    except SociError as error:
        raise NoIndex(f"{ask.image}: the SOCI index cannot be had: {error}") from error
    return IndexFound(digest, found_by, layers_of(index))


def layers_of(index: SociIndex) -> tuple[IndexedLayer, ...]:
    """Which layer has which zTOC. Of two for one layer the later counts, as in the reference."""
    found = {entry.layer: IndexedLayer(entry.layer, entry.ztoc.digest, entry.ztoc.size) for entry in index.layers}
    return tuple(found.values())


async def _locate(repository: Repository, ask: FindIndex, *, v1: bool, v2: bool) -> tuple[Digest, str]:
    if ask.explicit:
        return ask.explicit, "explicit"
    if not (v1 or v2):
        raise NoIndex("all lazy pull modes are disabled (pull_modes.soci_v1, pull_modes.soci_v2)")
    if v2:
        fetched = await repository.manifest(ask.manifest)
        manifest = parse_manifest(fetched.content)
        if not isinstance(manifest, Manifest):
            raise InvalidManifest(f"{ask.manifest} is an image index, not an image manifest")
        named = manifest.annotations.get(INDEX_DIGEST_ANNOTATION)
        if named:
            return parse_digest(named), "v2-annotation"
    if v1:
        try:
            chosen = choose_referrer(await repository.referrers(ask.manifest, SOCI_INDEX_V1))
        except NotFound:
            chosen = None
        if chosen:
            return chosen.digest, "v1-referrer"
    raise NoIndex(f"{ask.image} has no SOCI index for {ask.manifest}: make one with `soci index build {ask.image}`")
