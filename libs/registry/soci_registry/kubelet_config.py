# SPDX-License-Identifier: Apache-2.0
"""The kubelet's ``CredentialProviderConfig``, and what its plugins say, read as values.

Sources: the Kubernetes reference of kubelet.config.k8s.io/v1 and of credentialprovider.kubelet.k8s.io/v1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soci.errors import InvalidConfig
from soci_registry.credentials import Login
from soci_registry.documents import items, read_document, table, text
from soci_registry.hosts_toml import parse_duration_text
from soci_registry.matching import names_image

KIND = "CredentialProviderConfig"
CONFIG_VERSIONS = frozenset(f"kubelet.config.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))
PLUGIN_VERSIONS = frozenset(f"credentialprovider.kubelet.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))

PROVIDERS_MAX = 64
PATTERNS_MAX = 1024
LOGINS_MAX = 1024
CACHE_SECONDS_MAX = 366 * 86400.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_VARIABLE = re.compile(r"[^=\0]{1,255}")


@dataclass(frozen=True, slots=True)
class Provider:
    """One plugin. ``environment`` may hold secrets; ``default_duration`` are seconds."""

    name: str
    patterns: tuple[str, ...]
    version: str
    default_duration: float
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    wants_token: bool = False
    """It wants a service account's token, which only the kubelet can give."""

    def serves(self, registry: str, repository: str) -> bool:
        """Whether the plugin is meant for a repository."""
        return any(names_image(pattern, registry, repository) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Provided:
    """A plugin's answer: logins by pattern, for which other questions it holds, for how many seconds."""

    logins: tuple[tuple[str, Login], ...]
    holds_for: str
    """``Image``, ``Registry`` or ``Global``."""
    seconds: float | None
    """None: the provider's default."""


def read_providers(path: Path) -> tuple[Provider, ...]:
    """The plugins of a configuration file, in their order; `InvalidConfig` names file, plugin and key."""
    try:
        document = read_document(path)
    except FileNotFoundError as error:
        raise InvalidConfig(f"{path}: no such file (kubelet_credential_config)") from error
    if document.get("kind") != KIND or document.get("apiVersion") not in CONFIG_VERSIONS:
        raise InvalidConfig(f"{path}: not a {KIND} of kubelet.config.k8s.io/v1")
    listed = items(document.get("providers"))
    if not 0 < len(listed) <= PROVIDERS_MAX:
        raise InvalidConfig(f"{path}: providers is not a list of 1 to {PROVIDERS_MAX}")
    found = tuple(_provider(table(one), f"{path}: providers[{number}]") for number, one in enumerate(listed))
    if len({one.name for one in found}) != len(found):
        raise InvalidConfig(f"{path}: two providers have the same name")
    return found


def _provider(one: Mapping[str, Any], where: str) -> Provider:
    name = text(one.get("name"))
    if not _NAME.fullmatch(name):  # it becomes a path below the plugins' folder
        raise InvalidConfig(f"{where}: name {name[:100]!r} is no program's name")
    patterns = _texts(one.get("matchImages"), f"{where}: matchImages")
    if not 0 < len(patterns) <= PATTERNS_MAX:
        raise InvalidConfig(f"{where}: matchImages is not a list of 1 to {PATTERNS_MAX} patterns")
    version = text(one.get("apiVersion"))
    if version not in PLUGIN_VERSIONS:
        raise InvalidConfig(f"{where}: apiVersion {version[:100]!r} is none that plugins speak")
    seconds = parse_duration_text(text(one.get("defaultCacheDuration")))
    if seconds is None:
        raise InvalidConfig(f"{where}: defaultCacheDuration is not a duration such as '12h'")
    environment = []
    for pair in map(table, items(one.get("env"))):
        key, value = text(pair.get("name")), pair.get("value", "")
        if not _VARIABLE.fullmatch(key) or not isinstance(value, str) or "\0" in value:
            raise InvalidConfig(f"{where}: env: not a name and a value")
        environment.append((key, value))
    return Provider(
        name,
        patterns,
        version,
        min(seconds, CACHE_SECONDS_MAX),
        _texts(one.get("args"), f"{where}: args"),
        tuple(environment),
        wants_token=one.get("tokenAttributes") is not None,
    )


def _texts(value: object, where: str) -> tuple[str, ...]:
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(one, str) and "\0" not in one for one in listed):
        raise InvalidConfig(f"{where}: not a list of strings")
    return tuple(listed)


def request_for(provider: Provider, registry: str, repository: str) -> bytes:
    """What the plugin is asked, on its standard input."""
    asked = {
        "kind": "CredentialProviderRequest",
        "apiVersion": provider.version,
        "image": f"{registry}/{repository}" if repository else registry,
    }
    return json.dumps(asked).encode()


def parse_answer(content: bytes, provider: Provider) -> Provided:
    """What the plugin said; `ValueError`, without its words, where that is no answer."""
    try:
        found = table(json.loads(content))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if found.get("kind") != "CredentialProviderResponse" or found.get("apiVersion") != provider.version:
        raise ValueError(f"not a CredentialProviderResponse of {provider.version}")
    holds_for = found.get("cacheKeyType")
    if holds_for not in {"Image", "Registry", "Global"}:
        raise ValueError("cacheKeyType is none of Image, Registry, Global")
    seconds: float | None = None
    if (duration := found.get("cacheDuration")) is not None:
        seconds = parse_duration_text(text(duration))
        if seconds is None:
            raise ValueError("cacheDuration is no duration")
        seconds = min(seconds, CACHE_SECONDS_MAX)
    logins = []
    for pattern, entry in table(found.get("auth")).items():
        username, password = table(entry).get("username"), table(entry).get("password")
        if isinstance(username, str) and isinstance(password, str) and username and password:
            logins.append((pattern, Login(username, password)))
    if len(logins) > LOGINS_MAX:
        raise ValueError(f"more than {LOGINS_MAX} logins")
    return Provided(tuple(logins), str(holds_for), seconds if seconds is None or math.isfinite(seconds) else None)
