# SPDX-License-Identifier: Apache-2.0
"""Which hosts stand for a registry: containerd's hosts.toml and its folders, the mirrors of the configuration."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidConfig
from soci_registry import HostBook, Mirror
from soci_registry.hosts import FRESH_SECONDS, folder_names, mirror_host
from soci_registry.hosts_toml import parse_duration_text, parse_hosts
from soci_registry.manner import Manner, Trust
from soci_registry.route import CAPABILITIES, PULL, PUSH, RESOLVE, Host, route_of
from soci_registry.urls import place_of

FOLDER = Path("/certs.d/reg.example")
OWN = "https://reg.example"


def hosts(text: str) -> tuple[Host, ...]:
    return parse_hosts(text, FOLDER, OWN)


@pytest.mark.parametrize(
    ("url", "override", "base", "path"),
    [
        ("https://m.example", False, "https://m.example", "/v2"),
        ("http://m.example:5000", False, "http://m.example:5000", "/v2"),
        ("m.example:5000", False, "https://m.example:5000", "/v2"),
        ("localhost:5000", False, "http://localhost:5000", "/v2"),
        ("https://m.example/", False, "https://m.example", "/v2"),
        ("https://m.example/v2", False, "https://m.example", "/v2"),
        ("https://m.example/proxy", False, "https://m.example", "/proxy/v2"),
        ("https://m.example/proxy", True, "https://m.example", "/proxy"),
        ("https://m.example", True, "https://m.example", ""),
        ("https://docker.io", False, "https://registry-1.docker.io", "/v2"),
        ("https://[::1]:5000/a/b/", True, "https://[::1]:5000", "/a/b"),
    ],
)
def test_urls_of_hosts(url: str, base: str, path: str, *, override: bool) -> None:
    """A host's URL gives authority and path; /v2 is added unless it is there or overridden."""
    found = hosts(f'[host."{url}"]\noverride_path = {str(override).lower()}')
    assert (found[0].base, found[0].path) == (base, path)
    assert found[1:] == (Host(OWN),)


def test_every_key() -> None:
    """All keys of a host are read, files are named from the folder, hosts keep their order, the server comes last."""
    found = hosts(
        """
        server = "https://origin.example"
        ca = "origin.crt"
        [host."https://b.example"]
        capabilities = ["pull"]
        ca = ["a.crt", "/etc/b.crt"]
        client = [["c.cert", "c.key"], "both.pem", ["only.cert", ""]]
        skip_verify = true
        dial_timeout = "1m30s"
        [host."https://b.example".header]
        X-One = "1"
        X-Many = ["2", "3"]
        [host."http://a.example"]
        capabilities = ["resolve", "pull", "push", "referrers"]
        """
    )
    trust = Trust(
        ("/certs.d/reg.example/a.crt", "/etc/b.crt"),
        (
            ("/certs.d/reg.example/c.cert", "/certs.d/reg.example/c.key"),
            ("/certs.d/reg.example/both.pem", ""),
            ("/certs.d/reg.example/only.cert", ""),
        ),
        skip_verify=True,
    )
    manner = Manner((("X-One", "1"), ("X-Many", "2, 3")), trust, 90.0)
    assert found == (
        Host("https://b.example", "/v2", frozenset({PULL}), manner),
        Host("http://a.example", "/v2", CAPABILITIES),
        Host("https://origin.example", "/v2", CAPABILITIES, Manner(trust=Trust(("/certs.d/reg.example/origin.crt",)))),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host = 1", "host is not a table"),
        ("server = 1", "not a host"),
        ("[host", "hosts.toml"),
        ('[host."https://a.example"]\nskipverify = true', "skipverify is no key of a host"),
        ('[host."https://a.example"]\nskip_verify = "yes"', "skip_verify is neither true nor false"),
        ('[host."https://a.example"]\ncapabilities = ["fly"]', "'fly' is no capability"),
        ('[host."https://a.example"]\ncapabilities = 7', "capabilities: neither"),
        ('[host."ftp://a.example"]', "not a host's URL"),
        ('[host."https://user:pw@a.example"]', "not a host's URL"),
        ('[host."https://a.example/x?y=1"]', "not a host's URL"),
        ('[host."https://a.example/../x"]', "not a path of a URL"),
        ('[host."https://"]', "not a host's URL"),
        ('[host."https://a.example"]\ndial_timeout = "soon"', "dial_timeout"),
        ('[host."https://a.example"]\ndial_timeout = -1', "dial_timeout"),
        ('[host."https://a.example"]\nclient = [["a", "b", "c"]]', "client"),
        ('[host."https://a.example".header]\n"X Y" = "1"', "no header"),
        ('[host."https://a.example".header]\nX = "hunter2\\n"', "no header"),
        ("unknown = 1", "unknown is no key"),
    ],
)
def test_slips_are_named(text: str, says: str) -> None:
    """A file that cannot be used is an error that names the place, without a header's value."""
    with pytest.raises(InvalidConfig, match=says) as caught:
        hosts(text)
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=300))
def test_any_text_is_hosts_or_an_error_of_ours(text: str) -> None:
    """No text breaks the parser."""
    with suppress(InvalidConfig):
        hosts(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("3s", 3), ("1m30s", 90), ("1.5h", 5400), ("250ms", 0.25), ("0", 0), (".5s", 0.5)],
        *[(text, None) for text in ("", "3", "s", "1d", "3s ", "-3s", "1s" * 40)],
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    """Durations are read as Go writes them."""
    assert parse_duration_text(text) == seconds


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        ("reg.example", ("reg.example", "_default")),
        ("reg.example:5000", ("reg.example_5000_", "reg.example:5000", "_default")),
        ("[::1]:5000", ("[::1]_5000_", "[::1]:5000", "_default")),
    ],
)
def test_names_of_folders(registry: str, names: tuple[str, ...]) -> None:
    """A registry's own folder comes before the one for all; a port may be written without a colon."""
    assert folder_names(registry) == names


