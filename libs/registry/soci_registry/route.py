# SPDX-License-Identifier: Apache-2.0
"""Where a repository's content can be had: its mirrors in their order, then the registry itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from soci.errors import InvalidConfig
from soci_registry.manner import Manner
from soci_registry.urls import DOCKER_HUB, Place

PULL = "pull"
RESOLVE = "resolve"
PUSH = "push"
CAPABILITIES = frozenset({PULL, RESOLVE, PUSH})

HUB_NAME = "docker.io"
HOSTS_MAX = 32
"""Hosts of one registry: a request may try them all."""


@dataclass(frozen=True, slots=True)
class Host:
    """One host that has content of a registry: ``base`` is scheme and authority, ``path`` what comes before names."""

    base: str
    path: str = "/v2"
    capabilities: frozenset[str] = CAPABILITIES
    manner: Manner | None = None

    @property
    def name(self) -> str:
        """``host[:port]``, under which its logins are looked for; Docker Hub's hosts are all ``docker.io``."""
        authority = self.base.partition("://")[2]
        return HUB_NAME if authority in DOCKER_HUB else authority

    def place(self, repository: str, registry: str) -> Place:
        """The repository of ``registry`` at this host, which is told whom it stands for where it is a mirror."""
        own = self.name == (HUB_NAME if registry in DOCKER_HUB else registry)
        query = "" if own else f"?ns={registry}"
        return Place(self.name, self.base, repository, self.path, query, self.manner)


@dataclass(frozen=True, slots=True)
class Route:
    """The places of one repository, in the order in which they are asked. The last one is the registry itself.

    ``pull`` serves content by its digest, ``resolve`` is trusted with what has none: tags, and lists of referrers.
    """

    own: Place
    pull: tuple[Place, ...] = field(default=())
    resolve: tuple[Place, ...] = field(default=())

    @classmethod
    def only(cls, place: Place) -> Route:
        """A repository without mirrors."""
        return cls(place, (place,), (place,))


def route_of(own: Place, hosts: tuple[Host, ...], repository: str, registry: str) -> Route:
    """The route over ``hosts``, the registry's own the last of them: pushes go there, or to ``own`` if it may not.

    `InvalidConfig` where no host may be asked for content.
    """
    pairs = [(host, host.place(repository, registry)) for host in hosts[:HOSTS_MAX]]
    pull = tuple(place for host, place in pairs if PULL in host.capabilities)
    resolve = tuple(place for host, place in pairs if RESOLVE in host.capabilities)
    if not pull or not resolve:
        raise InvalidConfig(f"{registry}: none of its hosts may be asked to {RESOLVE if pull else PULL}")
    return Route(pairs[-1][1] if PUSH in pairs[-1][0].capabilities else own, pull, resolve)
