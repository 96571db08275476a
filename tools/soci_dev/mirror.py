# SPDX-License-Identifier: Apache-2.0
"""Which Debian mirror this machine uses, read from its own apt sources (sources.list(5)), both forms."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from soci.errors import NotFound

APT: Final = Path("/etc/apt")
_MIRROR_FILE: Final = "mirror+file:"  # a URI of this form names a file of mirrors, the best first


def find_mirror(suite: str, apt: Path = APT) -> str:
    """The URI from which this machine gets Debian's ``suite``; ``SOCIABLE_DEBIAN_MIRROR`` overrides. `NotFound`."""
    chosen = os.environ.get("SOCIABLE_DEBIAN_MIRROR")
    if chosen:
        return chosen
    debian = ""
    for uri, suites in _sources(apt):
        if suite in suites:
            return _resolved(uri)
        if uri.rstrip("/").endswith("/debian"):
            debian = debian or uri  # another release of Debian: its mirror has ours too
    if debian:
        return _resolved(debian)
    raise NotFound(f"no apt source of this machine has Debian's {suite}: set SOCIABLE_DEBIAN_MIRROR to a mirror's URI")


def _sources(apt: Path) -> Iterator[tuple[str, list[str]]]:
    parts = apt / "sources.list.d"
    files = [apt / "sources.list", *(sorted(parts.iterdir()) if parts.is_dir() else [])]
    for file in files:
        if file.is_file() and file.suffix == ".list":
            yield from parse_one_line(file.read_text())
        elif file.is_file() and file.suffix == ".sources":
            yield from parse_deb822(file.read_text())


def parse_one_line(text: str) -> Iterator[tuple[str, list[str]]]:
    """``deb [options] URI suite component…``: (URI, [suite])."""
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", " ", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield words[1], [words[2]]


def parse_deb822(text: str) -> Iterator[tuple[str, list[str]]]:
    """Stanzas of fields, continued by indented lines: (URI, suites) for each URI of an enabled ``deb`` stanza."""
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#"))):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line[:1] in " \t" and last:
                fields[last] += " " + line.strip()
                continue
            name, colon, value = line.partition(":")
            if colon:
                last = name.strip().lower()
                fields[last] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in {"no", "false"}:
            for uri in fields.get("uris", "").split():
                yield uri, fields.get("suites", "").split()


def _resolved(uri: str) -> str:
    if not uri.startswith(_MIRROR_FILE):
        return uri
    lines = Path(uri.removeprefix(_MIRROR_FILE)).read_text().splitlines()
    first = next((line.split()[0] for line in lines if line.strip() and not line.startswith("#")), "")
    if not first:
        raise NotFound(f"{uri} names no mirror")
    return first
