# SPDX-License-Identifier: Apache-2.0
"""Addresses in libs/registry: where registries live, what redirects may lead to, what may be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidReference
from soci_registry.failure import Kind, TryError
from soci_registry.urls import (
    Origin,
    base_url,
    is_link_local,
    is_loopback,
    next_link,
    origin_of,
    place_of,
    redact,
    redirect_target,
)


@pytest.mark.parametrize(
    ("registry", "url"),
    [
        ("docker.io", "https://registry-1.docker.io"),
        ("index.docker.io", "https://registry-1.docker.io"),
        ("ghcr.io", "https://ghcr.io"),
        ("reg.example:5000", "https://reg.example:5000"),
        ("localhost", "http://localhost"),
        ("LOCALHOST:5000", "http://LOCALHOST:5000"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("127.8.9.10", "http://127.8.9.10"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("[::2]", "https://[::2]"),
        ("localhost.example", "https://localhost.example"),
        ("128.0.0.1", "https://128.0.0.1"),
        ("plain.example", "http://plain.example"),
        ("plain.example:80", "http://plain.example:80"),
        ("other.example:81", "http://other.example:81"),
        ("other.example", "https://other.example"),
    ],
)
def test_base_urls(registry: str, url: str) -> None:
    """Loopback hosts and the configured ones are spoken to in plain HTTP, all others by TLS."""
    assert base_url(registry, {"plain.example", "other.example:81"}) == url


@pytest.mark.parametrize("registry", ["", "a b", "a/b", "user@host", "host:port", "host:99999", "a?b", "a#b", "a\nb"])
def test_strange_registries_are_refused(registry: str) -> None:
    """Nothing but a host and a port becomes part of a URL."""
    with pytest.raises(InvalidReference):
        base_url(registry)


@pytest.mark.parametrize("repository", ["", "A", "a/../b", "../a", "a//b", "/a", "a/", "a?b", "a%2e", "a b", "a" * 256])
def test_strange_repositories_are_refused(repository: str) -> None:
    """Nothing but a repository name becomes part of a URL."""
    with pytest.raises(InvalidReference):
        place_of("ghcr.io", repository)


def test_a_place_makes_urls_and_scopes() -> None:
    """A place names URLs below /v2 and the token's scope."""
    place = place_of("docker.io", "library/alpine")
    assert place.url("manifests", "3") == "https://registry-1.docker.io/v2/library/alpine/manifests/3"
    assert place.access("pull,push").scope == "repository:library/alpine:pull,push"
    assert place.access().registry == "docker.io"
    assert place.access().origin == Origin("https", "registry-1.docker.io", 443)


def test_origins() -> None:
    """An origin is scheme, host and port, with the scheme's port as the default."""
    assert origin_of("https://A.example/x") == Origin("https", "a.example", 443) == origin_of("https://a.example:443/y")
    assert origin_of("http://a.example/x") != origin_of("https://a.example/x")
    for url in ("ftp://a/", "file:///x", "//a/b", "https://", "https://a:99999/", "https://[x/"):
        with pytest.raises(TryError):
            origin_of(url)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("169.254.0.1", True),
        ("169.254.169.254", True),
        ("fe80::1", True),
        ("[fe80::1]", True),
        ("fe80::1%eth0", True),
        ("::ffff:169.254.1.1", True),
        ("2852039166", True),
        ("0xa9fea9fe", True),
        ("169.16689662", True),
        ("0251.0376.1.1", True),
        ("169.253.0.1", False),
        ("2852039166.example", False),
        ("99999999999", False),
        ("10.0.0.1", False),
        ("fd00::1", False),
        ("example.com", False),
    ],
)
def test_link_local(host: str, *, local: bool) -> None:
    """169.254.0.0/16 and fe80::/10 are link-local in each spelling of an address."""
    assert is_link_local(host) is local


def test_loopback() -> None:
    """localhost, 127.0.0.0/8 and ::1 are this machine, other names are not."""
    assert all(is_loopback(host) for host in ("localhost", "127.1.2.3", "[::1]", "::1"))
    assert not any(is_loopback(host) for host in ("localhost.example", "10.0.0.1", "::2"))


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://store.example/x?sig=1#part", "https://store.example/x?sig=1"),
        ("/v2/y", "https://reg.example/v2/y"),
        ("?page=2", "https://reg.example/v2/x?page=2"),
        ("//other.example/z", "https://other.example/z"),
        ("http://reg.example/x", "http://reg.example/x"),
    ],
)
def test_redirects_are_resolved(location: str, target: str) -> None:
    """A Location is taken relative to the URL it came from, without its fragment."""
    assert redirect_target("https://reg.example/v2/x", location) == target


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://a/b",
        "javascript:1",
        "http://169.254.169.254/",
        "http://[fe80::1]/",
        "http://u:p@h/",
        "http://h/a b",
        "http://h/\r\nX: y",
        "http://h/\u00e9",
        "http://h:99999/",
        "http://[h/",
        "http:///x",
        "http://h/" + "a" * 20_000,
    ],
)
def test_redirects_that_are_refused(location: str) -> None:
    """A Location of another scheme, link-local, with credentials or unreadable is refused for good."""
    with pytest.raises(TryError) as caught:
        redirect_target("https://reg.example/v2/x", location)
    assert caught.value.kind is Kind.REDIRECT


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/p", "https://h/p"),
        ("https://user:pw@h:1/p?X-Sig=abc&t=1", "https://h:1/p?X-Sig=redacted&t=redacted"),
        ("https://h/p?barevalue", "https://h/p?redacted"),
        ("https://h/p?a=b=c#frag", "https://h/p?a=redacted"),
        ("https://h/p fake\u2028line", "https://h/p?fake?line"),
        ("https://[h/p?secret", "(unreadable URL)"),
        ("/p?x=1", "/p?x=redacted"),
    ],
)
def test_redaction(url: str, shown: str) -> None:
    """What is shown of a URL has no query values, userinfo, fragment or control characters."""
    assert redact(url) == shown


@given(st.text(max_size=200), st.text(max_size=50))
def test_redaction_of_any_text(url: str, value: str) -> None:
    """Any text can be redacted, and the value of a query parameter never survives."""
    redact(url)
    assert "s3cr3t" not in redact(f"https://user:s3cr3t@h/{value.replace('?', '').replace('#', '')}?a=s3cr3t")


@pytest.mark.parametrize(
    ("header", "link"),
    [
        ('</v2/a/referrers/x?n=2>; rel="next"', "/v2/a/referrers/x?n=2"),
        ("<https://h/x>; rel=next", "https://h/x"),
        ('<a>; rel="prev", <b>; rel="next"', "b"),
        ('<a>; title="x"; rel="prev next"', "a"),
        ('<a>; rel="nextish"', None),
        ("<a>", None),
        ("", None),
        (None, None),
    ],
)
def test_next_links(header: str | None, link: str | None) -> None:
    """The next page is the link whose relations hold ``next``."""
    assert next_link(header) == link
