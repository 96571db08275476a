# SPDX-License-Identifier: Apache-2.0
"""What a process says of itself to all nodes that listen at the moment, as plain frozen values.

A notice goes by core NATS to ``soci.tell.<node>.<word>``: nobody stores it and nobody answers. It may be lost, come
twice or come from anybody who reaches the bus: who hears it checks what it says, and the next one mends what was lost.
Fields are only ever added, with a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class Notice:
    """Base of all notices. ``word`` ends the subject; ``node`` is the teller's."""

    word: ClassVar[str]
    __slots__ = ()
    node: str


@dataclass(frozen=True, slots=True)
class PeerTold(Notice):
    """A fetcher serves compressed spans to other nodes at ``url``, or (``leaving``) ends doing so.

    ``start`` is drawn anew by each process, ``number`` counts its notices, ``every`` is how many seconds pass between
    two of them, ``at`` seconds since 1970 by its clock. ``mac`` proves that the teller knows the cluster's secret; it
    covers all the other fields.
    """

    word: ClassVar[str] = "peer"
    node: str
    url: str
    start: str
    version: int
    number: int
    every: float
    at: float
    leaving: bool
    mac: str


ALL: tuple[type[Notice], ...] = (PeerTold,)
