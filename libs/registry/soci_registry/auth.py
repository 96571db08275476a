# SPDX-License-Identifier: Apache-2.0
"""Answers to challenges: Basic, and the Docker token flow (distribution specification, "Token Authentication").

Nothing is sent before a registry asks. What it was given is kept by (registry, scope) until it expires. However many
requests are refused at once, one of them asks the token server and the others take its result, be it an error.

Concurrency: `_Held.lock` is the only lock. `_Held.turn` grows at each result, under the lock; who finds it grown after
waiting for the lock was waiting for exactly that result.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlencode

from soci.errors import RegistryUnavailable, SociError, Unauthorized
from soci_registry.challenge import Challenge, choose
from soci_registry.credentials import Credentials, Login
from soci_registry.failure import Kind, TryError
from soci_registry.policy import GiveUp, decide, parse_retry_after
from soci_registry.settings import TOKEN_BODY_BYTES_MAX, RegistrySettings
from soci_registry.urls import Access, origin_of, redact, redirect_target
from soci_registry.wire import Body, Request, Wire, read_bounded, read_head

HELD_MAX = 4096
"""Scopes whose tokens are kept; the longest unused goes first."""

TOKEN_TRIES = 3
"""Tries in a row; the request that needs the token has its own tries around them."""

LOGINS_MAX = 4
"""Logins that are tried for one challenge, where the sources have another one for each that is refused."""

EXPIRES_IN_DEFAULT = 60.0
EXPIRES_IN_MAX = 24 * 3600.0
EXPIRY_MARGIN = 0.9
"""A token is used for this share of its life: the rest is for clocks that differ and requests under way."""

CLIENT_ID = "sociable"

_HEADER_SAFE = re.compile(r"[!-~]+")
# What a token server says to a POST when it only knows GET.
_POST_UNKNOWN = frozenset({400, 401, 404, 405})
_ANY_STATUS = frozenset(range(200, 600))


@dataclass(slots=True)
class _Held:
    """What is known for one (registry, scope)."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    turn: int = 0
    header: str | None = None
    expires: float = 0.0
    challenge: Challenge | None = None
    error: SociError | TryError | None = None
    refused: list[Login] = field(default_factory=list)
    """Logins that this registry did not take, `LOGINS_MAX` at most."""


