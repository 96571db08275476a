# SPDX-License-Identifier: Apache-2.0
"""Which of several hosts is asked, and which is left aside for how long: decisions on values, and their memory.

A host is left aside whole where it does not answer or fails, and for one repository where it lacks or refuses what
another host has, or gave wrong bytes: a mirror that holds half of the world is no broken mirror.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from soci_registry.urls import Place

KNOWN_MAX = 1024
"""Hosts, and repositories of hosts, that are remembered as failing; the one that failed longest ago goes first."""

PROBE_SECONDS = 15.0
"""While one request finds out whether a host is back, others leave it aside for so long."""

EVERYTHING = ""
"""In the place of a repository: the host as a whole."""


class Tell(Protocol):
    """Is told what an operator wants to know, in one line: what, and facts about it. Never a secret."""

    def __call__(self, what: str, /, **facts: object) -> None:
        """Take the line; never fails and never waits."""


def silent(what: str, /, **facts: object) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Aside:
    """A host, or a repository there, that failed ``since`` (of the clock): for ``seconds``, but see ``until``.

    ``until`` is later than that while one request finds out whether the host is back.
    """

    since: float
    until: float
    seconds: float


def after_failure(known: Aside | None, begun: float, now: float, *, least: float, most: float) -> Aside:
    """What is known after a request that began at ``begun`` has failed at ``now``.

    Only a request that began after the time was over says something new: those that were under way when the first one
    failed do not double it, nor does one that asked all the same because every host was aside.
    """
    if known is not None and begun < known.since + known.seconds:
        return known
    seconds = least if known is None else max(least, min(known.seconds * 2, most))
    return Aside(now, now + seconds, seconds)


@dataclass(frozen=True, slots=True)
class Order:
    """Whom to ask, one after the other: the sound hosts as configured, then, as the last hope, those left aside."""

    sound: tuple[Place, ...]
    aside: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """All, in their order."""
        return self.sound + self.aside


def in_order(places: Sequence[Place], failing: Sequence[bool]) -> Order:
    """The order of ``places``, of which some are ``failing``."""
    pairs = list(zip(places, failing, strict=True))
    return Order(tuple(place for place, away in pairs if not away), tuple(place for place, away in pairs if away))


class Health:
    """What is known of hosts. Changes happen without an await in them, so there is no lock."""

    def __init__(self, *, least: float, most: float, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._least = least
        self._most = most
        self._clock = clock
        self._tell = tell
        self._known: OrderedDict[tuple[str, str], Aside] = OrderedDict()

    def order(self, places: Sequence[Place]) -> Order:
        """Whom to ask now. A host whose time is over is offered to the caller alone until its result is there."""
        return in_order(places, [self._is_aside(place) for place in places])

    def _is_aside(self, place: Place) -> bool:
        now = self._clock()
        over = []
        for key in _keys(place):
            known = self._known.get(key)
            if known is None:
                continue
            if known.until > now:
                return True
            over.append((key, known))
        for key, known in over:
            self._known[key] = Aside(known.since, now + PROBE_SECONDS, known.seconds)
        return False

    def failed(self, place: Place, repository: str, begun: float, why: str, after: float = 0.0) -> None:
        """Leave a host aside: whole (`EVERYTHING`), or for one repository; ``after`` is how long it asked for."""
        key = (place.base + place.path, repository)
        known = self._known.get(key)
        now = self._clock()
        found = after_failure(known, begun, now, least=max(self._least, min(after, self._most)), most=self._most)
        if found is known:
            return
        self._known[key] = found
        self._known.move_to_end(key)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        facts = {"repository": repository} if repository else {}
        self._tell("host left aside", host=place.base, seconds=found.seconds, why=why, **facts)

    def served(self, place: Place, begun: float) -> None:
        """A host has answered well to a request that began at ``begun``."""
        if not self._known:
            return
        for key in _keys(place):
            known = self._known.get(key)
            if known is not None and begun >= known.since:
                del self._known[key]
                self._tell("host used again", host=place.base, **({"repository": key[1]} if key[1] else {}))


def _keys(place: Place) -> tuple[tuple[str, str], tuple[str, str]]:
    host = place.base + place.path
    return (host, EVERYTHING), (host, place.repository)
