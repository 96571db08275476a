# SPDX-License-Identifier: Apache-2.0
"""Which entry of a list of logins is meant for a repository, by the rules of Kubernetes for images.

A pattern is ``host[:port][/path]``: each label of its host may hold globs (``*.example``), the port must be the same,
the path must begin the image's. A scheme in front is passed over, as are Docker's ``/v1/`` and ``/v2/`` behind.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TypeVar

from soci_registry.urls import DOCKER_HUB

PATTERN_LENGTH_MAX = 1024
PATTERNS_CACHED = 4096

HUB_NAME = "docker.io"

T = TypeVar("T")


def names_image(pattern: str, registry: str, repository: str) -> bool:
    """Whether ``pattern`` is for the repository."""
    parsed = _parse(pattern)
    if parsed is None:
        return False
    labels, port, path = parsed
    host, own_port = _authority(HUB_NAME if registry in DOCKER_HUB else registry)
    own = host.lower().split(".")
    if port != own_port or len(labels) != len(own):
        return False
    if not all(label.fullmatch(text) for label, text in zip(labels, own, strict=True)):
        return False
    return repository.startswith(path)


def best_for(entries: Iterable[tuple[str, T]], registry: str, repository: str) -> T | None:
    """The value whose pattern is for the repository; of several the most particular one: the last of the alphabet."""
    found = [(pattern, value) for pattern, value in entries if names_image(pattern, registry, repository)]
    return max(found, key=lambda pair: _rank(pair[0]))[1] if found else None


def _rank(pattern: str) -> tuple[int, int, str]:
    # A path says more than none, and a name says more than a glob.
    bare = _bare(pattern)
    return (len(bare.partition("/")[2]), -bare.count("*") - bare.count("?") - bare.count("["), bare)


def _bare(pattern: str) -> str:
    text = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", pattern)
    return re.sub(r"/v[12]/?$", "", text).rstrip("/")


@lru_cache(maxsize=PATTERNS_CACHED)
def _parse(pattern: str) -> tuple[tuple[re.Pattern[str], ...], str, str] | None:
    text = _bare(pattern)
    if not text or len(text) > PATTERN_LENGTH_MAX:
        return None
    authority, _, path = text.partition("/")
    if authority in DOCKER_HUB:
        authority = HUB_NAME
    host, port = _authority(authority)
    labels = host.lower().split(".")
    if "" in labels:
        return None
    return tuple(_glob(label) for label in labels), port, path


def _glob(label: str) -> re.Pattern[str]:
    if not any(sign in label for sign in "*?["):
        return re.compile(re.escape(label))
    # Several stars in a row mean what one does, and would cost much to match.
    return re.compile(fnmatch.translate(re.sub(r"\*+", "*", label)))


def _authority(text: str) -> tuple[str, str]:
    host, colon, port = text.rpartition(":")
    return (host, port) if colon and port.isdigit() else (text, "")
