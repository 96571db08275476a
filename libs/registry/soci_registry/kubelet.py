# SPDX-License-Identifier: Apache-2.0
"""Logins from the kubelet's credential provider plugins, and their renewal.

The same file and programs that the kubelet uses (``--image-credential-provider-config`` and ``-bin-dir``): what a node
can pull, it can also load lazily, hours after the pull. A login is used for as long as its plugin says, and asked for
anew when that time is over or when the registry refuses it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soci.errors import InvalidConfig, Unavailable
from soci_registry.credentials import NONE_REFUSED, Login, Refused
from soci_registry.health import Tell, silent
from soci_registry.kubelet_config import Provided, Provider, parse_answer, read_providers, request_for
from soci_registry.matching import best_for
from soci_registry.programs import Limits, ProgramError, run

PLUGIN_SECONDS_MAX = 30.0
"""A plugin that takes longer is ended: a read waits for it."""
PLUGIN_ANSWER_BYTES_MAX = 1024 * 1024
PLUGINS_AT_ONCE = 4
ANSWERS_MAX = 512
"""Answers of all plugins that are kept; the one unused for longest goes first."""
REFUSED_PAUSE_SECONDS = 10.0
"""A plugin whose fresh login was refused is not run again sooner: a wrong password must not become a storm."""


@dataclass(slots=True)
class _Answer:
    provided: Provided
    since: float
    until: float


@dataclass(slots=True)
class _Known:
    """One configuration file as it was read."""

    stamp: tuple[int, int, int]
    providers: tuple[Provider, ...]
    locks: dict[str, asyncio.Lock] = field(default_factory=dict)


class KubeletProviders:
    """A source of logins (`soci_registry.Credentials`): plugins in ``folder``, as the file ``config`` names them.

    The file is read anew when it has changed. Raises `InvalidConfig` where it cannot be used, and `Unavailable` where
    a plugin fails: another source may know a login.
    """

    def __init__(
        self, config: Path, folder: Path, tell: Tell = silent, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._folder = folder
        self._tell = tell
        self._clock = clock
        self._known: _Known | None = None
        self._answers: OrderedDict[tuple[str, str, str], _Answer] = OrderedDict()
        self._running = asyncio.Semaphore(PLUGINS_AT_ONCE)

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The login of the first plugin that is meant for the repository and has one."""
        known = self._took(await asyncio.to_thread(self._read, self._known))
        failure: Unavailable | None = None
        for provider in known.providers:
            if provider.wants_token or not provider.serves(registry, repository):
                continue
            try:
                # One run at a time: its answer may hold for all who wait.
                async with known.locks.setdefault(provider.name, asyncio.Lock()):
                    login = await self._ask(provider, registry, repository, refused)
            except Unavailable as error:
                failure = error
                continue
            if login is not None and login not in refused:
                return login
        if failure is not None:
            raise failure
        return None

    def _read(self, known: _Known | None) -> _Known:
        try:
            status = self._config.stat()
        except OSError as error:
            raise InvalidConfig(f"{self._config}: {error.strerror} (kubelet_credential_config)") from error
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if known is not None and known.stamp == stamp:
            return known
        return _Known(stamp, read_providers(self._config))

    def _took(self, known: _Known) -> _Known:
        if self._known is not None and self._known.stamp == known.stamp:
            return self._known  # another question has read it meanwhile: its locks count
        self._answers.clear()
        self._known = known
        for one in known.providers:
            if one.wants_token:
                self._tell("credential provider passed over: it wants a service account's token", provider=one.name)
        return known

    async def _ask(self, provider: Provider, registry: str, repository: str, refused: Refused) -> Login | None:
        kept = self._kept(provider, registry, repository)
        if kept is not None:
            login = best_for(kept.provided.logins, registry, repository)
            if login not in refused or self._clock() - kept.since < REFUSED_PAUSE_SECONDS:
                return login
        async with self._running:
            provided = await self._run(provider, registry, repository)
        self._keep(provider, registry, repository, provided)
        return best_for(provided.logins, registry, repository)

    def _kept(self, provider: Provider, registry: str, repository: str) -> _Answer | None:
        for key in _keys(provider, registry, repository).values():
            answer = self._answers.get(key)
            if answer is not None and answer.until > self._clock():
                self._answers.move_to_end(key)
                return answer
        return None

    def _keep(self, provider: Provider, registry: str, repository: str, provided: Provided) -> None:
        keys = _keys(provider, registry, repository)
        for key in keys.values():
            self._answers.pop(key, None)
        seconds = provider.default_duration if provided.seconds is None else provided.seconds
        now = self._clock()
        self._answers[keys[provided.holds_for]] = _Answer(provided, now, now + seconds)
        while len(self._answers) > ANSWERS_MAX:
            self._answers.popitem(last=False)

    async def _run(self, provider: Provider, registry: str, repository: str) -> Provided:
        where = f"kubelet credential provider {provider.name}"
        words = [str(self._folder / provider.name), *provider.arguments]
        limits = Limits(PLUGIN_SECONDS_MAX, PLUGIN_ANSWER_BYTES_MAX)
        environment = {**os.environ, **dict(provider.environment)}
        try:
            code, said = await run(words, request_for(provider, registry, repository), limits, environment)
            if code != 0:
                raise ProgramError(f"exit code {code}")
            return parse_answer(said, provider)
        except (ProgramError, ValueError) as error:
            raise Unavailable(f"{where}: {error}") from error


def _keys(provider: Provider, registry: str, repository: str) -> dict[str, tuple[str, str, str]]:
    """Under what an answer may be kept, by what it holds for."""
    return {
        "Image": (provider.name, "Image", f"{registry}/{repository}"),
        "Registry": (provider.name, "Registry", registry),
        "Global": (provider.name, "Global", ""),
    }