@pytest.mark.parametrize(
    ("mirror", "host"),
    [
        (Mirror("https://m.example:5000/v2"), Host("https://m.example:5000", "/v2", frozenset({PULL, RESOLVE}))),
        (Mirror("http://m.example"), Host("https://m.example", "/v2", frozenset({PULL, RESOLVE}))),
        (Mirror("m.example:5000", insecure=True), Host("http://m.example:5000", "/v2", frozenset({PULL, RESOLVE}))),
        (Mirror("https://127.0.0.1:5000"), Host("http://127.0.0.1:5000", "/v2", frozenset({PULL, RESOLVE}))),
        (Mirror("https://m.example/proxy/hub"), Host("https://m.example", "/proxy/hub", frozenset({PULL, RESOLVE}))),
        (
            Mirror("m.example", request_timeout=math.inf),
            Host("https://m.example", "/v2", frozenset({PULL, RESOLVE}), Manner(total_timeout=math.inf)),
        ),
        (
            Mirror("m.example", request_timeout=7),
            Host("https://m.example", "/v2", frozenset({PULL, RESOLVE}), Manner(total_timeout=7)),
        ),
    ],
)
def test_mirrors_of_the_configuration(mirror: Mirror, host: Host) -> None:
    """Authority and path count, the scheme does not: TLS unless insecure or loopback."""
    assert mirror_host(mirror, "reg.example") == host


def test_a_mirror_that_is_none_is_refused_at_the_start() -> None:
    """A slip in the configuration is an error before the first pull."""
    with pytest.raises(InvalidConfig, match=r'resolver\.host\."reg\.example"'):
        HostBook(mirrors={"reg.example": [Mirror("https://a b")]})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def book(tmp_path: Path, clock: Clock | None = None) -> HostBook:
    (tmp_path / "one").mkdir(exist_ok=True)
    return HostBook(
        mirrors={"Docker.io": [Mirror("hub.example")]},
        folders=[tmp_path / "absent", tmp_path / "one"],
        clock=clock or Clock(),
    )


def bases(found: tuple[Host, ...]) -> list[str]:
    return [host.base for host in found]


