# SPDX-License-Identifier: Apache-2.0
"""Image references: ``[registry/]repository[:tag][@digest]``, with Docker Hub's defaults.

The grammar is the OCI distribution world's: what comes before the first slash is a registry only if it could be no
repository's beginning, that is with a dot, a port, an upper-case letter, or as ``localhost``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from soci.digest import Digest, parse_digest
from soci.errors import InvalidDigest, InvalidReference

DEFAULT_REGISTRY: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
MAX_REPOSITORY: Final = 255
"""Characters of a repository (OCI distribution-spec, "Pulling manifests")."""
MAX_REGISTRY: Final = 255 + 6
"""Characters of a registry: a DNS name and a port."""
MAX_REFERENCE: Final = MAX_REGISTRY + MAX_REPOSITORY + 128 + 200  # with a tag and a digest

_OFFICIAL: Final = "library/"
_LEGACY_REGISTRY: Final = "index.docker.io"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_HEX_ID = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A complete reference. At least one of ``tag`` and ``digest`` is there; with both, the digest decides."""

    registry: str  # host or host:port; "docker.io" for Docker Hub, whatever host serves it
    repository: str
    tag: str | None
    digest: Digest | None = None

    def __str__(self) -> str:
        return self.name + self._suffix()

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def familiar(self) -> str:
        """The reference as people write it: without Docker Hub's defaults."""
        short = self.repository.removeprefix(_OFFICIAL)
        # "library/a/b" cannot lose its first component, nor "docker.io/localhost/a" its registry: the rest would be
        # another image's name.
        repository = self.repository if "/" in short else short
        if (self.registry, self.repository) != _complete(repository):
            return str(self)
        return repository + self._suffix()

    @property
    def target(self) -> str:
        """What to ask the registry's manifests for: the digest, or else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def with_digest(self, digest: Digest) -> Reference:
        """The same reference, pinned."""
        return replace(self, digest=digest)

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse_reference(text: str) -> Reference:
    """``text`` as a complete `Reference`; `InvalidReference` says what is wrong with it.

    Without a registry it is Docker Hub's, there without a slash ``library/``'s; without tag and digest the tag is
    ``latest``.
    """
    if len(text) > MAX_REFERENCE:
        raise InvalidReference(f"an image reference of {len(text):,} characters: {text[:60]!r}...")
    if "://" in text:
        _refuse(text, "leave out the scheme")
    rest, at, digest_text = text.partition("@")
    digest = _digest(text, digest_text) if at else None
    name, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        _refuse(text, f"{tag!r} is not a tag (up to 128 letters, digits, '_', '.' and '-')")
    registry, repository = _complete(name)
    _check_registry(text, registry)
    _check_repository(text, repository)
    if registry == DEFAULT_REGISTRY and _HEX_ID.fullmatch(repository.removeprefix(_OFFICIAL)):
        _refuse(text, "64 hex digits are an image id, not a repository; write repository@sha256:...")
    if tag is None and digest is None:
        tag = DEFAULT_TAG
    return Reference(registry, repository, tag, digest)


def _split_tag(rest: str) -> tuple[str, str | None]:
    before, colon, after = rest.rpartition(":")
    return (before, after) if colon and "/" not in after else (rest, None)


def _complete(name: str) -> tuple[str, str]:
    """Registry and repository of a name without tag and digest, Docker Hub's defaults filled in."""
    first, slash, rest = name.partition("/")
    is_registry = "." in first or ":" in first or first == "localhost" or first != first.lower()
    registry, repository = (first, rest) if slash and is_registry else (DEFAULT_REGISTRY, name)
    if registry in (DEFAULT_REGISTRY, _LEGACY_REGISTRY):
        return DEFAULT_REGISTRY, repository if "/" in repository or not repository else _OFFICIAL + repository
    return registry, repository


def _check_registry(text: str, registry: str) -> None:
    if len(registry) > MAX_REGISTRY or not _REGISTRY.fullmatch(registry):
        _refuse(text, f"{registry[:60]!r} is not a registry (host or host:port)")


def _check_repository(text: str, repository: str) -> None:
    if not repository:
        _refuse(text, "the repository is missing")
    if len(repository) > MAX_REPOSITORY:
        _refuse(text, f"the repository is longer than {MAX_REPOSITORY} characters")
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            lower = component != component.lower() and _COMPONENT.fullmatch(component.lower())
            _refuse(
                text, f"{component[:60]!r} is not part of a repository" + (": write it in lower case" if lower else "")
            )


def _digest(text: str, digest: str) -> Digest:
    try:
        return parse_digest(digest)
    except InvalidDigest as error:
        raise InvalidReference(f"not an image reference: {_shown(text)}: {error}") from error


def _refuse(text: str, why: str) -> NoReturn:
    raise InvalidReference(f"not an image reference: {_shown(text)}: {why}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
