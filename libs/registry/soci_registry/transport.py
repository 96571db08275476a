# SPDX-License-Identifier: Apache-2.0
"""One request to its end: redirects, credentials and repeated tries, over either wire.

`open` walks one try (hops, challenges, a new redirect target where the remembered one has expired); `call` repeats
tries by `policy.decide`. Authorization goes to the registry's own origin and to no other.
"""

from __future__ import annotations

import asyncio
import copy
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from soci.errors import DeadlineExceeded
from soci_registry.auth import Authorizer
from soci_registry.challenge import asks_for_credentials, implied_challenge, parse_challenges, target_expired
from soci_registry.failure import Kind, TryError, final_error
from soci_registry.gates import Gates
from soci_registry.health import Tell, silent
from soci_registry.policy import GiveUp, common_pause, decide, parse_retry_after
from soci_registry.settings import ERROR_BODY_BYTES_MAX, RegistrySettings, Retry
from soci_registry.targets import Targets
from soci_registry.urls import origin_of, redact, redirect_target
from soci_registry.wire import Answer, Request, Wire, read_head

Result = TypeVar("Result")

CHALLENGES_MAX = 2
"""Challenges answered in one try: a second one because a token can expire between the two."""

REFRESHES_MAX = 2
"""New redirect targets used in one try: one asked for anew, after one that another request has just found."""

