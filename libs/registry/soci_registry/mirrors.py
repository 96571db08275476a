# SPDX-License-Identifier: Apache-2.0
"""One operation over several hosts: the mirrors of a registry in their order, then the registry itself.

With a single host nothing here is in the way: the operation goes straight to `transport`, with its patience. With
several, each is asked once and the next one takes over; only when all have failed, and another round can change that,
is there a wait. Who failed is remembered in `health`. Logins and tokens are each host's own (`auth` keeps them apart).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from soci.digest import Digest
from soci.errors import DeadlineExceeded, SociError, Unavailable
from soci_registry.failure import Kind, TryError, final_error
from soci_registry.fetch import fill_range, room_for, stream_blob
from soci_registry.health import EVERYTHING, Health, Order
from soci_registry.policy import GiveUp, decide, is_repeatable
from soci_registry.room import Room
from soci_registry.settings import Retry
from soci_registry.transport import Transport, shown
from soci_registry.urls import Place
from soci_registry.wire import Request

Result = TypeVar("Result")
Attempt = Callable[[Transport, Place], Awaitable[Result]]

QUICK_SECONDS = 1.0
"""A connection that broke within so many seconds is tried once more at the same host: it may have been a kept one."""

REASON_LENGTH_MAX = 300
"""Characters of one host's error in a message about several."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a failure says of its host. ``down``: of the host as a whole, else of this content there."""

    down: bool
    again: bool
    failure: TryError


def fault_of(error: TryError | SociError) -> Fault:
    """What a failed attempt at one host means for it. Everything but being down is about the content asked for."""
    cause = error if isinstance(error, TryError) else error.__cause__
    if not isinstance(cause, TryError):
        cause = TryError(Kind.SHORT if isinstance(error, Unavailable) else Kind.BAD_ANSWER, str(error))
        return Fault(isinstance(error, Unavailable), isinstance(error, DeadlineExceeded), cause)
    again = is_repeatable(cause)
    if cause.kind is Kind.STATUS:
        return Fault(again, again, cause)
    return Fault(cause.kind not in {Kind.BAD_ANSWER, Kind.MISMATCH}, again, cause)


def another_round(order: Order, faults: Sequence[tuple[Place, Fault]], *, patient: bool) -> TryError | None:
    """The failure for which all hosts are asked again after a wait; None where the answer is final.

    Who is not ``patient`` waits for no host that was known to be away where another one has given an answer.
    """
    hopeful = [(place, fault.failure) for place, fault in faults if fault.again]
    answered = any(not fault.down for _, fault in faults)
    if answered and not patient:
        hopeful = [(place, failure) for place, failure in hopeful if place in order.sound]
    return hopeful[-1][1] if hopeful else None


class Tour:
    """One operation's way through the hosts; see `fetch.Way`."""

    def __init__(
        self, transport: Transport, health: Health, places: tuple[Place, ...], retry: Retry, *, patient: bool = False
    ) -> None:
        self._transport = transport
        self._health = health
        self._places = places
        self._retry = retry
        self._patient = patient
        self._rounds = 0
        self._same = 0
        self._gave: set[Place] = set()
        self._begin()

    def _begin(self) -> None:
        self._rounds += 1
        self._order = self._health.order(self._places) if len(self._places) > 1 else Order(self._places)
        self._at = 0
        self._faults: list[tuple[Place, Fault]] = []
        self._errors: list[tuple[Place, SociError]] = []
        self._turn()

    def _turn(self) -> None:
        self._same = 0
        self._begun = self._now()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    @property
    def place(self) -> Place:
        """Where to ask."""
        return self._order.places[self._at]

    @property
    def gave(self) -> frozenset[Place]:
        """Who has given bytes, but for the last one, the registry itself: its word is the last."""
        return frozenset(self._gave - {self._places[-1]})

    def gives(self) -> None:
        """Some bytes have come from the host that is asked now."""
        self._gave.add(self.place)

    def progress(self) -> None:
        """So much has arrived that the rounds are counted anew."""
        self._rounds = 1
        self.gives()

    def served(self, *, blame: bool = True) -> None:
        """The host gave what was asked; ``blame`` leaves those before it that lacked it aside for the repository."""
        if len(self._places) == 1:
            return
        self.gives()
        self._health.served(self.place, self._begun)
        if not blame:
            return
        for place, fault in self._faults:
            if not fault.down and place != self.place:
                self._health.failed(place, place.repository, self._begun, str(fault.failure))

    def distrust(self, why: str) -> None:
        """What came was not the promised content: whoever gave of it is left aside for the repository."""
        self._gave |= {self.place, *(place for place, _ in self._faults)}
        for place in self.gave:
            self._health.failed(place, place.repository, self._now(), why)

    async def failed(self, request: Request | None, error: TryError | SociError) -> None:
        """Turn to the next host, or wait for another round; raises where nothing is left to try."""
        if len(self._places) == 1:
            await self._alone(request, error)
            return
        fault = fault_of(error)
        broke = fault.failure.kind in {Kind.CONNECT, Kind.SHORT} and fault.again
        if broke and not self._same and self._now() - self._begun < QUICK_SECONDS:
            self._same = 1
            return
        place = self.place
        self._faults.append((place, fault))
        self._errors.append((place, _told(request, error)))
        if request is not None:
            self._transport.forget_target(request)
        if fault.down:
            after = fault.failure.retry_after or 0.0
            self._health.failed(place, EVERYTHING, self._begun, str(fault.failure), after)
        self._at += 1
        if self._at < len(self._order.places):
            self._turn()
            return
        await self._next_round()

    async def _next_round(self) -> None:
        failure = another_round(self._order, self._faults, patient=self._patient)
        # The dice need no secrecy: jitter only keeps clients from marching in step.
        verdict = decide(self._retry, failure, self._rounds, random.random()) if failure else GiveUp()  # noqa: S311
        if isinstance(verdict, GiveUp):
            raise self.verdict() from self._errors[-1][1]
        await asyncio.sleep(verdict.seconds)
        self._begin()

    async def _alone(self, request: Request | None, error: TryError | SociError) -> None:
        if isinstance(error, SociError) or request is None:
            raise error
        self._rounds += 1
        await self._transport.wait(request, error, self._rounds - 1, self._retry)

    def verdict(self) -> SociError:
        """The error for callers: the registry's own where it was asked, with what the others said."""
        own = [error for place, error in self._errors if place == self._places[-1]]
        chosen = own[0] if own else self._errors[-1][1]
        others = [
            f"{place.base}: {str(error)[:REASON_LENGTH_MAX]}" for place, error in self._errors if error is not chosen
        ]
        return type(chosen)(f"{chosen}; before that: {'; '.join(others)}" if others else str(chosen))

    @property
    def last(self) -> str:
        """The latest failure, in words; empty before the first."""
        return str(self._errors[-1][1]) if self._errors else ""


