# SPDX-License-Identifier: Apache-2.0
"""Every error that Sociable raises on purpose, in one tree.

    SociError
    ├── InvalidInput            bytes or words from outside that break their format
    │   ├── InvalidDigest
    │   ├── InvalidReference
    │   ├── InvalidManifest     OCI manifest, image index, SOCI index
    │   ├── InvalidTar
    │   ├── InvalidGzip
    │   ├── InvalidZtoc
    │   ├── InvalidConfig
    │   └── InvalidMessage      a bus message that does not parse
    ├── Mismatch                content that is not what its digest promised
    ├── NotFound
    │   ├── NoIndex             the image has no usable SOCI index
    │   └── NoZtoc              the index has no zTOC for this layer
    ├── AlreadyExists
    ├── FailedPrecondition      the call is valid, but not in this state
    ├── Unsupported             valid, but nothing here can do it
    ├── Unavailable             the other side is away; a later try may succeed
    │   ├── RegistryUnavailable
    │   ├── BusUnavailable
    │   └── DeadlineExceeded
    ├── Unauthorized            the registry wants other credentials
    └── LimitExceeded           a named limit was crossed

Foreign exceptions are translated once, at the border of the library that meets them, with ``raise … from``.
Each class has a ``code``: the word by which it crosses the bus (`soci_bus`) and comes out as the same class.
"""

from __future__ import annotations

from typing import ClassVar


class SociError(Exception):
    """The root. ``str(error)`` names the thing and, where there is one, the way out."""

    code: ClassVar[str] = "error"


class InvalidInput(SociError):
    """Bytes or words from outside that break their format."""

    code = "invalid-input"


class InvalidDigest(InvalidInput):
    """Not an OCI digest that we can check (sha256 or sha512)."""

    code = "invalid-digest"


class InvalidReference(InvalidInput):
    """Not an image reference."""

    code = "invalid-reference"


class InvalidManifest(InvalidInput):
    """Not an OCI or Docker manifest, image index or SOCI index."""

    code = "invalid-manifest"


class InvalidTar(InvalidInput):
    """A tar stream that breaks the rules of spec/ztoc.md §4."""

    code = "invalid-tar"


class InvalidGzip(InvalidInput):
    """A gzip stream that does not inflate, or is cut short."""

    code = "invalid-gzip"


class InvalidZtoc(InvalidInput):
    """A zTOC that does not parse, contradicts itself or cannot be mounted."""

    code = "invalid-ztoc"


class InvalidConfig(InvalidInput):
    """A configuration file or flag with a value that cannot be used."""

    code = "invalid-config"


class InvalidMessage(InvalidInput):
    """A bus message that does not parse as the type its subject promises."""

    code = "invalid-message"


class Mismatch(SociError):
    """Content that is not what its digest, size or diff_id promised. Such bytes are never kept."""

    code = "mismatch"


class NotFound(SociError):
    """The named thing is not there."""

    code = "not-found"


class NoIndex(NotFound):
    """The image has no usable SOCI index."""

    code = "no-index"


class NoZtoc(NotFound):
    """The SOCI index has no zTOC for this layer."""

    code = "no-ztoc"


class AlreadyExists(SociError):
    """The named thing is there already."""

    code = "already-exists"


class FailedPrecondition(SociError):
    """The call is valid, but not in this state."""

    code = "failed-precondition"


class Unsupported(SociError):
    """Valid, but nothing here can do it."""

    code = "unsupported"


class Unavailable(SociError):
    """The other side is away; a later try may succeed."""

    code = "unavailable"


class RegistryUnavailable(Unavailable):
    """The registry does not answer, or answers with errors, after every allowed try."""

    code = "registry-unavailable"


class BusUnavailable(Unavailable):
    """NATS is away, or nobody serves the ask."""

    code = "bus-unavailable"


class DeadlineExceeded(Unavailable):
    """The time that the caller gave is over."""

    code = "deadline-exceeded"


class Unauthorized(SociError):
    """The registry refuses the credentials that we have, or the lack of them."""

    code = "unauthorized"


class LimitExceeded(SociError):
    """A named limit was crossed; the message names it and its setting."""

    code = "limit-exceeded"


def _tree(cls: type[SociError]) -> dict[str, type[SociError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[SociError]] = _tree(SociError)


def from_code(code: str, message: str) -> SociError:
    """The error a peer meant. An unknown code becomes a plain `SociError` that says so."""
    cls = BY_CODE.get(code)
    return cls(message) if cls else SociError(f"{message} (unknown error code {code!r})")
