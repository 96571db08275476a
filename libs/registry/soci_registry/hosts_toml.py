# SPDX-License-Identifier: Apache-2.0
"""containerd's ``hosts.toml``, read as values: which hosts stand for a registry, and how they want to be spoken to.

The format is containerd's (its document "Registry Configuration - Introduction"); what is said there of each key holds
here. Parsing touches nothing but the text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from soci.errors import InvalidConfig, InvalidReference
from soci_registry.manner import Manner, Trust
from soci_registry.route import CAPABILITIES, HOSTS_MAX, Host
from soci_registry.urls import base_url

KEYS = frozenset(
    {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
)  # of one host
HEADERS_MAX = 32
TIMEOUT_MAX = 3600.0
DURATION_LENGTH_MAX = 64

# What containerd knows beside what is of use here: such a key is passed over, any other one is a slip.
_PASSED_OVER = frozenset({"referrers"})
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,100}")
_HEADER_VALUE = re.compile(r"[\t !-~]{0,8192}")


def parse_hosts(text: str, folder: Path, registry_base: str) -> tuple[Host, ...]:
    """The hosts of a ``hosts.toml`` in ``folder``, in its order; the server, by default ``registry_base``, is the last.

    `InvalidConfig` names file and key. Files of certificates are named with their whole path, not opened.
    """
    where = str(folder / "hosts.toml")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidConfig(f"{where}: {error}") from error
    listed = document.get("host", {})
    if not isinstance(listed, Mapping) or len(listed) >= HOSTS_MAX:
        raise InvalidConfig(f"{where}: host is not a table of less than {HOSTS_MAX} hosts")
    hosts = [_host(url, table, folder, f'{where}: [host."{url}"]') for url, table in listed.items()]
    server = document.get("server", "") or registry_base
    own = {key: value for key, value in document.items() if key not in {"host", "server"}}
    return (*hosts, _host(server, own, folder, where))


def _host(url: object, table: object, folder: Path, where: str) -> Host:
    if not isinstance(url, str) or not isinstance(table, Mapping):
        raise InvalidConfig(f"{where}: not a host and its table")
    unknown = sorted(set(table) - KEYS - _PASSED_OVER)
    if unknown:
        raise InvalidConfig(f"{where}: {unknown[0]} is no key of a host; it has {', '.join(sorted(KEYS))}")
    base, path = parse_host_url(url, where, override=_flag(table, "override_path", where))
    named = _strings(table.get("capabilities", sorted(CAPABILITIES)), f"{where}: capabilities")
    strange = sorted(set(named) - CAPABILITIES - _PASSED_OVER)
    if strange:
        raise InvalidConfig(f"{where}: {strange[0]!r} is no capability; there are {', '.join(sorted(CAPABILITIES))}")
    return Host(base, path, frozenset(named) & CAPABILITIES, _manner(table, folder, where))


def parse_host_url(url: str, where: str, *, override: bool = False) -> tuple[str, str]:
    """(scheme and authority, path) of a host's URL; without a scheme it is https, or http for loopback."""
    text = url if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", url) else "//" + url
    try:
        parts = urlsplit(text)
        authority = parts.netloc
        base = base_url(authority)
    except (ValueError, InvalidReference):
        raise InvalidConfig(f"{where}: not a host's URL: {url[:100]!r}") from None
    if parts.scheme not in {"", "http", "https"} or parts.query or parts.fragment or "@" in authority:
        raise InvalidConfig(f"{where}: not a host's URL: {url[:100]!r}")
    if parts.scheme:
        # Docker Hub's registry has another name than its images say.
        base = f"{parts.scheme}://{base.partition('://')[2]}"
    path = str(PurePosixPath("/" + parts.path.strip("/"))) if parts.path.strip("/") else ""
    if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*", path) or ".." in path.split("/"):
        raise InvalidConfig(f"{where}: not a path of a URL: {path[:100]!r}")
    if not override and path.rpartition("/")[2] != "v2":
        path += "/v2"
    return base, path


def _manner(table: Mapping[str, Any], folder: Path, where: str) -> Manner | None:
    trust = Trust(
        tuple(str(folder / file) for file in _strings(table.get("ca", ()), f"{where}: ca")),
        _pairs(table.get("client", ()), folder, f"{where}: client"),
        _flag(table, "skip_verify", where),
    )
    timeout = table.get("dial_timeout")
    manner = Manner(
        headers=_headers(table.get("header", {}), f"{where}: header"),
        trust=None if trust == Trust() else trust,
        connect_timeout=None if timeout is None else parse_duration(timeout, f"{where}: dial_timeout"),
    )
    return None if manner == Manner() else manner


def parse_duration_text(value: str) -> float | None:
    """Seconds of a duration as Go writes it (``1m30s``); None for another text."""
    if len(value) > DURATION_LENGTH_MAX or not re.fullmatch(rf"(?:{_DURATION.pattern})+|0", value):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(value))


def parse_duration(value: object, where: str) -> float | None:
    """Seconds of a duration or of a number; None for zero, which means the default."""
    seconds = parse_duration_text(value) if isinstance(value, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    if seconds is None or not 0 <= seconds <= TIMEOUT_MAX:
        raise InvalidConfig(f"{where}: not a duration of up to {TIMEOUT_MAX:.0f} s, such as '3s'")
    return seconds or None


def _flag(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise InvalidConfig(f"{where}: {key} is neither true nor false")
    return value


def _strings(value: object, where: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not all(isinstance(one, str) for one in listed):
        raise InvalidConfig(f"{where}: neither a string nor a list of strings")
    return tuple(listed)


def _pairs(value: object, folder: Path, where: str) -> tuple[tuple[str, str], ...]:
    """One file, several files, or pairs of a certificate's and a key's."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence):
        raise InvalidConfig(f"{where}: neither a file nor a list of files")
    found = []
    for one in listed:
        files = _strings(one, where)
        if not 1 <= len(files) <= 2:
            raise InvalidConfig(f"{where}: a certificate's file and its key's are two, not {len(files)}")
        found.append((str(folder / files[0]), str(folder / files[1]) if len(files) > 1 and files[1] else ""))
    return tuple(found)


def _headers(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping) or len(value) > HEADERS_MAX:
        raise InvalidConfig(f"{where}: not a table of up to {HEADERS_MAX} headers")
    found = []
    for name, content in value.items():
        text = ", ".join(_strings(content, f"{where}: {name[:100]}"))
        # The value may be a secret: it is not shown.
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(text):
            raise InvalidConfig(f"{where}: {name[:100]!r} is no header, or its value cannot be one")
        found.append((name, text))
    return tuple(found)