def _told(request: Request | None, error: TryError | SociError) -> SociError:
    if isinstance(error, SociError):
        return error
    return final_error(error, "" if request is None else shown(request), 1)


class Mirrors:
    """All operations that may be done at several hosts."""

    def __init__(self, transport: Transport, health: Health) -> None:
        self.transport = transport
        self._health = health
        once = replace(transport.settings, tries=1, bad_answer_tries=1, range_tries=1, range_bad_answer_tries=1)
        self._brief = transport.with_settings(once, patient=False)

    def stream(self, places: tuple[Place, ...], digest: Digest) -> AsyncGenerator[bytes, None]:
        """A whole blob in chunks, from whichever hosts have it; see `fetch.stream_blob`."""
        transport = self.transport if len(places) == 1 else self._brief
        return stream_blob(transport, self._way(places), digest)

    def _way(self, places: tuple[Place, ...]) -> Tour:
        return Tour(self.transport, self._health, places, self.transport.settings.retry)

    async def first(self, places: tuple[Place, ...], attempt: Attempt[Result], *, blame: bool = True) -> Result:
        """What the first of ``places`` gives that can; the error of the last one, which is the registry itself.

        Where ``blame`` is false, a host that lacks what another one has is not left aside for that.
        """
        if len(places) == 1:
            return await attempt(self.transport, places[0])
        return await self._tour(self._way(places), attempt, blame=blame)

    async def range(
        self, places: tuple[Place, ...], digest: Digest, span: tuple[int, int], deadline: float | None, *, urgent: bool
    ) -> tuple[bytes, frozenset[Place]]:
        """Bytes [start, end) of a blob, and who gave of them. The next host goes on where one broke off."""
        with room_for(self.transport.settings, *span) as room:
            if len(places) == 1:
                place, start = places[0], span[0]
                await fill_range(self.transport, place, digest, start, room, deadline=deadline, urgent=urgent)
                return room.content(), frozenset()
            gave = await self._fill(places, digest, span, room, deadline, urgent=urgent)
            return room.content(), gave

    async def _fill(  # noqa: PLR0913  where, what, how long
        self,
        places: tuple[Place, ...],
        digest: Digest,
        span: tuple[int, int],
        room: Room,
        deadline: float | None,
        *,
        urgent: bool,
    ) -> frozenset[Place]:
        settings = self.transport.settings
        tour = Tour(self.transport, self._health, places, settings.range_retry, patient=True)

        async def attempt(transport: Transport, place: Place) -> None:
            before = room.count
            try:
                await fill_range(transport, place, digest, span[0], room, deadline=limit, urgent=urgent)
            finally:
                if room.count > before:
                    tour.gives()

        limit = settings.range_deadline if deadline is None else deadline
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                await self._tour(tour, attempt, blame=True)
        except TimeoutError as error:
            if not scope.expired():
                raise
            reason = f"; the last failure: {tour.last}" if tour.last else ""
            where = f"{digest} ({span[0]}-{span[1] - 1})"
            raise DeadlineExceeded(f"{where}: not within {limit:g} s{reason}") from error
        return tour.gave

    async def _tour(self, tour: Tour, attempt: Attempt[Result], *, blame: bool) -> Result:
        while True:
            try:
                found = await attempt(self._brief, tour.place)
            except SociError as error:
                await tour.failed(None, error)
            else:
                tour.served(blame=blame)
                return found

    def distrust(self, places: frozenset[Place], why: str) -> None:
        """Leave ``places`` aside for their repository: what they gave was not the promised content."""
        for place in places:
            self._health.failed(place, place.repository, asyncio.get_running_loop().time(), why)
