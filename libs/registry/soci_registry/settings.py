# SPDX-License-Identifier: Apache-2.0
"""Every limit of our talk with registries, as one frozen value: nothing here waits, grows or repeats without a name."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

MANIFEST_BYTES_MAX = 4 * MIB
"""The OCI distribution specification asks registries to take manifests of at least 4 MiB; nobody sends larger ones."""

ERROR_BODY_BYTES_MAX = 4 * KIB
"""How much of an error's body is read: enough for its code, and to use the connection again when that was all."""

TOKEN_BODY_BYTES_MAX = 256 * KIB
"""Tokens that carry many groups reach some tens of KiB."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently one kind of request is tried. Times are seconds."""

    tries: int
    """All tries, the first one included."""
    bad_answer_tries: int
    """All tries where the answer came, but was not what was asked for (wrong range, wrong digest)."""
    min_wait: float
    max_wait: float
    jitter: float
    """The random share added to a wait: 0.125 adds up to an eighth."""
    retry_after_max: float
    """A longer Retry-After is cut down to this."""


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """Settings of `soci_registry.Registry`. Times are seconds, sizes bytes, rates bytes a second."""

    plain_http: frozenset[str] = frozenset()
    """Hosts (``host`` or ``host:port``) that are spoken to without TLS, as localhost and the loopback addresses are."""
    ca_file: str | None = None
    """A PEM file of certificate authorities to trust instead of the system's."""
    use_environment_proxies: bool = True
    """Honour HTTP_PROXY, HTTPS_PROXY and NO_PROXY. Loopback hosts are never reached through a proxy."""
    user_agent: str = "sociable/0.1"

    tries: int = 9
    bad_answer_tries: int = 6
    min_wait: float = 0.03
    max_wait: float = 30.0
    jitter: float = 0.125
    retry_after_max: float = 60.0

    connect_timeout: float = 3.0
    header_timeout: float = 10.0
    stall_timeout: float = 10.0
    """The longest silence in a body, and the window in which ``min_rate`` is measured."""
    urgent_stall_timeout: float = 3.0
    """The same for a range that somebody waits for, if it is less: what has come of it is kept."""
    min_rate: int = 8 * KIB
    """A body slower than this is given up and asked for again: another connection is often a healthy one."""
    total_timeout: float = 300.0
    """One try of a request with a bounded answer, body included."""

    range_tries: int = 200
    """Ranges are bounded by time, not by count: a registry that is away for half a minute must not fail a read."""
    range_bad_answer_tries: int = 12
    range_min_wait: float = 0.03
    range_max_wait: float = 2.0
    range_deadline: float = 60.0
    """How long one range is tried where the caller names no deadline."""
    range_max: int = 256 * MIB
    """The longest range that is asked for in one piece: it is held in memory."""
    range_skip_max: int = 64 * MIB
    """How many bytes are thrown away where a server ignores Range and sends the blob from its beginning."""
    resume_progress: int = 1 * MIB
    """A whole-blob stream that got this much further has earned all its tries again."""

    login_seconds: float = 86400.0
    """How long a login is used for a registry that takes it with each request, before its source is asked again."""

    mirror_aside_min: float = 5.0
    mirror_aside_max: float = 600.0
    """How long a host that failed is left aside: at first, and at most; it doubles with each failure in between."""

    raw_ranges: bool = True
    """Plain ranges go over a wire of their own, which is the fastest; else over that of whole blobs."""
    connections_per_host: int = 16
    """Requests to one host at a time: of this process, or of all that share a budget."""
    redirects: int = 10
    remembered_targets: int = 4096
    """Redirect targets of blobs that are remembered, so that the registry is not asked again for each range."""

    @property
    def retry(self) -> Retry:
        """How ordinary requests are repeated."""
        return Retry(self.tries, self.bad_answer_tries, self.min_wait, self.max_wait, self.jitter, self.retry_after_max)

    @property
    def range_retry(self) -> Retry:
        """How ranges are repeated."""
        return Retry(
            self.range_tries,
            self.range_bad_answer_tries,
            self.range_min_wait,
            self.range_max_wait,
            self.jitter,
            self.retry_after_max,
        )
