# SPDX-License-Identifier: Apache-2.0
"""How a layer comes, and why: one pure decision.

    Lazy   shown at once, its bytes come when they are read
    Whole  downloaded and unpacked by us, beside others, while it comes
    Defer  left to containerd, which downloads this layer and all above it

The decision is asked again after an attempt failed, with what failed among the facts; it never answers the same twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from soci.digest import Digest
from soci_bus.asks import IndexedLayer, IndexFound
from soci_snapshotter.estimate import Link, Need, costs


@dataclass(frozen=True, slots=True)
class Rules:
    """What the administrator set.

    ``always_whole`` switches lazy loading off; ``whole_without_index`` brings whole what would be left to containerd,
    and ``no_regret`` what would be slower lazily.
    """

    min_layer_size: int = 0
    always_whole: bool = False
    whole_without_index: bool = False
    no_regret: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the layer at the time of asking. Text fields hold the reason of a failure, or nothing.

    ``size`` are the blob's bytes, ``here`` is the share of them that the cache has, 0 to 1; ``link`` and ``need`` are
    what was seen of the registry and of earlier launches, if anything was. ``table`` are the bytes of its zTOC, where
    that is still to come.
    """

    layer: Digest | None  # None: the labels do not name it
    labels_wrong: str = ""
    index: IndexFound | None = None
    no_index: str = ""
    size: int | None = None
    here: float = 0.0
    table: int = 0
    link: Link | None = None
    need: Need | None = None
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


def choose(facts: Facts, rules: Rules) -> Mode:
    """The way for these facts."""
    if facts.layer is None:
        return Defer(facts.labels_wrong)
    if facts.whole_failed and facts.lazy_failed:
        return Defer(f"it could not be mounted lazily ({facts.lazy_failed}), nor unpacked here: {facts.whole_failed}")
    if facts.whole_failed:
        return Defer(f"it could not be unpacked here: {facts.whole_failed}")
    if rules.always_whole:
        return Whole("parallel_pull_unpack is enabled")
    if facts.index is None:
        return Whole(facts.no_index) if rules.whole_without_index else Defer(facts.no_index)
    if facts.lazy_failed:
        return Whole(f"it could not be mounted lazily: {facts.lazy_failed}")
    return _by_index(facts, facts.index, rules)


def _by_index(facts: Facts, index: IndexFound, rules: Rules) -> Mode:
    if facts.size is not None and facts.size < rules.min_layer_size:
        return Whole(f"{facts.size} bytes are under min_layer_size of {rules.min_layer_size}")
    ztoc = next((entry for entry in index.layers if entry.layer == facts.layer), None)
    if ztoc is None:
        size = "" if facts.size is None else f" (of {facts.size} bytes)"
        return Whole(f"index {index.index} has no zTOC for it{size}")
    if rules.no_regret and facts.size is not None and facts.here < 1.0:  # what is here is not fetched again
        seconds = costs(facts.size, facts.link, facts.need, here=facts.here, table=facts.table)
        if seconds.whole < seconds.lazy:
            return Whole(
                f"{facts.size} bytes are sooner here whole (about {seconds.whole:.2f} s) than lazily "
                f"({seconds.lazy:.2f} s; {_said_of(facts)})"
            )
    return Lazy(ztoc, f"index {index.index} ({index.found_by})")


def _said_of(facts: Facts) -> str:
    link, need = "no link seen yet", "no launch seen yet"
    if facts.link:
        link = f"{facts.link.bytes_per_second / 1e6:.1f} MB/s and {facts.link.round_trip * 1e3:.0f} ms seen"
    if facts.need:
        need = f"earlier launches needed {facts.need.share:.0%} in {facts.need.runs} runs"
    return f"{link}; {need}"
