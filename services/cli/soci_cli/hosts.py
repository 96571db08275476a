# SPDX-License-Identifier: Apache-2.0
"""The hosts of a registry as a command line says: ``--hosts-dir``, and certificates that are not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from soci_registry import HostBook
from soci_registry.manner import PLAIN, Trust
from soci_registry.route import Host
from soci_registry.urls import base_url

SEPARATORS: Final = ",:"
"""Between folders in one word: nerdctl writes commas, containerd's own setting colons."""


class CommandHosts(HostBook):
    """What `HostBook` finds in ``folders``; with ``skip_verify`` no host's certificate is looked at."""

    def __init__(self, folders: Sequence[str], plain_http: frozenset[str], *, skip_verify: bool) -> None:
        super().__init__(folders=split_folders(folders), plain_http=plain_http)
        self._plain = plain_http
        self._skip_verify = skip_verify

    def hosts(self, registry: str) -> tuple[Host, ...]:
        """As `HostBook.hosts`."""
        found = super().hosts(registry)
        if not self._skip_verify:
            return found
        return tuple(map(trusting, found or (Host(base_url(registry, self._plain)),)))


def split_folders(words: Sequence[str]) -> tuple[Path, ...]:
    """The folders that are named in ``words``, in their order."""
    for separator in SEPARATORS:
        words = [part for word in words for part in word.split(separator)]
    return tuple(Path(word) for word in words if word)


def trusting(host: Host) -> Host:
    """The host, with any certificate."""
    manner = host.manner or PLAIN
    return replace(host, manner=replace(manner, trust=replace(manner.trust or Trust(), skip_verify=True)))
