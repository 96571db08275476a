# SPDX-License-Identifier: Apache-2.0
"""Which login a registry is told, of those that came with pulls."""

from __future__ import annotations

import base64

import pytest

from soci_snapshotter.logins import MOST_BYTES, Auth, Login, Logins, login_of

ME = Auth(username="me", password="p")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("auth", "registry", "login"),
    [
        (Auth(), "r:5000", None),
        (ME, "r:5000", Login("me", "p")),
        (Auth("me", "p", identity_token="t"), "r:5000", Login("me", "p")),
        (Auth(identity_token="t", auth=b64("a:b")), "r:5000", Login("", "t")),
        (Auth(auth=b64("a:b:c")), "r:5000", Login("a", "b:c")),
        (Auth(auth=b64("a:b\0\0")), "r:5000", Login("a", "b")),
        (Auth(auth=b64("no colon")), "r:5000", None),
        (Auth(auth=b64(":")), "r:5000", None),
        (Auth(auth="%%%"), "r:5000", None),
        (Auth(auth=base64.b64encode(b"\xff:\xff").decode()), "r:5000", None),
        (Auth("me", "p", server_address="https://r:5000"), "r:5000", Login("me", "p")),
        (Auth("me", "p", server_address="r:5000"), "r:5000", Login("me", "p")),
        (Auth("me", "p", server_address="http://R:5000/v2/"), "r:5000", Login("me", "p")),
        (Auth("me", "p", server_address="https://r:443/"), "r", Login("me", "p")),
        (Auth("me", "p", server_address="https://r:5001"), "r:5000", None),
        (Auth("me", "p", server_address="https://evil"), "r:5000", None),
        (Auth("me", "p", server_address="https://r.evil"), "r", None),
        (Auth("me", "p", server_address="https://[::1"), "r", None),
        (Auth("me", "p", server_address="https://r:99999"), "r", None),
        (Auth("me", "p", server_address="https://index.docker.io/v1/"), "docker.io", Login("me", "p")),
        (Auth("me", "p", server_address="registry-1.docker.io"), "docker.io", Login("me", "p")),
        (Auth("me", "p", server_address="https://docker.io"), "r", None),
        (Auth("me", "p", server_address="https://[::1]:5000"), "[::1]:5000", Login("me", "p")),
    ],
)
def test_the_login_that_is_meant(auth: Auth, registry: str, login: Login | None) -> None:
    """User and password, else identity token, else base64; none for a server that was not meant."""
    assert login_of(auth, registry) == login


def test_an_image_is_found_by_its_repository() -> None:
    """Whatever the tag, with Docker Hub's defaults filled in, and no other repository's."""
    logins = Logins()
    logins.begin("r:5000/a/b:1", ME)
    logins.begin("nginx", Auth("hub", "h"))
    assert logins.find("r:5000", "a/b") == Login("me", "p")
    assert logins.find("docker.io", "library/nginx") == Login("hub", "h")
    for registry, repository in (("r:5000", "a/c"), ("r:5001", "a/b"), ("r:5000", "a"), ("docker.io", "a/b"), ("", "")):
        assert logins.find(registry, repository) is None


def test_the_newest_image_of_a_repository_counts() -> None:
    """An older one again where the newest brought nothing for this registry; a repeated pull makes an image newest."""
    logins = Logins()
    logins.begin("r/a:1", Auth("one", "1"))
    logins.begin("r/a:2", Auth("two", "2"))
    assert logins.find("r", "a") == Login("two", "2")
    logins.begin("r/a:3", Auth("three", "3", server_address="elsewhere"))
    assert logins.find("r", "a") == Login("two", "2")
    logins.begin("r/a:1", Auth("again", "1"))
    assert logins.find("r", "a") == Login("again", "1")


def test_a_failed_pull_leaves_what_was_before() -> None:
    """Its login may be a wrong one, and layers are read with the one before; while it is under way it counts."""
    logins = Logins()
    first = logins.begin("r/a:1", Auth("good", "1"))
    assert first is not None
    first.succeeded("sha256:1")
    for image in ("r/a:1", "r/a:2"):
        pull = logins.begin(image, Auth("bad", "2"))
        assert pull is not None
        assert logins.find("r", "a") == Login("bad", "2")
        pull.failed()
        assert logins.find("r", "a") == Login("good", "1")
    late = logins.begin("r/a:1", Auth("late", "3"))
    logins.begin("r/a:1", Auth("later", "4"))
    assert late is not None
    late.failed()
    assert logins.find("r", "a") == Login("later", "4")


def test_a_pull_without_login_takes_none_away() -> None:
    """Layers that are shown go on being read with the login they had."""
    logins = Logins()
    logins.begin("r/a:1", ME)
    assert logins.begin("r/a:1", Auth()) is None
    assert logins.find("r", "a") == Login("me", "p")


def test_a_removed_image_is_forgotten() -> None:
    """By its reference, or by the id that its pull answered; an unknown one changes nothing."""
    logins = Logins()
    for image in ("r/a:1", "r/b:1"):
        pull = logins.begin(image, ME)
        assert pull is not None
        pull.succeeded(f"sha256:{image[2]}")
    logins.forget("")
    logins.forget("r/c")
    logins.forget("sha256:c")
    assert len(logins) == 2
    logins.forget("r/a:1")
    assert logins.find("r", "a") is None
    logins.forget("sha256:b")
    assert len(logins) == 0


def test_it_does_not_grow() -> None:
    """The image pulled longest ago is forgotten first; a huge login is not taken."""
    logins = Logins(most=3)
    for number in range(5):
        logins.begin(f"r/a{number}", ME)
    assert len(logins) == 3
    assert logins.find("r", "a1") is None
    assert logins.find("r", "a2") is not None
    assert logins.begin("r/big", Auth("me", "x" * MOST_BYTES)) is None
    assert logins.begin("not//a reference", ME) is None


def test_nothing_shows_a_secret() -> None:
    """No representation has one."""
    logins = Logins()
    auth = Auth("me", "hunter2", "hunter2", "r", "hunter2")
    pull = logins.begin("r/a", auth)
    assert "hunter2" not in f"{auth!r} {pull!r} {Login('me', 'hunter2')!r} {logins!r}"
