# SPDX-License-Identifier: Apache-2.0
"""How a layer comes, and why: one pure decision.

    Lazy   shown at once, its bytes come when they are read
    Whole  downloaded and unpacked by us
    Defer  left to containerd, which downloads this layer and all above it

The decision is asked again after an attempt failed, with what failed among the facts; it never answers the same twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from soci.digest import Digest
from soci_bus.asks import IndexedLayer, IndexFound


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the layer at the time of asking. Text fields hold the reason of a failure, or nothing."""

    layer: Digest | None  # None: the labels do not name it
    labels_wrong: str = ""
    index: IndexFound | None = None
    no_index: str = ""
    size: int | None = None
    min_layer_size: int = 0
    lazy_failed: str = ""
    whole_failed: str = ""


@dataclass(frozen=True, slots=True)
class Lazy:
    """Mount it by this zTOC."""

    ztoc: IndexedLayer
    why: str
    name = "lazy"


@dataclass(frozen=True, slots=True)
class Whole:
    """Download and unpack it ourselves."""

    why: str
    name = "whole"


@dataclass(frozen=True, slots=True)
class Defer:
    """Let containerd do it."""

    why: str
    name = "defer"


Mode = Lazy | Whole | Defer


def choose(facts: Facts) -> Mode:
    """The way for these facts."""
    if facts.layer is None:
        return Defer(facts.labels_wrong)
    if facts.whole_failed and facts.lazy_failed:
        return Defer(f"it could not be mounted lazily ({facts.lazy_failed}), nor unpacked here: {facts.whole_failed}")
    if facts.whole_failed:
        return Defer(f"it could not be unpacked here: {facts.whole_failed}")
    if facts.index is None:
        return Defer(facts.no_index)
    if facts.lazy_failed:
        return Whole(f"it could not be mounted lazily: {facts.lazy_failed}")
    if facts.size is not None and facts.size < facts.min_layer_size:
        return Whole(f"{facts.size} bytes are under min_layer_size of {facts.min_layer_size}")
    ztoc = next((entry for entry in facts.index.layers if entry.layer == facts.layer), None)
    if ztoc is None:
        return Whole(f"index {facts.index.index} has no zTOC for it")
    return Lazy(ztoc, f"index {facts.index.index} ({facts.index.found_by})")