def test_who_decides(tmp_path: Path) -> None:
    """The configuration's mirrors, else a registry's own folder, else the folder for all, else nothing."""
    clock = Clock()
    hosts_of = book(tmp_path, clock).hosts
    assert bases(hosts_of("index.docker.io")) == ["https://hub.example", "https://registry-1.docker.io"]
    assert hosts_of("reg.example") == ()
    (tmp_path / "one" / "_default").mkdir()
    (tmp_path / "one" / "_default" / "hosts.toml").write_text('[host."https://all.example"]')
    assert hosts_of("reg.example") == ()  # for a while, what was found holds
    clock.now += FRESH_SECONDS
    assert bases(hosts_of("reg.example")) == ["https://all.example", "https://reg.example"]
    (tmp_path / "one" / "reg.example").mkdir()
    (tmp_path / "one" / "reg.example" / "hosts.toml").write_text('[host."https://own.example"]')
    clock.now += FRESH_SECONDS
    assert bases(hosts_of("REG.example")) == ["https://own.example", "https://reg.example"]


def test_docker_s_files_and_renewed_certificates(tmp_path: Path) -> None:
    """A folder without hosts.toml may hold certificates; a renewed one makes another trust."""
    clock = Clock()
    hosts_of = book(tmp_path, clock).hosts
    folder = tmp_path / "one" / "reg.example:5000"
    folder.mkdir()
    assert hosts_of("reg.example:5000") == ()
    for name in ("ca.crt", "me.cert", "me.key"):
        (folder / name).touch()
    clock.now += FRESH_SECONDS
    (first,) = hosts_of("reg.example:5000")
    assert first.manner is not None
    assert first.manner.trust is not None
    assert first.manner.trust.ca == (f"{folder}/ca.crt",)
    assert first.manner.trust.client == ((f"{folder}/me.cert", f"{folder}/me.key"),)
    assert first.manner.trust.away().client == ()
    os.utime(folder / "me.cert", ns=(1, 1))
    clock.now += FRESH_SECONDS
    (second,) = hosts_of("reg.example:5000")
    assert second != first
    (folder / "me.key").unlink()
    clock.now += FRESH_SECONDS
    with pytest.raises(InvalidConfig, match=r"me\.key: No such file"):
        hosts_of("reg.example:5000")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """A hosts.toml that is too large, no text or a folder is an error that names it."""
    (tmp_path / "one" / "reg.example" / "hosts.toml").mkdir(parents=True)
    with pytest.raises(InvalidConfig, match=r"hosts\.toml: Is a directory"):
        book(tmp_path).hosts("reg.example")
    (tmp_path / "one" / "reg.example" / "hosts.toml").rmdir()
    for content, says in ((b"#" * 300_000, "more than"), (b"\xff", "not UTF-8")):
        (tmp_path / "one" / "reg.example" / "hosts.toml").write_bytes(content)
        with pytest.raises(InvalidConfig, match=says):
            book(tmp_path).hosts("reg.example")


def test_the_route_of_a_repository() -> None:
    """Mirrors are told whom they stand for, logins are looked for under each host's own name, capabilities count."""
    own = place_of("docker.io", "library/app")
    found = (
        Host("https://m.example:5000", "/hub", frozenset({PULL})),
        Host("https://registry-1.docker.io", capabilities=frozenset({RESOLVE, PULL})),
    )
    route = route_of(own, found, "library/app", "docker.io")
    assert [place.registry for place in route.pull] == ["m.example:5000", "docker.io"]
    assert route.pull[0].url("blobs", "x") == "https://m.example:5000/hub/library/app/blobs/x?ns=docker.io"
    assert route.pull[1] == own == route.own
    assert route.resolve == (own,)
    with pytest.raises(InvalidConfig, match="none of its hosts may be asked to resolve"):
        route_of(own, found[:1], "library/app", "docker.io")
    with pytest.raises(InvalidConfig, match="none of its hosts may be asked to pull"):
        route_of(own, (Host("https://x.example", capabilities=frozenset({PUSH, RESOLVE})),), "library/app", "docker.io")
