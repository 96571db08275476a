# SPDX-License-Identifier: Apache-2.0
"""Logins out of Kubernetes' secrets of type ``kubernetes.io/dockerconfigjson``: parsed, bounded, found again.

What is kept are logins alone; the rest of a secret is forgotten at once.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping
from typing import Any

from soci_registry.credentials import Login, login_of_entry
from soci_registry.documents import table, text
from soci_registry.matching import best_for

SECRET_TYPE = "kubernetes.io/dockerconfigjson"  # noqa: S105 - the name of a kind of secrets
SECRET_KEY = ".dockerconfigjson"  # noqa: S105

SECRETS_MAX = 4096
"""Secrets whose logins are kept; more are passed over, and that is told."""
ENTRIES_MAX = 256
"""Registries in one secret."""
KEPT_BYTES_MAX = 16 * 1024 * 1024
"""Of all logins together."""

Name = tuple[str, str]  # namespace, name
Entries = tuple[tuple[str, Login], ...]


def parse_secret(secret: Mapping[str, Any]) -> tuple[Name, str, Entries]:
    """(namespace and name, resource version, logins by registry); `ValueError`, without content, for a bad secret."""
    meta = table(secret.get("metadata"))
    name = (text(meta.get("namespace")), text(meta.get("name")))
    if secret.get("type") != SECRET_TYPE:
        raise ValueError("another type of secret")
    try:
        plain = base64.b64decode(text(table(secret.get("data")).get(SECRET_KEY)), validate=True)
        auths = table(json.loads(plain)).get("auths")
    except (binascii.Error, ValueError, RecursionError):
        raise ValueError(f"{SECRET_KEY} is not base64 of JSON") from None
    if not isinstance(auths, dict) or len(auths) > ENTRIES_MAX:
        raise ValueError(f"auths is not an object of up to {ENTRIES_MAX} registries")
    entries = []
    for registry, entry in auths.items():
        try:
            login = login_of_entry(table(entry))
        except ValueError as error:
            raise ValueError(f"auths: {error}") from None
        if login is not None:
            entries.append((registry, login))
    return name, text(meta.get("resourceVersion")), tuple(entries)


class SecretBook:
    """The logins of all secrets, within bounds."""

    def __init__(self) -> None:
        self._all: dict[Name, Entries] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._all)

    def put(self, name: Name, entries: Entries) -> bool:
        """Take a secret's logins in place of its older ones; False where there is no room."""
        self.remove(name)
        size = _size(name, entries)
        if len(self._all) >= SECRETS_MAX or self._bytes + size > KEPT_BYTES_MAX:
            return False
        self._all[name] = entries
        self._bytes += size
        return True

    def remove(self, name: Name) -> None:
        """Forget a secret."""
        entries = self._all.pop(name, None)
        if entries is not None:
            self._bytes -= _size(name, entries)

    def find(self, registry: str, repository: str, refused: Collection[Login]) -> Login | None:
        """The login that fits best; of those that fit as well, that of the first secret by namespace and name."""
        entries = (pair for name in sorted(self._all) for pair in self._all[name] if pair[1] not in refused)
        return best_for(entries, registry, repository)


def _size(name: Name, entries: Entries) -> int:
    logins = sum(len(registry) + len(login.username) + len(login.secret) for registry, login in entries)
    return len(name[0]) + len(name[1]) + logins
