# SPDX-License-Identifier: Apache-2.0
"""What a registry tells of pushes, and which of them may be an image that wants an index. Pure.

The format is that of CNCF distribution's notifications: an envelope with ``events``, each of them with an ``action``,
a ``target`` and the ``request`` that caused it. Blobs (zTOCs and prefetch lists among them), deletions, pulls, image
indexes and the tags under which lists of referrers are kept are passed over. A manifest that is an image's by its type
may still be an artifact's, a SOCI index's for one: who builds looks at it first (`soci_indexer.build`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from soci.digest import Digest
from soci.errors import InvalidInput, InvalidManifest, InvalidReference
from soci.oci import MANIFEST_TYPES
from soci.oci_json import Fields, load
from soci.reference import parse_reference

CONTENT_TYPE: Final = "application/vnd.docker.distribution.events.v1+json"
MAX_BODY_BYTES: Final = 1 << 20
"""Bytes of one notification."""
MAX_EVENTS: Final = 256
"""Events of one notification; distribution sends one, others gather some."""

_REFERRERS_TAG: Final = re.compile(r"sha(256|512)-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Pushed:
    """A manifest that was pushed. ``image`` names it by digest, and by its tag where it has one."""

    image: str
    job_id: str  # the same for every notification of this manifest in this repository


@dataclass(frozen=True, slots=True)
class Notification:
    """What a notification holds: pushes to look at, each once, and how many events were passed over."""

    pushed: tuple[Pushed, ...]
    ignored: int


def parse_notification(body: bytes, registry: str = "") -> Notification:
    """Read a notification. ``registry`` is what images of this registry are called by, empty for its own word.

    Raises `InvalidInput` for what is no notification, and for a push whose image cannot be named.
    """
    try:
        events = load(body, "notification", MAX_BODY_BYTES).members("events", MAX_EVENTS)
        pushed = [_pushed(event, registry) for event in events]
    except InvalidManifest as error:
        raise InvalidInput(str(error)) from error
    wanted = {one.job_id: one for one in pushed if one is not None}
    return Notification(tuple(wanted.values()), pushed.count(None))


def _pushed(event: Fields, registry: str) -> Pushed | None:
    if event.text("action", "") != "push" or "target" not in event:
        return None
    target = event.member("target")
    tag = target.text("tag", "")
    if target.text("mediaType", "") not in MANIFEST_TYPES or _REFERRERS_TAG.fullmatch(tag):
        return None
    host = registry or (event.member("request").text("host", "") if "request" in event else "")
    if not host:
        raise InvalidInput("the notification does not say by which host its registry is reached: set webhook_registry")
    return _named(host, target.text("repository"), tag, target.digest("digest"))


def _named(host: str, repository: str, tag: str, digest: Digest) -> Pushed:
    try:
        found = parse_reference(f"{host}/{repository}{':' if tag else ''}{tag}@{digest}")
    except InvalidReference as error:
        raise InvalidInput(f"the notification names no image: {error}") from error
    if (found.registry, found.repository) != (host, repository):
        raise InvalidInput(f"{host[:60]!r} alone would be taken for part of a repository: set webhook_registry")
    key = hashlib.sha256(f"{found.name}@{digest}".encode()).hexdigest()
    return Pushed(str(found), f"push-{key[:32]}")
