# SPDX-License-Identifier: Apache-2.0
"""What the log says of a layer that was prepared: the keys that operators of the reference grep for. Pure.

The reference's rows: whether a layer was prepared remotely or locally, or left to containerd, and why not; by what an
index was chosen (at debug); which layers an index leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from soci.digest import Digest
from soci_bus.asks import IndexFound
from soci_snapshotter.mode import Defer, Facts, Mode

PREPARED: Final[Mapping[str, Mapping[str, str]]] = {
    "lazy": {"remote-snapshot-prepared": "true"},
    "whole": {"remote-snapshot-prepared": "false", "local-snapshot-prepared": "true"},
    "defer": {"remote-snapshot-prepared": "false", "defer-snapshot-runtime": "true"},
}
FAILED: Final[Mapping[str, str]] = {"remote-snapshot-prepared": "false"}
"""Of a call that failed: containerd's pull ends with it."""
FOUND_BY: Final[Mapping[str, str]] = {
    "explicit": "the client named its digest",
    "v2-annotation": "an annotation of the image manifest names it (v2)",
    "v1-referrer": "it refers to the image manifest (v1)",
}


@dataclass(frozen=True, slots=True)
class Said:
    """One line: its level, its message, its facts."""

    level: str
    message: str
    facts: Mapping[str, object]


def of_layer(mode: Mode, failed: str = "") -> Mapping[str, str]:
    """How a layer came; ``failed`` is what went wrong on the way, if something did. ``error`` says why it did not come
    remotely, where that was not simply decided so.
    """
    error = failed or (mode.why if isinstance(mode, Defer) else "")
    return {"mode": mode.name, "why": mode.why, **PREPARED[mode.name], **({"error": error} if error else {})}


def of_index(image: str, manifest: Digest, index: IndexFound | None, no_index: str) -> Said:
    """Which index an image has, and by what it was chosen; or why there is none."""
    facts: dict[str, object] = {"image": image, "manifest": manifest}
    if index is None:
        return Said("debug", "no SOCI index", {**facts, "why": no_index})
    by = FOUND_BY.get(index.found_by, index.found_by)
    return Said("debug", f"SOCI index chosen: {by}", {**facts, "index": index.index, "found_by": index.found_by})


def of_sparse(image: str, facts: Facts) -> Said | None:
    """That the index leaves this layer out; None where it does not."""
    if facts.index is None or facts.layer is None or any(one.layer == facts.layer for one in facts.index.layers):
        return None
    known = {"layerDigest": facts.layer, "image": image, "index": facts.index.index}
    return Said("info", "the SOCI index has no zTOC for this layer", known)
