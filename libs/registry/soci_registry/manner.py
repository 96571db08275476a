# SPDX-License-Identifier: Apache-2.0
"""How a host wants to be spoken to, where that is not as all others: whom to trust, what to send, how long to wait."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from soci.errors import InvalidConfig

CONTEXTS_KEPT = 64
"""TLS contexts that are kept, each with the authorities that it trusts in memory."""


@dataclass(frozen=True, slots=True)
class Trust:
    """TLS of one host: authorities beside the system's, our own certificates, or no check at all.

    ``stamp`` changes with the files, so that a renewed certificate makes another value.
    """

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    """Pairs of files, certificate and key; an empty key means that the certificate's file holds it too."""
    skip_verify: bool = False
    stamp: tuple[int, ...] = ()

    def away(self) -> Trust:
        """The same trust for where this host redirects to: our certificate is for the host alone."""
        return replace(self, client=())


@dataclass(frozen=True, slots=True)
class Manner:
    """What is special about one host. Times are seconds; None is the settings' own."""

    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Sent to the host itself and never to where it redirects: they may hold secrets."""
    trust: Trust | None = None
    connect_timeout: float | None = None
    total_timeout: float | None = None
    """One try with a bounded answer; infinity is no limit."""


PLAIN = Manner()
"""Nothing is special."""


def headers_for(manner: Manner, own: Mapping[str, str], authorization: str | None, *, home: bool) -> dict[str, str]:
    """What a request carries: the host's configured headers (at ``home`` only), its ``own``, and Authorization."""
    headers = dict(own)
    if authorization is not None:
        headers["Authorization"] = authorization
    if home and manner.headers:
        taken = {name.lower() for name in headers}
        headers |= {name: value for name, value in manner.headers if name.lower() not in taken}
    return headers


@lru_cache(maxsize=CONTEXTS_KEPT)
def context_of(trust: Trust, ca_file: str | None) -> ssl.SSLContext:
    """The TLS context of a host; ``ca_file`` is the common one of the settings. Reads files: call it in a thread.

    `InvalidConfig` names the file that cannot be used.
    """
    file = ca_file or "the system's"
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if trust.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        for file in trust.ca:
            context.load_verify_locations(cafile=file)
        for file, key in trust.client:
            context.load_cert_chain(file, key or None, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise InvalidConfig(f"TLS certificates {file}: {error}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # otherwise OpenSSL would ask on a terminal
