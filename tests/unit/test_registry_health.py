# SPDX-License-Identifier: Apache-2.0
"""Whom to ask of several hosts, whom to leave aside, and when an answer is final: decisions as tables."""

from __future__ import annotations

from typing import Any

import pytest

from soci.errors import (
    DeadlineExceeded,
    LimitExceeded,
    Mismatch,
    NotFound,
    RegistryUnavailable,
    SociError,
    Unauthorized,
)
from soci_registry.failure import Kind, TryError
from soci_registry.health import (
    EVERYTHING,
    KNOWN_MAX,
    PROBE_SECONDS,
    Aside,
    Health,
    Order,
    after_failure,
    in_order,
)
from soci_registry.manner import Manner, headers_for
from soci_registry.mirrors import Fault, another_round, fault_of
from soci_registry.urls import Place

A, B, OWN = (Place(name, f"https://{name}", "team/app") for name in ("a.example", "b.example", "reg.example"))


def caused(error: SociError, kind: Kind, status: int = 0) -> SociError:
    error.__cause__ = TryError(kind, "x", status=status)
    return error


@pytest.mark.parametrize(
    ("failing", "sound", "aside"),
    [
        ((False, False, False), (A, B, OWN), ()),
        ((True, False, False), (B, OWN), (A,)),
        ((True, True, False), (OWN,), (A, B)),
        ((True, True, True), (), (A, B, OWN)),
        ((False, True, True), (A,), (B, OWN)),
    ],
)
def test_the_order(failing: tuple[bool, ...], sound: tuple[Place, ...], aside: tuple[Place, ...]) -> None:
    """Sound hosts come first, as configured; failing ones stay, as the last hope."""
    order = in_order((A, B, OWN), failing)
    assert order == Order(sound, aside)
    assert order.places == sound + aside


@pytest.mark.parametrize(
    ("known", "begun", "now", "found"),
    [
        (None, 9.0, 10.0, Aside(10.0, 15.0, 5.0)),
        (Aside(10.0, 15.0, 5.0), 9.0, 11.0, Aside(10.0, 15.0, 5.0)),  # was under way when the first failed
        (Aside(10.0, 15.0, 5.0), 12.0, 13.0, Aside(10.0, 15.0, 5.0)),  # asked as the last hope
        (Aside(10.0, 15.0, 5.0), 15.0, 16.0, Aside(16.0, 26.0, 10.0)),
        (Aside(10.0, 31.0, 5.0), 16.0, 18.0, Aside(18.0, 28.0, 10.0)),  # the one that found out
        (Aside(10.0, 26.0, 16.0), 30.0, 31.0, Aside(31.0, 51.0, 20.0)),
    ],
)
def test_how_long_a_host_is_left_aside(known: Aside | None, begun: float, now: float, found: Aside) -> None:
    """The time doubles with each failure after it was over, up to its limit, and with no other."""
    assert after_failure(known, begun, now, least=5.0, most=20.0) == found


@pytest.mark.parametrize(
    ("error", "down", "again"),
    [
        (TryError(Kind.CONNECT, "x"), True, True),
        (TryError(Kind.TLS, "x"), True, False),
        (TryError(Kind.STALL, "x"), True, True),
        (TryError(Kind.REDIRECT, "x"), True, False),
        (TryError(Kind.BAD_ANSWER, "x"), False, True),
        (TryError(Kind.STATUS, "x", status=404), False, False),
        (TryError(Kind.STATUS, "x", status=501), False, False),
        (caused(RegistryUnavailable("x"), Kind.STATUS, 503), True, True),
        (caused(RegistryUnavailable("x"), Kind.STATUS, 429), True, True),
        (caused(RegistryUnavailable("x"), Kind.STATUS, 400), False, False),
        (caused(NotFound("x"), Kind.STATUS, 404), False, False),
        (caused(Mismatch("x"), Kind.MISMATCH), False, True),
        (Unauthorized("x"), False, False),
        (NotFound("x"), False, False),
        (LimitExceeded("x"), False, False),
        (RegistryUnavailable("x"), True, False),
        (DeadlineExceeded("x"), True, True),
    ],
)
def test_what_a_failure_says_of_its_host(error: SociError | TryError, *, down: bool, again: bool) -> None:
    """A host that does not answer is down; one that lacks, refuses or spoils content is not."""
    fault = fault_of(error)
    assert (fault.down, fault.again) == (down, again)


def faults(*pairs: tuple[Place, bool, bool]) -> list[tuple[Place, Fault]]:
    return [(place, Fault(down, again, TryError(Kind.STATUS, place.base))) for place, down, again in pairs]


