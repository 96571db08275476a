# SPDX-License-Identifier: Apache-2.0
"""What a layer costs either way, in seconds: loaded lazily, or brought whole. Pure arithmetic.

    lazily   mount + waits x (round trip + serving) + bytes needed, and its table of contents, / bandwidth
    whole    round trip + the slower of: all bytes / bandwidth, unpacking (it unpacks while it comes)

It need not be exact, only right about which is less where the two are far apart. What it does not know (no link seen
yet, no earlier launch) it takes from cautious constants, each of them named here. Those of serving, asking and
unpacking are what launches of the demo's image (`./dev demo`) were seen to take on a machine of two cores: at
200 Mbit/s and 20 ms its layers waited for 1.2, 1.1 and 2.8 s, where this says 1.3, 1.0 and 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass

MOUNT_SECONDS = 0.1
"""To show a lazy layer: zTOC, tree, mount. Seen: 0.02 to 0.25."""
MISS_SECONDS = 0.015
"""What a miss costs beside the network: bus, digest, inflate, write."""
UNPACK_RATE = 30e6
"""Compressed bytes that one core inflates and unpacks in a second."""
USUAL_NEED = 0.25
"""Share of a layer's bytes that a launch moves where nothing is known of it: spans are coarser than files."""
USUAL_REQUEST = 1.4e6
"""Compressed bytes that one wait brings, however few runs they lie in: a span, or two that are near. Seen: 1.2 to 1.6
million."""
LEAST_WAITS = 2.0
"""A layer that is needed at all is waited for at least so often: its libraries, then what they load."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way to a registry, as seen: bytes a second, and seconds until the first byte of an answer."""

    bytes_per_second: float
    round_trip: float


USUAL_LINK = Link(12.5e6, 0.02)
"""Where nothing was seen yet: 100 Mbit/s and 20 ms."""


@dataclass(frozen=True, slots=True)
class Need:
    """What earlier launches needed of a layer: the share of its bytes, 0 to 1, in how many separate runs of spans."""

    share: float
    runs: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that a launch waits for the layer, either way."""

    lazy: float
    whole: float


def costs(size: int, link: Link | None, need: Need | None, *, here: float = 0.0, table: int = 0) -> Costs:
    """Both ways for a layer of ``size`` compressed bytes, of whose bytes the share ``here`` is in the cache; ``table``
    are the bytes of its table of contents that are still to come.
    """
    link = link or USUAL_LINK
    share = need.share if need else USUAL_NEED
    waits = max(need.runs if need else LEAST_WAITS, size * share / USUAL_REQUEST)
    left = max(0.0, share - here)
    waits *= left / share if share else 0.0
    moved = left * size + table
    lazy = MOUNT_SECONDS + waits * (link.round_trip + MISS_SECONDS) + moved / link.bytes_per_second
    whole = link.round_trip + max(size / link.bytes_per_second, size / UNPACK_RATE)
    return Costs(lazy, whole)
