# SPDX-License-Identifier: Apache-2.0
"""How peers know one another: a secret that all nodes share, proven by HMAC-SHA-256 and never sent. Pure but for the
reading of its file.

A request is signed with all that matters of it: whom it is to, when it was made, and a nonce that is good once. The
answer needs no proof: spans are checked by their digests.
"""

from __future__ import annotations

import hmac
import secrets
import stat
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soci.errors import InvalidConfig, LimitExceeded, Unauthorized
from soci_bus.notices import PeerTold

SECRET_LEAST = 32
SECRET_MOST = 4096
"""Bytes of the secret, without white space around it."""
WINDOW = 30.0
"""Seconds that two nodes' clocks may differ, the way of a message included."""
NONCES_MAX = 1 << 17
"""Nonces of good requests that are remembered, each until it is too old anyway."""
FIELD_MAX = 1024
"""Characters of one header of a request."""

_NAMES = {
    "node": "Soci-Node",
    "to": "Soci-To",
    "at": "Soci-Time",
    "nonce": "Soci-Nonce",
    "image": "Soci-Image",
    "ztoc_size": "Soci-Ztoc-Size",
    "why": "Soci-Why",
}
MAC = "Soci-Mac"


def read_secret(path: str) -> bytes:
    """The secret in a file that nobody but its owner and group may read; `InvalidConfig` says what is wrong with it."""
    file = Path(path)
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > SECRET_MOST:
            raise InvalidConfig(f"peer_secret_file {path} is no file of at most {SECRET_MOST} bytes")
        if found.st_mode & 0o027:
            raise InvalidConfig(f"peer_secret_file {path} is open to others: chmod 600 it")
        secret = file.read_bytes().strip()
    except OSError as error:
        raise InvalidConfig(f"peer_secret_file {path}: {error.strerror or error}") from error
    if len(secret) < SECRET_LEAST:
        raise InvalidConfig(f"peer_secret_file {path} holds {len(secret)} bytes; at least {SECRET_LEAST} are needed")
    return secret


def _mac(secret: bytes, purpose: str, *fields: str) -> str:
    key = hmac.digest(secret, purpose.encode(), "sha256")  # one for each purpose: none can stand for the other
    told = [field.encode("utf-8", "surrogatepass") for field in fields]
    return hmac.digest(key, b"".join(len(one).to_bytes(4, "big") + one for one in told), "sha256").hex()


def _same(mac: str, other: str) -> bool:
    return hmac.compare_digest(mac.encode("utf-8", "surrogatepass"), other.encode())


def sign_notice(secret: bytes, notice: PeerTold) -> str:
    """The ``mac`` of a notice."""
    fields = (notice.node, notice.url, notice.start, str(notice.version), str(notice.number))
    more = (repr(notice.every), repr(notice.at), str(notice.leaving))
    return _mac(secret, "sociable notice of a peer, 1", *fields, *more)


def is_proven(secret: bytes, notice: PeerTold, now: float) -> bool:
    """Was it made lately by one who knows the secret? ``now`` is in seconds since 1970."""
    return abs(notice.at - now) <= WINDOW and _same(notice.mac, sign_notice(secret, notice))


@dataclass(frozen=True, slots=True)
class Asked:
    """What is signed of a request. ``to`` is the ``start`` of the process that is asked."""

    method: str
    path: str
    node: str
    to: str
    at: str  # seconds since 1970, as a decimal
    nonce: str
    image: str
    ztoc_size: str
    why: str

    def headers(self, secret: bytes) -> dict[str, str]:
        """The request's headers, its proof with them."""
        return {name: getattr(self, field) for field, name in _NAMES.items()} | {MAC: self.mac(secret)}

    def mac(self, secret: bytes) -> str:
        """The proof."""
        fields = (self.method, self.path, self.node, self.to, self.at, self.nonce)
        return _mac(secret, "sociable request of a peer, 1", *fields, self.image, self.ztoc_size, self.why)


def new_nonce() -> str:
    """A nonce that was never used."""
    return secrets.token_hex(16)


class Guard:
    """Lets requests in that are proven, for this process, of now, and new."""

    def __init__(self, secret: bytes, start: str) -> None:
        self._secret = secret
        self._start = start
        self._nonces: OrderedDict[tuple[str, str], float] = OrderedDict()

    def admit(self, method: str, path: str, headers: Mapping[str, str], now: float) -> Asked:
        """The request, once all of it holds; `Unauthorized` says what does not, `LimitExceeded` that too many came."""
        found = {field: headers.get(name, "") for field, name in _NAMES.items()}
        asked = Asked(method, path, **found)
        if any(len(text) > FIELD_MAX for text in (path, *found.values())):
            raise Unauthorized("a header is too long")
        # The proof first: what it does not cover says nothing, and only who knows the secret fills the book.
        if not _same(headers.get(MAC, "")[:FIELD_MAX], asked.mac(self._secret)):
            raise Unauthorized("not signed with the secret of this cluster")
        if asked.to != self._start:
            raise Unauthorized("meant for another process")
        try:
            at = float(asked.at)
        except ValueError:
            raise Unauthorized("no time") from None
        if not abs(at - now) <= WINDOW:
            raise Unauthorized(f"made {now - at:.0f} s ago by its clock: the nodes' clocks differ, or it is a replay")
        self._enter((asked.node, asked.nonce), at + WINDOW, now)
        return asked

    def _enter(self, nonce: tuple[str, str], until: float, now: float) -> None:
        while self._nonces and next(iter(self._nonces.values())) < now:  # it would be too old by now
            self._nonces.popitem(last=False)
        if nonce in self._nonces:
            raise Unauthorized("a replay")
        if len(self._nonces) >= NONCES_MAX:
            raise LimitExceeded(f"more than {NONCES_MAX} requests in {2 * WINDOW:.0f} s")
        self._nonces[nonce] = until