ALL = Order((A, OWN))
OWN_ASIDE = Order((A,), (OWN,))


@pytest.mark.parametrize(
    ("order", "failed", "patient", "again"),
    [
        (ALL, faults((A, False, False), (OWN, False, False)), False, None),  # both lack it
        (ALL, faults((A, True, True), (OWN, False, False)), False, A),  # the mirror may come back with it
        (ALL, faults((A, False, False), (OWN, True, True)), False, OWN),
        (OWN_ASIDE, faults((A, False, False), (OWN, True, True)), False, None),  # known to be away: no wait for it
        (OWN_ASIDE, faults((A, False, False), (OWN, True, True)), True, OWN),  # a read waits
        (OWN_ASIDE, faults((A, True, True), (OWN, True, True)), False, OWN),  # nobody has said anything
        (Order((), (A, OWN)), faults((A, True, True), (OWN, True, True)), False, OWN),
        (ALL, faults((A, True, False), (OWN, True, False)), True, None),
    ],
)
def test_when_all_are_asked_again(
    order: Order, failed: list[tuple[Place, Fault]], again: Place | None, *, patient: bool
) -> None:
    """Another round follows only where it can end better."""
    found = another_round(order, failed, patient=patient)
    assert (None if found is None else str(found)) == (None if again is None else again.base)


class Told:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def __call__(self, what: str, /, **facts: object) -> None:
        self.lines.append((what, facts))


class Known:
    """A health with a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told = Told()
        self.health = Health(least=5.0, most=20.0, tell=self.told, clock=lambda: self.now)

    def order(self) -> tuple[Place, ...]:
        return self.health.order((A, B, OWN)).places


@pytest.fixture
def known() -> Known:
    return Known()


def test_a_failing_host_is_tried_again_by_one(known: Known) -> None:
    """After its time, one request alone finds out whether a host is back; others leave it aside meanwhile."""
    assert known.order() == (A, B, OWN)
    known.health.failed(A, EVERYTHING, known.now, "status 503")
    assert known.order() == (B, OWN, A)
    known.now += 5.0
    assert known.order() == (A, B, OWN)
    assert known.order() == (B, OWN, A)
    known.now += PROBE_SECONDS  # the one that should find out was given up
    assert known.order() == (A, B, OWN)
    known.health.failed(A, EVERYTHING, known.now, "status 503")
    known.now += 9.9
    assert known.order() == (B, OWN, A)
    known.now += 0.1
    assert known.order() == (A, B, OWN)
    known.health.served(A, known.now)
    assert known.order() == known.order() == (A, B, OWN)
    assert known.told.lines == [
        ("host left aside", {"host": "https://a.example", "seconds": 5.0, "why": "status 503"}),
        ("host left aside", {"host": "https://a.example", "seconds": 10.0, "why": "status 503"}),
        ("host used again", {"host": "https://a.example"}),
    ]


def test_an_old_success_says_nothing(known: Known) -> None:
    """A request that began before the failure does not bring a host back; many failures at once are one."""
    begun = known.now
    known.now += 1
    for _ in range(16):
        known.health.failed(A, EVERYTHING, begun, "away")
    known.health.served(A, begun)
    assert known.order() == (B, OWN, A)
    assert len(known.told.lines) == 1


def test_a_lacking_host_is_left_aside_for_the_repository_alone(known: Known) -> None:
    """What a host lacks of one repository says nothing about another."""
    known.health.failed(A, A.repository, known.now, "status 404")
    assert known.order() == (B, OWN, A)
    others = tuple(Place(place.registry, place.base, "team/other") for place in (A, OWN))
    assert known.health.order(others).places == others


def test_what_is_remembered_is_bounded(known: Known) -> None:
    """However many repositories fail, so many are remembered and no more."""
    for number in range(KNOWN_MAX + 50):
        known.health.failed(A, f"team/{number}", known.now, "status 404")
    assert len(known.health._known) == KNOWN_MAX


@pytest.mark.parametrize(
    ("home", "authorization", "found"),
    [
        (True, None, {"Range": "x", "X-Key": "k", "authorization": "own"}),
        (True, "Bearer t", {"Range": "x", "X-Key": "k", "Authorization": "Bearer t"}),
        (False, None, {"Range": "x"}),
    ],
)
def test_configured_headers_stay_at_home(authorization: str | None, found: dict[str, Any], *, home: bool) -> None:
    """A host's own headers go to it alone, and never beside an Authorization of ours."""
    manner = Manner(headers=(("X-Key", "k"), ("authorization", "own"), ("range", "y")))
    assert headers_for(manner, {"Range": "x"}, authorization, home=home) == found
