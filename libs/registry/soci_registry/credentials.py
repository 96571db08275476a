# SPDX-License-Identifier: Apache-2.0
"""Where user names and secrets come from: Docker's config.json with its credential helpers, or a fixed login."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from soci.errors import InvalidConfig, Unauthorized, Unavailable
from soci_registry.health import Tell, silent
from soci_registry.programs import Limits, ProgramError, run
from soci_registry.urls import DOCKER_HUB

HUB_KEY = "https://index.docker.io/v1/"
"""Docker's historic name for its hub in config.json and for helpers."""

CONFIG_BYTES_MAX = 4 * 1024 * 1024
HELPER_SECONDS_MAX = 10.0
HELPER_ANSWER_BYTES_MAX = 64 * 1024
HELPERS_AT_ONCE = 4

_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_NOT_FOUND = b"credentials not found"  # what docker-credential-* say on stdout when they have none
_TOKEN_USER = "<token>"  # noqa: S105 - the user name by which helpers mark an identity token


@dataclass(frozen=True, slots=True)
class Login:
    """A user name and secret. An empty ``username`` means that ``secret`` is an identity (refresh) token."""

    username: str
    secret: str = field(repr=False)


Refused = Collection[Login]
NONE_REFUSED: Refused = ()


class Credentials(Protocol):
    """Where a `Registry` asks for logins, at each challenge anew."""

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The login for a repository of a registry (``host`` or ``host:port``), or None. An error stops the search.

        ``refused`` are logins that this registry has just refused: a source that remembers logins must forget these.
        `Unavailable` says that the source is away, which does not mean that it has none.
        """


class NoCredentials:
    """Anonymous access."""

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """Always None."""
        del registry, repository, refused
        return None


@dataclass(frozen=True, slots=True)
class FixedLogin:
    """One login, for one registry or (None) for each: what ``--user`` means on a command line."""

    login: Login
    registry: str | None = None

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The login, if it is meant for ``registry``."""
        del repository, refused
        return self.login if self.registry in {None, registry} else None


