# SPDX-License-Identifier: Apache-2.0
"""Where a registry redirects to for each blob: remembered until refused or out of date, and asked for by one.

A registry that keeps its blobs elsewhere is asked once a blob, not once a range. When a signature runs out, every range
under way is refused at the same time: one of them asks for the new target and the others wait for what it finds.
Nobody waits twice: where the one that asked found nothing, each asks for itself, so that a registry that is away does
not make a queue.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

Key = tuple[str, str]
_Name = TypeVar("_Name")
_Value = TypeVar("_Value")

EXPIRY_MARGIN = 0.9
"""A target is used for this share of its life: the rest is for clocks that differ and requests under way."""

REDIRECTING_MAX = 1024
"""Repositories that are remembered to redirect; the one that did so longest ago goes first."""

_SECONDS = re.compile(r"[0-9]{1,12}")


@dataclass(frozen=True, slots=True)
class _Target:
    url: str
    until: float  # of the clock


def lifetime(url: str, now: float) -> float | None:
    """Seconds for which a signed URL that was just given is good; None where it does not say. ``now`` is Unix time.

    Read are the signatures of S3 and of stores that speak like it, of Google's, of CloudFront (``Expires``) and of
    Azure (``se``). What is said is no promise: a store may refuse earlier.
    """
    try:
        found = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query, max_num_fields=64)}
    except ValueError:
        return None
    for name in ("x-amz-expires", "x-goog-expires"):
        if _SECONDS.fullmatch(found.get(name, "")):
            return float(found[name])
    if _SECONDS.fullmatch(found.get("expires", "")):
        return max(0.0, float(found["expires"]) - now)
    try:
        date = datetime.fromisoformat(found.get("se", ""))
    except ValueError:
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)


class Targets:
    """The targets of a process, ``most`` at most; the one unused for longest goes first.

    Changes happen without an await in them, so there is no lock.
    """

    def __init__(
        self, most: int, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._most = most
        self._clock = clock
        self._wall = wall
        self._known: OrderedDict[Key, _Target] = OrderedDict()
        self._asking: dict[Key, asyncio.Event] = {}
        self._redirecting: OrderedDict[str, None] = OrderedDict()

    def get(self, key: Key | None) -> str | None:
        """The target to use, if one is known that is not out of date."""
        known = self._known.get(key) if key else None
        if known is None or key is None:
            return None
        if known.until <= self._clock():
            del self._known[key]
            return None
        self._known.move_to_end(key)
        return known.url

    def keep(self, key: Key, url: str) -> None:
        """Remember where ``key`` was found."""
        life = lifetime(url, self._wall())
        until = float("inf") if life is None else self._clock() + life * EXPIRY_MARGIN
        if (known := self._known.get(key)) is None or known.url != url:  # the same URL grows no younger
            self._known[key] = _Target(url, until)
        _limit(self._known, key, self._most)
        self._redirecting[key[0]] = None
        _limit(self._redirecting, key[0], REDIRECTING_MAX)

    def forget(self, key: Key | None, url: str | None = None) -> None:
        """Forget the target, but only if it is still ``url`` (None: whatever it is)."""
        known = self._known.get(key) if key else None
        if known is not None and key is not None and url in {None, known.url}:
            del self._known[key]

    def asking(self, key: Key | None) -> Asking:
        """One request's part in asking the registry."""
        return Asking(self, key)

    def under_way(self, key: Key) -> asyncio.Event | None:
        """What is set once the request that asks for ``key`` has an answer or has failed; None where none asks."""
        return self._asking.get(key)

    def claim(self, key: Key) -> asyncio.Event | None:
        """Be the one who asks; None where the registry is not known to redirect: then all ask at once."""
        if key[0] not in self._redirecting:
            return None
        return self._asking.setdefault(key, asyncio.Event())

    def release(self, key: Key, event: asyncio.Event) -> None:
        """Let those go on who waited."""
        if self._asking.get(key) is event:
            del self._asking[key]
        event.set()


class Asking:
    """A context manager around one request. `begin` before the registry is asked, `done` when the answer is there."""

    def __init__(self, targets: Targets, key: Key | None) -> None:
        self._targets = targets
        self._key = key
        self._mine: asyncio.Event | None = None
        self._waited = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()

    async def begin(self) -> str | None:
        """The target that another request has found meanwhile, or None: ask, the others wait."""
        if self._key is None or self._mine is not None:
            return None
        if not self._waited and (event := self._targets.under_way(self._key)) is not None:
            self._waited = True
            await event.wait()
        found = self._targets.get(self._key)
        if found is None and self._targets.under_way(self._key) is None:
            self._mine = self._targets.claim(self._key)
        return found

    def done(self) -> None:
        """There is an answer: who waits finds the target, or that there is none."""
        if self._mine is not None and self._key is not None:
            self._targets.release(self._key, self._mine)
            self._mine = None


def _limit(known: OrderedDict[_Name, _Value], key: _Name, most: int) -> None:
    known.move_to_end(key)
    while len(known) > most:
        known.popitem(last=False)
