# SPDX-License-Identifier: Apache-2.0
"""What is mounted, for people: how each layer is shown, how much of it is here, and what it takes of the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci_bus.asks import LayersShown, MountLayer, ShownLayer
from soci_cache.survey import Held, look
from soci_mounter.native import NATIVE

PAGE_MOUNTS: Final = 250
"""Mounts of one page: a message of the bus has at most 1 MiB, and an image's name may be long."""
LONGEST: Final = 1000
"""Characters that are told of a name or reason."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount, and its layer's folder."""

    ask: MountLayer
    way: str
    why: str
    place: Path


def page_of(mounted: Sequence[Mounted], following: str) -> LayersShown:
    """The page of these mounts; ``following`` is its `LayersShown.next`. Looks at a handful of files a layer."""
    return LayersShown(tuple(tell(one, look(one.place)) for one in mounted), following)


def tell(mounted: Mounted, held: Held | None) -> ShownLayer:
    """One mount, whose layer's folder holds this. Pure."""
    ask, way = mounted.ask, mounted.way
    state = held.state if held else "gone"
    return ShownLayer(
        mount=ask.mount,
        image=ask.image[:LONGEST],
        layer=ask.layer,
        ztoc=ask.ztoc,
        way=way,
        why=mounted.why[:LONGEST],
        state=NATIVE if way == NATIVE else state,
        here=held.here if held and held.known else 0,
        spans=held.spans if held else 0,
        size=held.size if held else 0,
    )
