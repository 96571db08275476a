# SPDX-License-Identifier: Apache-2.0
"""Logins out of Docker's config.json, and from credential helpers that behave well and badly."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from soci.errors import BusUnavailable, InvalidConfig, NotFound, SociError, Unauthorized
from soci_bus import wire
from soci_bus.asks import FindLogin, LoginFound
from soci_registry import AskedLogin, DockerConfig, FirstOf, FixedLogin, Login, NoCredentials, credentials


def auth(username: str, secret: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{secret}".encode()).decode()}


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DockerConfig:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return DockerConfig()


def configure(docker: DockerConfig, config: Any) -> None:
    docker.path.write_text(config if isinstance(config, str) else json.dumps(config))


def helper(tmp_path: Path, name: str, script: str) -> None:
    path = tmp_path / f"docker-credential-{name}"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("registry", "username"),
    [
        ("reg.example", "exact"),
        ("reg.example:5000", "port"),
        ("url.example", "url"),
        ("docker.io", "hub"),
        ("token.example", ""),
        ("plain.example", "plain"),
        ("other.example", None),
    ],
)
async def test_auths(docker: DockerConfig, registry: str, username: str | None) -> None:
    """A registry's entry is found by host, by host and port, by URL, and Docker Hub's by its historic name."""
    configure(
        docker,
        {
            "auths": {
                "reg.example": auth("exact", "1"),
                "reg.example:5000": auth("port", "2"),
                "https://url.example/v1/": auth("url", "a:b"),
                "https://index.docker.io/v1/": auth("hub", "4"),
                "token.example": {"identitytoken": "refresh", **auth("x", "y")},
                "plain.example": {"username": "plain", "password": "6"},
                "other.example": {},
            }
        },
    )
    login = await docker.find(registry, "team/app")
    assert (None if login is None else login.username) == username
    if registry == "url.example":
        assert login == Login("url", "a:b")
    if registry == "token.example":
        assert login == Login("", "refresh")


async def test_no_file_is_no_login_and_a_new_file_is_seen(docker: DockerConfig) -> None:
    """Without a config there is no login; one that is written later is used at the next question."""
    assert await docker.find("reg.example", "team/app") is None
    configure(docker, {"auths": {"reg.example": auth("ada", "1")}})
    assert await docker.find("reg.example", "team/app") == Login("ada", "1")
    configure(docker, {"auths": {"reg.example": auth("ada", "2")}})
    assert await docker.find("reg.example", "team/app") == Login("ada", "2")


async def test_home_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DOCKER_CONFIG the file is ~/.docker/config.json."""
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DockerConfig().path == tmp_path / ".docker" / "config.json"


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '"hunter2"',
        "[" * 100_000,
        json.dumps({"auths": {"reg.example": {"auth": "not base64, hunter2"}}}),
        json.dumps({"auths": {"reg.example": {"auth": base64.b64encode(b"hunter2").decode()}}}),
        json.dumps({"credHelpers": {"reg.example": "../../hunter"}}),
    ],
)
async def test_unusable_files_are_named_without_their_content(docker: DockerConfig, config: str) -> None:
    """A config that cannot be used is `InvalidConfig` with its path, and quotes no secret."""
    configure(docker, config)
    with pytest.raises(InvalidConfig, match=r"config\.json") as caught:
        await docker.find("reg.example", "team/app")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "config", [{"auths": 1}, {"auths": {"reg.example": 1}}, {"credHelpers": []}, {"credsStore": 5}]
)
async def test_members_of_other_types_are_ignored(docker: DockerConfig, config: Any) -> None:
    """Members that are not what Docker writes are no logins, and no crash."""
    configure(docker, config)
    assert await docker.find("reg.example", "team/app") is None


async def test_helpers(docker: DockerConfig, tmp_path: Path) -> None:
    """A registry's own helper comes before the common store, and the store before auths."""
    helper(tmp_path, "own", 'read host; echo "{\\"Username\\":\\"own\\",\\"Secret\\":\\"$host\\"}"')
    helper(tmp_path, "store", 'read host; echo "{\\"Username\\":\\"<token>\\",\\"Secret\\":\\"$host\\"}"')
    configure(
        docker,
        {
            "credHelpers": {"reg.example": "own"},
            "credsStore": "store",
            "auths": {"reg.example": auth("no", "no"), "x.example": auth("no", "no")},
        },
    )
    assert await docker.find("reg.example", "team/app") == Login("own", "reg.example")
    assert await docker.find("x.example", "team/app") == Login("", "x.example")
    assert await docker.find("docker.io", "team/app") == Login("", "https://index.docker.io/v1/")