class FirstOf:
    """Several sources; the first that knows a login wins.

    A source whose login was refused is passed over: the next may have a newer one. So is one that is away
    (`Unavailable`), of which ``tell`` hears when it begins and when it is over.
    """

    def __init__(self, sources: Sequence[Credentials], tell: Tell = silent) -> None:
        self._sources = tuple(sources)
        self._tell = tell
        self._away: set[int] = set()

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The first login found that is not among the ``refused``."""
        for number, source in enumerate(self._sources):
            try:
                login = await source.find(registry, repository, refused)
            except Unavailable as error:
                if number not in self._away:
                    self._tell("source of logins away", source=type(source).__name__, error=str(error))
                self._away.add(number)
                continue
            if number in self._away:
                self._away.discard(number)
                self._tell("source of logins back", source=type(source).__name__)
            if login is not None and login not in refused:
                return login
        return None


class DockerConfig:
    """``config.json`` of ``directory``, else of ``$DOCKER_CONFIG``, else of ``~/.docker``; read anew at each query.

    For a registry its own helper (``credHelpers``) is asked, else the common one (``credsStore``), then ``auths``.
    No file means no login; a file or helper that cannot be used is an error (`InvalidConfig`, `Unauthorized`).
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._helpers = asyncio.Semaphore(HELPERS_AT_ONCE)

    @property
    def path(self) -> Path:
        """The file that a query would read now."""
        if self._directory is not None:
            return self._directory / "config.json"
        configured = os.environ.get("DOCKER_CONFIG")
        return (Path(configured) if configured else Path(os.environ.get("HOME", "/root"), ".docker")) / "config.json"

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The login for ``registry``."""
        del repository, refused  # nothing is kept between two questions
        path = self.path
        content = await asyncio.to_thread(_read, path)
        if content is None:
            return None
        config = _parse(content, path)
        helper = helper_for(config, registry)
        if helper is not None:
            if not _HELPER_NAME.fullmatch(helper):
                raise InvalidConfig(f"{path}: not a credential helper's name: {helper[:100]!r}")
            key = HUB_KEY if registry in DOCKER_HUB else registry
            async with self._helpers:
                login = await ask_helper(f"docker-credential-{helper}", key)
            if login is not None:
                return login
        try:
            return login_from_auths(config, registry)
        except ValueError as error:
            raise InvalidConfig(f"{path}: auths of {registry}: {error}") from None


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from error
    if len(content) > CONFIG_BYTES_MAX:
        raise InvalidConfig(f"{path}: more than {CONFIG_BYTES_MAX} bytes")
    return content


def _parse(content: bytes, path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        config = None  # a JSON error's text may quote a secret
    if not isinstance(config, dict):
        raise InvalidConfig(f"{path}: not a JSON object")
    return config


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def names_of(registry: str) -> tuple[str, ...]:
    """The keys under which a registry may stand in config.json, best first."""
    if registry in DOCKER_HUB:
        return (HUB_KEY, "index.docker.io", "docker.io", "registry-1.docker.io")
    return (registry, f"https://{registry}", f"http://{registry}")


def helper_for(config: Mapping[str, Any], registry: str) -> str | None:
    """The suffix of the credential helper that config.json names for ``registry``."""
    helpers = _object(config, "credHelpers")
    for name in names_of(registry):
        if isinstance(helper := helpers.get(name), str) and helper:
            return helper
    store = config.get("credsStore")
    return store if isinstance(store, str) and store else None


def login_from_auths(config: Mapping[str, Any], registry: str) -> Login | None:
    """The login in the ``auths`` of a config.json; `ValueError` (without the secret) for an unreadable one."""
    auths = _object(config, "auths")
    exact = [auths[name] for name in names_of(registry) if name in auths]
    by_host = [entry for key, entry in auths.items() if _host_of(key) in names_of(registry)]
    for entry in (*exact, *by_host):
        if isinstance(entry, dict) and (login := login_of_entry(entry)) is not None:
            return login
    return None


def _host_of(key: str) -> str:
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]


def login_of_entry(entry: Mapping[str, Any]) -> Login | None:
    """The login of one entry of ``auths``, if any; `ValueError`, without the secret, where it is unreadable."""
    token, auth = entry.get("identitytoken"), entry.get("auth")
    if isinstance(token, str) and token:
        return Login("", token)
    if isinstance(auth, str) and auth:
        try:
            plain = base64.b64decode(auth, validate=True).decode()
        except (binascii.Error, ValueError):
            raise ValueError("not base64") from None
        username, colon, secret = plain.partition(":")
        if not colon:
            raise ValueError("no colon between user and secret")
        return Login(username, secret.strip("\0"))
    name, password = entry.get("username"), entry.get("password")
    if isinstance(name, str) and isinstance(password, str) and name and password:
        return Login(name, password)
    return None


async def ask_helper(program: str, key: str) -> Login | None:
    """Run ``<program> get`` with ``key`` on stdin (Docker's credential helper protocol); None where it has none.

    `Unauthorized` where it fails, takes more than `HELPER_SECONDS_MAX` or says more than `HELPER_ANSWER_BYTES_MAX`.
    """
    how = f"try: echo {key} | {program} get"
    try:
        code, answer = await run([program, "get"], key.encode(), Limits(HELPER_SECONDS_MAX, HELPER_ANSWER_BYTES_MAX))
    except ProgramError as error:
        raise Unauthorized(f"credential helper {program}: {error}; {how}") from error
    if code != 0:
        if _NOT_FOUND in answer.lower():
            return None
        raise Unauthorized(f"credential helper {program}: exit code {code}; {how}")
    return _helper_login(answer, program)


def _helper_login(answer: bytes, program: str) -> Login | None:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unauthorized(f"credential helper {program}: not a JSON object")
    username, secret = found.get("Username"), found.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        return None
    return Login("" if username == _TOKEN_USER else username, secret)
