# SPDX-License-Identifier: Apache-2.0
"""Who is in the cluster now, and who is left aside for a while. Pure: times are given, in seconds of one clock.

The node is the unit of sharing: several fetchers of one node share its files, and a key's process among them is chosen
as the key's node is, so that each span is under way in one process alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

from soci_bus.notices import PeerTold
from soci_fetcher.peers_ring import Ring

VERSION = 1
"""Of the protocol between peers; others are not asked."""
MEMBERS_MAX = 4096
"""Processes that are remembered; who comes when all places are taken is passed over."""
TEXT_MAX = 256
"""Characters of a node's name or address."""
EVERY_LEAST = 3.0
"""Seconds between two notices of a process in a small cluster."""
EVERY_A_MEMBER = 0.01
"""Seconds more for each member: in a large cluster each tells more rarely, and each hears at most 100 a second."""
EVERY_MOST = 60.0
LIVES = 3.5
"""So many times the announced interval may pass without a word; then a process counts as gone."""
QUIET = 2 * EVERY_LEAST
"""Seconds without any notice, our own neither, after which it is the bus that is away, not those who were heard."""
DEAF_SECONDS = 600.0
"""For so long nobody is taken for gone then."""
ASIDE_FIRST = 1.0
ASIDE_MOST = 60.0
"""Seconds that a process is left aside after it failed: doubled each time, up to the latter."""
LIAR_SECONDS = 600.0
"""Seconds that a node is left aside after it gave wrong bytes."""
LATE_MOST = 3
"""So many times in a row the registry may be quicker than a process that says it is at it; then that is a failure."""


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a node that serves spans to others."""

    node: str
    start: str
    url: str


@dataclass(slots=True)
class _Known:
    member: Member
    number: int  # of the last notice
    until: float
    there: bool = True


def interval(members: int) -> float:
    """Seconds between two notices where there are so many processes."""
    return min(EVERY_LEAST + EVERY_A_MEMBER * members, EVERY_MOST)


def is_sound(notice: PeerTold) -> bool:
    """Whether what a notice says is within the bounds of what we would ever say."""
    try:
        url = urlsplit(notice.url)
        good = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0 and not url.username
    except ValueError:
        return False
    plain = not (url.path or url.query or url.fragment) and notice.url.isascii() and notice.url.isprintable()
    return (
        good
        and plain
        and notice.version == VERSION
        and 0 < len(notice.node) <= TEXT_MAX
        and 0 < len(notice.start) <= TEXT_MAX
        and len(notice.url) <= TEXT_MAX
        and 0 < notice.every <= EVERY_MOST
    )


class Members:
    """All processes that were heard of lately; we are always one of them."""

    def __init__(self, mine: Member, now: float) -> None:
        self.mine = mine
        self._known: dict[str, _Known] = {mine.start: _Known(mine, 0, math.inf)}
        self._heard = now
        self._arrange()

    def hear(self, notice: PeerTold, now: float) -> bool:
        """Take in a sound notice that was proven; whether it changed who is there. An old one changes nothing."""
        silence = now - self._heard
        if silence > QUIET:  # the bus was away: what nobody could say is not held against anybody
            for one in self._known.values():
                one.until += silence
        self._heard = now
        known = self._known.get(notice.start)
        if notice.start == self.mine.start or (known and notice.number <= known.number):
            return False
        if known is None and len(self._known) >= MEMBERS_MAX:
            return False
        member = Member(notice.node, notice.start, notice.url)
        # Who leaves stays known for as long as others, so that an older notice which comes late calls nobody back.
        fresh = _Known(member, notice.number, now + LIVES * notice.every, not notice.leaving)
        self._known[notice.start] = fresh
        if fresh.there == (known is not None and known.there) and (known is None or known.member == member):
            return False
        self._arrange()
        return True

    def expire(self, now: float) -> bool:
        """Leave out who was not heard of for too long; whether that changed who is there."""
        deaf = now - self._heard
        seen = now if deaf > DEAF_SECONDS else min(now, self._heard + QUIET)
        gone = [start for start, known in self._known.items() if known.until <= seen]
        changed = [start for start in gone if self._known.pop(start).there]
        if changed:
            self._arrange()
        return bool(changed)

    def all(self) -> list[Member]:
        """Every process that keys are shared among."""
        return [known.member for known in self._known.values() if known.there]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes, in order."""
        return self._ring.names

    def choose(self, key: int, count: int = 2) -> list[Member]:
        """The key's owner, then who stands in for it: of each node the process that the key falls to."""
        chosen = []
        for node in self._ring.ranked(key, count):
            (start,) = self._processes[node].ranked(key, 1)
            chosen.append(self._known[start].member)
        return chosen

    def _arrange(self) -> None:
        starts: dict[str, list[str]] = {}
        for member in self.all():
            starts.setdefault(member.node, []).append(member.start)
        self._processes = {node: Ring(found) for node, found in starts.items()}
        self._ring = Ring(self._processes)


@dataclass(slots=True)
class _Record:
    failures: int = 0
    late: int = 0
    until: float = 0.0


class Aside:
    """Who is not asked for a while, because it failed or lied."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def allows(self, member: Member, now: float) -> bool:
        """May it be asked?"""
        return all(
            (record := self._records.get(name)) is None or record.until <= now for name in (member.start, member.node)
        )

    def failed(self, member: Member, now: float) -> float:
        """It gave no answer, or was too slow; for how many seconds it is left aside."""
        record = self._record(member.start)
        if record.until > now:  # it was asked for several pieces at once, and fails once
            return record.until - now
        seconds = min(ASIDE_FIRST * 2.0 ** min(record.failures, 30), ASIDE_MOST)
        record.failures += 1
        record.late = 0
        record.until = max(record.until, now + seconds)
        return seconds

    def lied(self, member: Member, now: float) -> None:
        """It gave wrong bytes: its whole node is left aside."""
        self._record(member.node).until = now + LIAR_SECONDS

    def late(self, member: Member, now: float) -> bool:
        """The registry was quicker, though the peer was at it; whether that was once too often."""
        record = self._record(member.start)
        record.late += 1
        if record.late < LATE_MOST:
            return False
        self.failed(member, now)
        return True

    def well(self, member: Member) -> None:
        """It gave what it was asked for: earlier failures are forgotten, lies are not."""
        self._records.pop(member.start, None)

    def _record(self, name: str) -> _Record:
        record = self._records.setdefault(name, _Record())
        self._records.move_to_end(name)
        while len(self._records) > MEMBERS_MAX:
            self._records.popitem(last=False)
        return record