async def test_helper_without_credentials_leaves_it_to_auths(docker: DockerConfig, tmp_path: Path) -> None:
    """A helper that has nothing for a registry is not an error."""
    helper(tmp_path, "none", "echo credentials not found in native keychain; exit 1")
    configure(docker, {"credsStore": "none", "auths": {"reg.example": auth("ada", "1")}})
    assert await docker.find("reg.example", "team/app") == Login("ada", "1")
    assert await docker.find("other.example", "team/app") is None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo hunter2; exit 3", "exit code 3"),
        ("echo hunter2", "not a JSON object"),
        ("echo '[\"hunter2\"]'", "not a JSON object"),
        ("exec cat /dev/zero", "more than 65536 bytes"),
        ("exec sleep 50", "no answer"),
        ("sleep 50 & wait", "no answer"),
    ],
)
async def test_bad_helpers(
    docker: DockerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    """A helper that fails, floods or hangs is `Unauthorized`, within its limits, without what it said, and ended."""
    monkeypatch.setattr(credentials, "HELPER_SECONDS_MAX", 0.5)
    helper(tmp_path, "bad", f"echo $$ > {tmp_path}/pid\n{script}")
    configure(docker, {"credsStore": "bad"})
    with pytest.raises(Unauthorized, match=says) as caught:
        await docker.find("reg.example", "team/app")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_missing_helper(docker: DockerConfig) -> None:
    """A helper that is not installed is named."""
    configure(docker, {"credsStore": "absent"})
    with pytest.raises(Unauthorized, match="docker-credential-absent: No such file"):
        await docker.find("reg.example", "team/app")


async def test_sources_in_order() -> None:
    """The first source with a login wins; a login for one registry is for no other."""
    first, second = FixedLogin(Login("a", "1"), "reg.example"), FixedLogin(Login("b", "2"))
    both = FirstOf((NoCredentials(), first, second))
    assert await both.find("reg.example", "team/app") == Login("a", "1")
    assert await both.find("other.example", "team/app") == Login("b", "2")
    assert await FirstOf(()).find("reg.example", "team/app") is None


class Moody:
    """A source that is away, or knows what it is told to."""

    def __init__(self, found: Login | SociError | None) -> None:
        self.found = found
        self.asked: list[tuple[str, str, tuple[Login, ...]]] = []

    async def find(self, registry: str, repository: str, refused: Collection[Login] = ()) -> Login | None:
        self.asked.append((registry, repository, tuple(refused)))
        if isinstance(self.found, SociError):
            raise self.found
        return self.found


async def test_a_source_that_is_away_is_passed_over() -> None:
    """A source that is away is told of once, and once when it is back; the next one is asked meanwhile."""
    told: list[tuple[str, dict[str, object]]] = []
    moody, sure = Moody(BusUnavailable("no NATS")), Moody(Login("b", "2"))

    def tell(what: str, /, **facts: object) -> None:
        told.append((what, facts))

    both = FirstOf((moody, sure), tell)
    for _ in range(3):
        assert await both.find("reg.example", "team/app") == Login("b", "2")
    moody.found = Login("a", "1")
    for _ in range(3):
        assert await both.find("reg.example", "team/app") == Login("a", "1")
    assert told == [
        ("source of logins away", {"source": "Moody", "error": "no NATS"}),
        ("source of logins back", {"source": "Moody"}),
    ]
    assert len(sure.asked) == 3


async def test_an_error_of_a_source_stops_the_search() -> None:
    """A source that is wrong, not away, ends the search: no other login is taken in its place."""
    sure = Moody(Login("b", "2"))
    with pytest.raises(InvalidConfig):
        await FirstOf((Moody(InvalidConfig("broken")), sure)).find("reg.example", "team/app")
    assert sure.asked == []


async def test_a_refused_login_is_passed_over() -> None:
    """Each source hears which logins were refused, and one that has no other is passed over."""
    old, new = Moody(Login("a", "old")), Moody(Login("a", "new"))
    both = FirstOf((old, new))
    assert await both.find("reg.example", "team/app", (Login("a", "old"),)) == Login("a", "new")
    assert old.asked == [("reg.example", "team/app", (Login("a", "old"),))]
    assert await both.find("reg.example", "team/app", (Login("a", "old"), Login("a", "new"))) is None


async def test_asked_logins() -> None:
    """What another process knows is asked for by registry and repository; that it knows none is no error."""
    asked: list[tuple[str, str]] = []

    async def ask(registry: str, repository: str) -> Login:
        asked.append((registry, repository))
        if repository == "none":
            raise NotFound("no login")
        if repository == "away":
            raise BusUnavailable("nobody answers")
        return Login("", "") if repository == "empty" else Login("ada", "1")

    source = AskedLogin(ask)
    assert await source.find("reg.example", "team/app") == Login("ada", "1")
    assert await source.find("reg.example", "none") is None
    assert await source.find("reg.example", "empty") is None
    with pytest.raises(BusUnavailable):
        await source.find("reg.example", "away")
    assert asked[0] == ("reg.example", "team/app")


def test_the_bus_s_answer_hides_its_secret() -> None:
    """What crosses the bus can be printed, and comes out as it went in."""
    found = LoginFound("ada", "hunter2")
    assert "hunter2" not in repr(found)
    assert wire.decode(wire.encode(found), LoginFound) == found
    ask = FindLogin("reg.example", "team/app")
    assert wire.decode(wire.encode(ask), FindLogin) == ask


def test_a_login_hides_its_secret() -> None:
    """A login can be printed."""
    assert "hunter2" not in repr(Login("ada", "hunter2"))
