# SPDX-License-Identifier: Apache-2.0
"""Which hosts stand for a registry: the mirrors of the configuration, or the folders that containerd reads.

``[resolver.host]`` of the reference's configuration decides where it names the registry; else the first of containerd's
folders (``certs.d``) that has one for it, or a ``_default``. Nothing of both: the registry alone, and no file is read.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from soci.errors import InvalidConfig
from soci_registry.hosts_toml import parse_host_url, parse_hosts
from soci_registry.manner import Manner, Trust
from soci_registry.route import HOSTS_MAX, HUB_NAME, PULL, RESOLVE, Host
from soci_registry.urls import DOCKER_HUB, base_url

FRESH_SECONDS = 10.0
"""So long what was read for a registry is used again before the files are looked at anew."""

KNOWN_MAX = 256
"""Registries whose hosts are kept; the one unused for longest goes first."""

FILE_BYTES_MAX = 256 * 1024
CERTIFICATES_MAX = 64
"""Files of certificates in one folder."""

DEFAULT_FOLDER = "_default"


@dataclass(frozen=True, slots=True)
class Mirror:
    """One mirror of ``[resolver.host]``. ``request_timeout`` in seconds: 0 is the common one, infinity none."""

    host: str
    insecure: bool = False
    request_timeout: float = 0.0


def mirror_host(mirror: Mirror, registry: str) -> Host:
    """The host that a mirror of the configuration means: its authority and path count, its scheme does not.

    TLS unless it is ``insecure`` or a loopback host. Without a path it is ``/v2``.
    """
    where = f'[resolver.host."{registry}"] mirrors: host'
    base, path = parse_host_url(mirror.host, where, override=True)
    authority = base.partition("://")[2]
    base = f"http://{authority}" if mirror.insecure else base_url(authority)
    manner = Manner(total_timeout=mirror.request_timeout) if mirror.request_timeout else None
    return Host(base, path or "/v2", frozenset({PULL, RESOLVE}), manner)


def folder_names(registry: str) -> tuple[str, ...]:
    """The names under which a folder may stand for a registry, best first: a colon is not liked by all tools."""
    host, colon, port = registry.rpartition(":")
    if not colon or not port.isdigit():
        return (registry, DEFAULT_FOLDER)
    return (f"{host}_{port}_", registry, DEFAULT_FOLDER)


class HostBook:
    """The hosts of each registry; what is read from files is kept for `FRESH_SECONDS`."""

    def __init__(
        self,
        *,
        mirrors: Mapping[str, Sequence[Mirror]] | None = None,
        folders: Sequence[Path] = (),
        plain_http: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mirrors = {_canonical(name): tuple(found) for name, found in (mirrors or {}).items()}
        self._folders = tuple(folders)
        self._plain_http = plain_http
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, tuple[Host, ...]]] = OrderedDict()
        for name, found in self._mirrors.items():  # a slip is said at the start, not at the first pull
            if len(found) >= HOSTS_MAX:
                raise InvalidConfig(f'[resolver.host."{name}"] has {len(found)} mirrors, at most {HOSTS_MAX - 1}')
            for mirror in found:
                mirror_host(mirror, name)

    def hosts(self, registry: str) -> tuple[Host, ...]:
        """The hosts of ``registry`` in their order, its own the last; empty where nothing is configured for it.

        `InvalidConfig` where a file for it cannot be used.
        """
        if not self._mirrors and not self._folders:
            return ()
        registry = _canonical(registry)
        now = self._clock()
        known = self._known.get(registry)
        if known is None or known[0] <= now:
            known = self._known[registry] = (now + FRESH_SECONDS, self._read(registry))
            while len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(registry)
        return known[1]

    def _read(self, registry: str) -> tuple[Host, ...]:
        own = base_url(registry, self._plain_http)
        mirrors = self._mirrors.get(registry)
        if mirrors is not None:
            return (*(mirror_host(mirror, registry) for mirror in mirrors), Host(own))
        for folder in self._folders:
            for name in folder_names(registry):
                if (folder / name).is_dir():
                    return tuple(map(_stamped, _from_folder(folder / name, own)))
        return ()


def _canonical(registry: str) -> str:
    return HUB_NAME if registry in DOCKER_HUB else registry.lower()


def _from_folder(folder: Path, own: str) -> tuple[Host, ...]:
    try:
        with (folder / "hosts.toml").open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return _from_certificates(folder, own)
    except OSError as error:
        raise InvalidConfig(f"{folder / 'hosts.toml'}: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise InvalidConfig(f"{folder / 'hosts.toml'}: more than {FILE_BYTES_MAX} bytes")
    try:
        return parse_hosts(content.decode(), folder, own)
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{folder / 'hosts.toml'}: not UTF-8") from error


def _from_certificates(folder: Path, own: str) -> tuple[Host, ...]:
    """Docker's older use of the folder: ``*.crt`` are authorities, ``*.cert`` and ``*.key`` our certificates."""
    files = sorted(folder.iterdir())[:CERTIFICATES_MAX]
    authorities = tuple(str(file) for file in files if file.suffix == ".crt")
    pairs = tuple((str(file), str(file.with_suffix(".key"))) for file in files if file.suffix == ".cert")
    if not authorities and not pairs:
        return ()
    return (Host(own, manner=Manner(trust=Trust(authorities, pairs))),)


def _stamped(host: Host) -> Host:
    """The host with the times of its certificates' files in it, so that renewed ones are noticed."""
    if host.manner is None or host.manner.trust is None:
        return host
    trust = host.manner.trust
    files = [*trust.ca, *(file for pair in trust.client for file in pair if file)]
    stamp = []
    for file in files:
        try:
            stamp.append(Path(file).stat().st_mtime_ns)
        except OSError as error:
            raise InvalidConfig(f"{file}: {error.strerror} (a certificate of {host.base})") from error
    return replace(host, manner=replace(host.manner, trust=replace(trust, stamp=tuple(stamp))))
