# SPDX-License-Identifier: Apache-2.0
"""What the verbs on single artifacts begin with: the digest that was typed, and whether it is of the right kind."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Final

from soci.digest import Digest, parse_digest
from soci.errors import InvalidInput, NotFound
from soci.index import SOCI_INDEX_V1, SOCI_INDEX_V2
from soci_indexing.artifacts import INDEX, PREFETCH, ZTOC, Artifact, ArtifactsDb, ArtifactType
from soci_indexing.stores import Content

NAMES: Final = {INDEX: "a SOCI index", ZTOC: "a zTOC", PREFETCH: "a prefetch list"}
VERBS: Final = {INDEX: "index", ZTOC: "ztoc", PREFETCH: "prefetch"}
VERSIONS: Final = {SOCI_INDEX_V1: "v1", SOCI_INDEX_V2: "v2"}


async def read_artifact(
    db: ArtifactsDb, store: Content, text: str, kind: ArtifactType, limit: int
) -> tuple[Digest, bytes, Artifact | None]:
    """The content of the artifact named ``text``; what the database does not know is looked for in the store.

    Raises `InvalidDigest`, `NotFound`, and `InvalidInput` where the database knows it as something else.
    """
    digest = parse_digest(text)
    known = await asyncio.to_thread(db.get, digest)
    if known is not None and known.type != kind:
        raise InvalidInput(f"{digest} is {NAMES[known.type]}: use soci {VERBS[known.type]} info")
    try:
        return digest, await store.read(digest, limit=limit), known
    except NotFound as error:
        raise NotFound(f"{NAMES[kind]} {digest} is not here") from error


def rfc3339(created_at: int) -> str | None:
    """A time (ns since the epoch) for JSON; None where it is not known."""
    if created_at <= 0:
        return None
    return datetime.fromtimestamp(created_at // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