TARGET_TRIES = 3
"""After so many failures at a remembered target the registry is asked for another one."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_FOLLOWED = frozenset({"GET", "HEAD"})
_ERROR_CODE = re.compile(rb'"code"\s*:\s*"([A-Z_]{1,40})"')


@dataclass(slots=True)
class _Walk:
    """Where one try stands."""

    url: str
    remembered: bool
    authorization: str | None = None
    hops: int = 0
    challenges: int = 0
    refreshes: int = 0


class Transport:
    """All requests of a process go through here; it owns no connection itself."""

    def __init__(
        self, *, wire: Wire, authorizer: Authorizer, settings: RegistrySettings, gates: Gates, tell: Tell = silent
    ) -> None:
        self._wire = wire
        self._authorizer = authorizer
        self.settings = settings
        self.patient = True
        self._gates = gates
        self._tell = tell
        self._targets = Targets(settings.remembered_targets)

    def with_settings(self, settings: RegistrySettings, *, patient: bool) -> Transport:
        """The same transport, its connections, tokens and limits a host shared, with other tries and times.

        One that is not ``patient`` does not wait where a host has asked all to come back later: it fails.
        """
        other = copy.copy(self)
        other.settings = settings
        other.patient = patient
        return other

    async def call(
        self,
        asked: Request | Callable[[], Request],
        read: Callable[[Answer], Awaitable[Result]],
        *,
        retry: Retry | None = None,
        deadline: float | None = None,
    ) -> Result:
        """Try until ``read`` has a result, within ``deadline`` seconds (None: no limit but that of the tries).

        ``asked`` may make the request anew for each try: one that goes on where the last one broke off.
        Raises `Unauthorized`, `NotFound`, `RegistryUnavailable`, `Mismatch`, or `DeadlineExceeded` with the last
        failure as its cause.
        """
        retry = retry or self.settings.retry
        last: TryError | None = None
        tried = 0
        request = asked if isinstance(asked, Request) else asked()
        scope = asyncio.timeout(deadline)
        try:
            async with scope:
                while True:
                    tried += 1
                    try:
                        async with self.open(request) as answer:
                            return await read(answer)
                    except TryError as error:
                        last = error
                        await self.wait(request, error, tried, retry)
                        request = asked if isinstance(asked, Request) else asked()
        except TimeoutError as error:
            if not scope.expired():
                raise
            reason = f"; the last of {tried} tries: {last}" if last else ""
            text = f"{shown(request)}: not within {deadline:g} s{reason}"
            raise DeadlineExceeded(text) from (last or error)

    async def wait(self, request: Request, failure: TryError, tried: int, retry: Retry) -> None:
        """Wait for the next try after ``failure``, or raise the error for callers where there is none."""
        # The dice need no secrecy: jitter only keeps clients from marching in step.
        verdict = decide(retry, failure, tried, random.random())  # noqa: S311
        if isinstance(verdict, GiveUp) or failure.kind is Kind.CONNECT or tried % TARGET_TRIES == 0:
            self.forget_target(request)
        if isinstance(verdict, GiveUp):
            raise final_error(failure, shown(request), tried) from failure
        self._tell("retrying request", request=shown(request), tried=tried, wait=verdict.seconds, why=str(failure))
        await asyncio.sleep(verdict.seconds)

    def forget_target(self, request: Request) -> None:
        """Ask the registry for a new redirect target at the next try: perhaps only the remembered host is away."""
        self._targets.forget(request.remember)

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[Answer]:
        """One try: the answer to ``request`` if its status is expected, else `TryError`."""
        remembered = self._targets.get(request.remember)
        walk = _Walk(remembered or request.url, remembered is not None)
        home = request.access.origin
        with self._targets.asking(request.remember) as asking:
            while True:
                if walk.url == request.url and (found := await asking.begin()):
                    walk.url, walk.remembered = found, True
                origin = origin_of(walk.url)
                async with AsyncExitStack() as stack:
                    slot = self._gates.slot(origin, urgent=request.urgent, patient=self.patient)
                    await stack.enter_async_context(slot)
                    if origin == home:
                        walk.authorization = await self._authorizer.header(request.access)
                    authorization = walk.authorization if origin == home else None
                    answer = await stack.enter_async_context(self._wire.send(request, walk.url, authorization))
                    if answer.status in request.expect:
                        if request.remember and walk.url != request.url:
                            self._targets.keep(request.remember, walk.url)
                        asking.done()
                        yield answer
                        return
                    if answer.status in _REDIRECTS and request.method in _FOLLOWED:
                        await read_head(answer, ERROR_BODY_BYTES_MAX)
                        self._follow(walk, answer)
                        continue
                    body = await read_head(answer, ERROR_BODY_BYTES_MAX)
                    failure = _failure(answer, body)
                    if pause := common_pause(failure, self.settings.retry_after_max):
                        self._gates.hold(origin, pause)
                    renewal = self._next(request, walk, answer, body)
                if renewal is None:
                    raise failure
                await renewal()

    def _follow(self, walk: _Walk, answer: Answer) -> None:
        location = answer.header("location")
        if not location:
            raise TryError(Kind.REDIRECT, f"redirect (status {answer.status}) without a Location")
        walk.hops += 1
        if walk.hops > self.settings.redirects:
            raise TryError(Kind.REDIRECT, f"more than {self.settings.redirects} redirects, last at {redact(walk.url)}")
        walk.url = redirect_target(walk.url, location)

    def _next(self, request: Request, walk: _Walk, answer: Answer, body: bytes) -> Callable[[], Awaitable[None]] | None:
        """What makes it worth asking again within this try; None where the refusal stands."""
        away = origin_of(walk.url) != request.access.origin or walk.remembered or walk.hops > 0
        if away:
            again_possible = request.method in _FOLLOWED and walk.refreshes < REFRESHES_MAX
            if not again_possible or not target_expired(answer.status, answer.header("content-type"), body):
                return None

            async def refresh() -> None:
                self._forget_target(request, walk)

            return refresh
        if walk.challenges >= CHALLENGES_MAX:
            return None
        challenges = parse_challenges(answer.header("www-authenticate"))
        if asks_for_credentials(answer.status, body):
            implied = implied_challenge(answer.status, request.access.registry)
            offered = challenges or ((implied,) if implied and not self._authorizer.can_renew(request.access) else ())
        elif answer.status == 403 and walk.authorization and not walk.challenges:
            offered = challenges  # a token from earlier: perhaps only that was refused
        elif answer.status == 403 and request.remember and not walk.refreshes:

            async def again() -> None:
                walk.refreshes = REFRESHES_MAX

            return again
        else:
            return None

        async def authenticate() -> None:
            walk.challenges += 1
            self._tell(f"Received status code: {answer.status}", request=shown(request))
            await self._authorizer.renew(request.access, offered, walk.authorization)

        return authenticate

    def _forget_target(self, request: Request, walk: _Walk) -> None:
        # Another request may have replaced it already: then that one is the fresh target.
        self._targets.forget(request.remember, walk.url)
        fresh = self._targets.get(request.remember)
        walk.url = fresh or request.url
        walk.remembered = fresh is not None
        walk.hops = 0
        walk.refreshes += 1 if fresh else REFRESHES_MAX


def shown(request: Request) -> str:
    """The request as error messages name it."""
    wanted = request.headers.get("Range")
    return f"{request.method} {redact(request.url)}" + (f" ({wanted})" if wanted else "")


def _failure(answer: Answer, body: bytes) -> TryError:
    # Of an error's body only the code is repeated: object stores echo tokens in theirs.
    code = _ERROR_CODE.search(body)
    text = f"status {answer.status}" + (f" {code[1].decode()}" if code else "")
    after = parse_retry_after(answer.status, answer.header("retry-after"), datetime.now(UTC))
    return TryError(Kind.STATUS, text, status=answer.status, retry_after=after)
