# SPDX-License-Identifier: Apache-2.0
"""Logins that another process of this node knows: CRI's, which the kubelet hands over with each pull.

This library knows no bus: it is given the question as a function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from soci.errors import NotFound
from soci_registry.credentials import NONE_REFUSED, Login, Refused

Question = Callable[[str, str], Awaitable[Login]]
"""Asks for the login of (registry, repository). Raises `NotFound` where there is none, `Unavailable` where nobody
answers."""


class AskedLogin:
    """A source of logins (`soci_registry.Credentials`) that asks at each challenge, and keeps nothing."""

    def __init__(self, ask: Question) -> None:
        self._ask = ask

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The login that the other process has, if any."""
        del refused  # what it knows is what it was handed last
        try:
            login = await self._ask(registry, repository)
        except NotFound:
            return None
        return login if login.username or login.secret else None
