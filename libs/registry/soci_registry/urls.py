# SPDX-License-Identifier: Apache-2.0
"""Addresses as values: where a registry lives, which targets are refused, how a URL is shown without its secrets."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from soci.errors import InvalidReference
from soci_registry.failure import Kind, TryError
from soci_registry.manner import Manner

DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
URL_LENGTH_MAX = 16 * 1024
"""Pre-signed URLs reach some KiB; a longer one is an attack or a mistake."""

ORIGINS_CACHED = 1024
"""URLs whose origin is kept: the ranges of a blob share one, and parsing it is a tenth of our time for a small one."""

_HOST = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_OLD_ADDRESS = re.compile(r"(?:0[xX][0-9A-Fa-f]*|[0-9]+)(?:\.(?:0[xX][0-9A-Fa-f]*|[0-9]+)){0,3}")
_USABLE = re.compile(r"[!-~]+")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """Who is spoken to: RFC 6454's triple. Credentials belong to one origin."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Access:
    """For what a token is asked: at which registry, for which scope (``repository:name:pull``)."""

    registry: str
    origin: Origin
    scope: str
    repository: str = ""
    manner: Manner | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Place:
    """One repository at one host: the registry itself, or a mirror of it.

    ``registry`` is the name under which the host's logins are looked for, ``base`` is scheme and authority. ``query``
    (``?ns=…``) tells a mirror of many registries which one is meant, as containerd does.
    """

    registry: str
    base: str
    repository: str
    path: str = "/v2"
    query: str = ""
    manner: Manner | None = None

    def url(self, kind: str, reference: str) -> str:
        """``<base><path>/<repository>/<kind>/<reference><query>``."""
        return f"{self.base}{self.path}/{self.repository}/{kind}/{reference}{self.query}"

    def access(self, actions: str = "pull") -> Access:
        """What a token for ``actions`` here is asked for."""
        scope = f"repository:{self.repository}:{actions}"
        return Access(self.registry, origin_of(self.base), scope, self.repository, self.manner)


def place_of(registry: str, repository: str, plain_http: Collection[str] = ()) -> Place:
    """The repository's place; `InvalidReference` where host or name could break out of a URL."""
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 255:
        raise InvalidReference(f"not a repository name: {repository[:100]!r}")
    return Place(registry, base_url(registry, plain_http), repository)


def base_url(registry: str, plain_http: Collection[str] = ()) -> str:
    """``https://host[:port]``, or ``http://`` for loopback hosts and those of ``plain_http``."""
    if registry in DOCKER_HUB:
        return "https://registry-1.docker.io"
    found = _HOST.fullmatch(registry)
    if not found or int(found["port"] or 0) > 65535:
        raise InvalidReference(f"not a registry host: {registry[:100]!r}")
    plain = registry in plain_http or found["name"] in plain_http or is_loopback(found["name"])
    return f"{'http' if plain else 'https'}://{registry}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` (no port, brackets allowed) names this machine: localhost, 127.0.0.0/8, [::1]."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def is_link_local(address: str) -> bool:
    """Whether an IP address text is link-local (169.254.0.0/16, fe80::/10), where clouds serve machine credentials."""
    found = _address(address)
    return found is not None and found.is_link_local


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    text = host.strip("[]").partition("%")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return _old_address(text)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        return found.ipv4_mapped
    return found


def _old_address(text: str) -> ipaddress.IPv4Address | None:
    """inet_aton(3)'s spellings (``0xa9fea9fe``, ``169.16689662``), which resolvers still take for addresses."""
    if not _OLD_ADDRESS.fullmatch(text):
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except OSError:
        return None


@lru_cache(maxsize=ORIGINS_CACHED)
def origin_of(url: str) -> Origin:
    """The origin of an absolute http or https URL; `TryError` where it is something else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise TryError(Kind.MALFORMED, "not a URL") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise TryError(Kind.MALFORMED, f"not an http or https URL: {redact(url)}")
    return Origin(parts.scheme, parts.hostname.lower(), port or _DEFAULT_PORTS[parts.scheme])


def redirect_target(current: str, location: str) -> str:
    """The absolute URL that a ``Location`` means; `TryError` where following it is refused.

    Refused: other schemes than http and https, link-local addresses, userinfo, texts that are no URL.
    """
    if len(location) > URL_LENGTH_MAX:
        raise TryError(Kind.REDIRECT, f"redirect of more than {URL_LENGTH_MAX} characters")
    try:
        target = urljoin(current, location).partition("#")[0]
        parts = urlsplit(target)
        usable = bool(_USABLE.fullmatch(target)) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise TryError(Kind.REDIRECT, "redirect to something that is not a URL")
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise TryError(Kind.REDIRECT, f"redirect to {redact(target)} refused: only http and https are followed")
    if is_link_local(parts.hostname):
        raise TryError(Kind.REDIRECT, f"redirect to {redact(target)} refused: a link-local address")
    if parts.username is not None or parts.password is not None:
        raise TryError(Kind.REDIRECT, f"redirect to {redact(target)} refused: it carries credentials")
    return target


def redact(url: str) -> str:
    """The URL as it may be shown: query values become ``redacted``, userinfo and fragment go."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "(unreadable URL)"
    shown = f"{parts.scheme}://{host}{parts.path}" if parts.scheme else f"{host}{parts.path}"
    if parts.query:
        shown += "?" + "&".join(_redact_pair(pair) for pair in parts.query.split("&"))
    # Control characters would let a server write lines of its own into our logs.
    return re.sub(r"[^!-~]", "?", shown)


def _redact_pair(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}=redacted" if equals else "redacted"


def next_link(value: str | None) -> str | None:
    """The target of the ``rel="next"`` link in a Link header (RFC 8288), or None."""
    for found in re.finditer(r'<([^<>]*)>((?:\s*;\s*[^;,<>"]+(?:"[^"]*")?)*)', value or ""):
        if re.search(r';\s*rel\s*=\s*(?:"(?:[^"]*\s)?next(?:\s[^"]*)?"|next(?=\s*(?:;|$)))', found[2], re.IGNORECASE):
            return found[1]
    return None