class Authorizer:
    """Gives requests their Authorization header. ``wire`` reaches token servers."""

    def __init__(
        self,
        *,
        wire: Wire,
        credentials: Credentials,
        settings: RegistrySettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wire = wire
        self._credentials = credentials
        self._settings = settings
        self._clock = clock
        self._all: OrderedDict[Access, _Held] = OrderedDict()

    async def header(self, access: Access) -> str | None:
        """The header for the next request: None before the first challenge; an expired token is renewed first."""
        held = self._all.get(access)
        if held is None or held.header is None:
            return None
        if held.expires > self._clock():
            return held.header
        return await self.renew(access, (), None)  # it was not refused: the same login may be used again

    async def renew(self, access: Access, challenges: tuple[Challenge, ...], used: str | None) -> str:
        """A header to use instead of ``used``, which the registry refused.

        Without ``challenges`` the one that this scope was asked last is answered again. Raises `Unauthorized` where
        credentials are missing or refused, and `TryError` where the token server may do better at another try.
        """
        held = self._held(access)
        turn = held.turn
        async with held.lock:
            if held.turn != turn and held.error is not None:
                raise _copy_of(held.error) from held.error
            if held.header is not None and held.header != used and held.expires > self._clock():
                return held.header
            challenge = choose(challenges) or held.challenge
            if challenge is None:
                raise Unauthorized(f"{access.registry} refuses access to {access.scope} and names no way to log in")
            try:
                header, lifetime = await self._obtain(access, challenge, held, used)
            except (SociError, TryError) as error:
                held.turn, held.header, held.error = held.turn + 1, None, error
                raise
            held.turn, held.header, held.error = held.turn + 1, header, None
            held.expires, held.challenge = self._clock() + lifetime, challenge
            return header

    def can_renew(self, access: Access) -> bool:
        """Whether a header was given for ``access`` before, so that another can be asked for without a challenge."""
        held = self._all.get(access)
        return held is not None and held.challenge is not None

    def _held(self, access: Access) -> _Held:
        held = self._all.get(access)
        if held is None:
            held = self._all[access] = _Held()
            while len(self._all) > HELD_MAX:
                self._all.popitem(last=False)
        self._all.move_to_end(access)
        return held

    async def _obtain(self, access: Access, challenge: Challenge, held: _Held, used: str | None) -> tuple[str, float]:
        """A fresh header, and for how many seconds it may be used; ``used`` is the header that was refused last.

        Where a login is refused, its source is asked for a newer one, and other sources for theirs. Logins that were
        refused earlier come last: a registry can be wrong too.
        """
        failure: Unauthorized | None = None
        tried: list[Login] = []
        while len(tried) < LOGINS_MAX:
            login = await self._credentials.find(access.registry, access.repository, tuple(held.refused))
            if login is None and not tried and held.refused:
                held.refused = []
                continue
            if failure is not None and (login is None or login in tried):
                if len(held.refused) == len(tried):
                    break
                held.refused = list(tried)
                continue
            try:
                return await self._answer(access, challenge, login, used)
            except Unauthorized as error:
                failure = error
                if login is None:
                    break
                tried.append(login)
                held.refused = [*(one for one in held.refused if one != login), login][-LOGINS_MAX:]
        held.refused = []
        raise failure or Unauthorized(f"{access.registry} refuses all logins for {access.scope}")

    async def _answer(
        self, access: Access, challenge: Challenge, login: Login | None, used: str | None
    ) -> tuple[str, float]:
        if challenge.scheme != "basic":
            token, lifetime = await self._token(access, challenge, login)
            return f"Bearer {token}", lifetime
        if login is None or not login.username:
            raise Unauthorized(f"{access.registry} wants a user name and password, and none is configured for it")
        # The same password again cannot help; the same token can, where the refusal was an accident.
        if (header := _basic(login)) == used:
            raise Unauthorized(f"{access.registry} refuses the credentials for {access.scope}")
        return header, self._settings.login_seconds

    async def _token(self, access: Access, challenge: Challenge, login: Login | None) -> tuple[str, float]:
        realm = challenge.parameters["realm"]
        try:
            # The realm is a stranger's word, as a redirect is: the same targets are refused.
            realm = redirect_target(f"{access.origin.scheme}://{access.registry}/", realm)
            scheme = origin_of(realm).scheme
        except TryError as error:
            raise RegistryUnavailable(f"{access.registry} names an unusable token server: {error}") from error
        if login is not None and access.origin.scheme == "https" and scheme != "https":
            raise Unauthorized(f"{access.registry}: its token server {redact(realm)} wants secrets without TLS")
        fields = {"scope": access.scope}
        if service := challenge.parameters.get("service"):
            fields["service"] = service
        if login is not None:
            form = {**fields, "client_id": CLIENT_ID, **_grant(login)}
            status, body = await self._ask(_post(access, realm, form), None)
            if status == 200:
                return parse_token(body)
            if status not in _POST_UNKNOWN or not login.username:
                raise _token_error(realm, status)
        separator = "&" if "?" in realm else "?"
        get = Request("GET", realm + separator + urlencode(fields), access, expect=_ANY_STATUS)
        status, body = await self._ask(get, _basic(login) if login is not None else None)
        if status == 200:
            return parse_token(body)
        raise _token_error(realm, status)

    async def _ask(self, request: Request, authorization: str | None) -> tuple[int, bytes]:
        tried = 0
        while True:
            tried += 1
            try:
                async with self._wire.send(request, request.url, authorization) as answer:
                    if answer.status == 200:
                        return 200, await read_bounded(answer, TOKEN_BODY_BYTES_MAX, "token")
                    await read_head(answer, TOKEN_BODY_BYTES_MAX)
                    if answer.status < 500 and answer.status != 429:
                        return answer.status, b""
                    after = parse_retry_after(answer.status, answer.header("retry-after"), datetime.now(UTC))
                    raise TryError(Kind.STATUS, f"status {answer.status}", status=answer.status, retry_after=after)
            except TryError as error:
                # The dice need no secrecy: jitter only keeps clients from marching in step.
                verdict = decide(self._settings.retry, error, tried, random.random())  # noqa: S311
                if isinstance(verdict, GiveUp) or tried >= TOKEN_TRIES:
                    text = f"token server {redact(request.url)}: {error}"
                    raise TryError(error.kind, text, status=error.status, retry_after=error.retry_after) from error
            await asyncio.sleep(verdict.seconds)


def parse_token(body: bytes) -> tuple[str, float]:
    """(token, seconds it may be used) of a token server's JSON; `RegistryUnavailable` where it holds no token."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RegistryUnavailable("the token server's answer is not a JSON object")
    token = found.get("token") or found.get("access_token")
    if not isinstance(token, str) or not _HEADER_SAFE.fullmatch(token):
        raise RegistryUnavailable("the token server's answer holds no usable token")
    lifetime = found.get("expires_in")
    if isinstance(lifetime, bool) or not isinstance(lifetime, (int, float)) or not lifetime > 0:
        lifetime = EXPIRES_IN_DEFAULT
    return token, float(min(lifetime, EXPIRES_IN_MAX)) * EXPIRY_MARGIN


def _copy_of(error: SociError | TryError) -> SociError | TryError:
    if isinstance(error, TryError):
        return TryError(error.kind, str(error), status=error.status, retry_after=error.retry_after)
    return type(error)(str(error))


def _basic(login: Login) -> str:
    return "Basic " + base64.b64encode(f"{login.username}:{login.secret}".encode()).decode()


def _grant(login: Login) -> dict[str, str]:
    if login.username:
        return {"grant_type": "password", "username": login.username, "password": login.secret}
    return {"grant_type": "refresh_token", "refresh_token": login.secret}


def _post(access: Access, realm: str, form: dict[str, str]) -> Request:
    content = urlencode(form).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return Request("POST", realm, access, headers, Body(content, len(content)), _ANY_STATUS)


def _token_error(realm: str, status: int) -> SociError:
    if status in {400, 401, 403, 404}:
        return Unauthorized(f"token server {redact(realm)}: status {status}")
    return RegistryUnavailable(f"token server {redact(realm)}: status {status}")
