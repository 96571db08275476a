# SPDX-License-Identifier: Apache-2.0
"""Which layers of an image are begun with, when one of them is called for. Pure.

containerd calls for an image's layers one after another, the lowest first, each once the one below is committed. So
all below the one called for are there, those above are still to come; and whoever calls for a layer a second time has
begun anew: another pull, or one whose layer failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from soci.digest import Digest

AHEAD_LAYERS = 512
"""Layers of an image that are looked at ahead."""


def place_of(layer: Digest, below: int, layers: Sequence[Digest]) -> int | None:
    """Where in the image, from the bottom, the layer is that lies over ``below`` others; None: the image lacks it.

    An image may have a layer more than once: the one just there counts, else the nearest above, else the lowest.
    """
    above = (place for place in range(max(below, 0), len(layers)) if layers[place] == layer)
    return next(above, layers.index(layer) if layer in layers else None)


@dataclass(slots=True)
class Ahead:
    """How far the pulls of an image have come: places that were called for, and those that were begun with."""

    called: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)

    def call(self, place: int, count: int) -> list[int]:
        """The places to begin with now that ``place`` of ``count`` is called for, the lowest first: each once a pull,
        never one below.
        """
        if place in self.called:
            self.called.clear()
            self.begun.clear()
        self.called.add(place)
        wanted = [one for one in range(place, min(count, place + AHEAD_LAYERS)) if one not in self.begun]
        self.begun.update(wanted)
        return wanted
