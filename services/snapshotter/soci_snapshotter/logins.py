# SPDX-License-Identifier: Apache-2.0
"""The logins that came with PullImage: which is for which image, and which of them a registry is told.

In memory only, and only so many. A login is never logged, published or traced; no class here shows its secret.
"""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from soci.errors import InvalidReference
from soci.reference import DEFAULT_REGISTRY, Reference, parse_reference

MOST_IMAGES = 1024
"""Images whose login is remembered; the one that was pulled longest ago is forgotten first."""
MOST_BYTES = 64 << 10
"""Bytes of one login: tokens that carry many groups reach some tens of KiB."""
_HUB = frozenset({"index.docker.io", "registry-1.docker.io", DEFAULT_REGISTRY})


@dataclass(frozen=True, slots=True)
class Auth:
    """CRI's AuthConfig: one of the three ways, and the server it is meant for (empty: any)."""

    username: str = ""
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)

    @property
    def size(self) -> int:
        """Characters in all."""
        return sum(map(len, (self.username, self.password, self.auth, self.server_address, self.identity_token)))


@dataclass(frozen=True, slots=True)
class Login:
    """What a registry is told; without ``username`` the secret is an identity token."""

    username: str
    secret: str = field(repr=False)


def login_of(auth: Auth, registry: str) -> Login | None:
    """The login that ``auth`` means for ``registry``, None where it means none for it.

    containerd's order: user name and password, else identity token, else ``auth``, which is base64 of ``user:secret``.
    """
    if auth.server_address and not _same_server(auth.server_address, registry):
        return None
    if auth.username:
        return Login(auth.username, auth.password)
    if auth.identity_token:
        return Login("", auth.identity_token)
    if not auth.auth:
        return None
    try:
        username, colon, secret = base64.b64decode(auth.auth).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return Login(username, secret.strip("\0")) if colon and (username or secret) else None


def _same_server(address: str, registry: str) -> bool:
    """Whether a server's URL, or bare host, is the registry's. Docker Hub has three names."""
    server, wanted = _host(address), _host(registry)
    return server == wanted or {server, wanted} <= _HUB


def _host(address: str) -> str:
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        return ""
    return host if port in {None, {"https": 443, "http": 80}.get(parts.scheme)} else f"{host}:{port}"


@dataclass(slots=True)
class _Kept:
    auth: Auth
    image_id: str = ""


class Logins:
    """What is remembered, by complete image reference, the newest last."""

    def __init__(self, most: int = MOST_IMAGES) -> None:
        self._most = most
        self._kept: OrderedDict[Reference, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, image: str, auth: Auth) -> Pull | None:
        """A pull of ``image`` begins: from now on its login counts. None where there is nothing to remember."""
        try:
            reference = parse_reference(image)
        except InvalidReference:
            return None  # an image id, or what the image service will refuse
        if auth == Auth() or auth.size > MOST_BYTES:
            return None
        pull = Pull(self._kept, reference, self._kept.get(reference), _Kept(auth))
        self._kept[reference] = pull.now
        self._kept.move_to_end(reference)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return pull

    def forget(self, image: str) -> None:
        """``image``, a reference or the id that its pull answered, is no longer here."""
        for reference in [one for one, kept in self._kept.items() if image and kept.image_id == image]:
            del self._kept[reference]
        try:
            self._kept.pop(parse_reference(image), None)
        except InvalidReference:
            return

    def find(self, registry: str, repository: str) -> Login | None:
        """The login for a repository: that of its image which was pulled last."""
        try:
            wanted = parse_reference(f"{registry}/{repository}")
        except InvalidReference:
            return None
        for reference, kept in reversed(self._kept.items()):
            if reference.name == wanted.name and (login := login_of(kept.auth, reference.registry)) is not None:
                return login
        return None


@dataclass(slots=True)
class Pull:
    """A pull under way, whose login counts already, because its layers are read with it."""

    _all: OrderedDict[Reference, _Kept]
    _image: Reference
    _before: _Kept | None
    now: _Kept

    def succeeded(self, image_id: str) -> None:
        """The image is here; a later removal may name it by ``image_id`` alone."""
        self.now.image_id = image_id

    def failed(self) -> None:
        """The login may be a wrong one: it must not stand before one with which layers are read."""
        if self._all.get(self._image) is not self.now:
            return
        if self._before is None:
            del self._all[self._image]
        else:
            self._all[self._image] = self._before
