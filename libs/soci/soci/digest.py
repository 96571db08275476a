# SPDX-License-Identifier: Apache-2.0
"""OCI digests: ``algorithm:hex`` (image-spec, descriptor.md "Digests")."""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from soci.errors import InvalidDigest

Digest = NewType("Digest", str)
"""A checked digest text, ``sha256:`` + 64 or ``sha512:`` + 128 lower-case hex digits."""

_FORM = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def parse_digest(text: str) -> Digest:
    """Check ``text`` and return it as a `Digest`; `InvalidDigest` says what was given (at most 100 characters)."""
    if not isinstance(text, str) or not _FORM.fullmatch(text):
        raise InvalidDigest(f"not a sha256 or sha512 digest: {str(text)[:100]!r}")
    return Digest(text)


def sha256_digest(content: bytes | memoryview) -> Digest:
    """The sha256 digest of ``content``."""
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


def hex_of(digest: Digest) -> str:
    """The hex half of a digest: safe as a file name."""
    return digest.partition(":")[2]


def new_hash(digest: Digest) -> hashlib._Hash:
    """A hash object of the digest's own algorithm, to check content against it."""
    return hashlib.new(digest.partition(":")[0])
