# SPDX-License-Identifier: Apache-2.0
"""Logins out of Docker's config.json, and from credential helpers that behave well and badly."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from soci.errors import InvalidConfig, Unauthorized
from soci_registry import DockerConfig, FirstOf, FixedLogin, Login, NoCredentials, credentials


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
    login = await docker.find(registry)
    assert (None if login is None else login.username) == username
    if registry == "url.example":
        assert login == Login("url", "a:b")
    if registry == "token.example":
        assert login == Login("", "refresh")


async def test_no_file_is_no_login_and_a_new_file_is_seen(docker: DockerConfig) -> None:
    """Without a config there is no login; one that is written later is used at the next question."""
    assert await docker.find("reg.example") is None
    configure(docker, {"auths": {"reg.example": auth("ada", "1")}})
    assert await docker.find("reg.example") == Login("ada", "1")
    configure(docker, {"auths": {"reg.example": auth("ada", "2")}})
    assert await docker.find("reg.example") == Login("ada", "2")


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
        await docker.find("reg.example")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "config", [{"auths": 1}, {"auths": {"reg.example": 1}}, {"credHelpers": []}, {"credsStore": 5}]
)
async def test_members_of_other_types_are_ignored(docker: DockerConfig, config: Any) -> None:
    """Members that are not what Docker writes are no logins, and no crash."""
    configure(docker, config)
    assert await docker.find("reg.example") is None


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
    assert await docker.find("reg.example") == Login("own", "reg.example")
    assert await docker.find("x.example") == Login("", "x.example")
    assert await docker.find("docker.io") == Login("", "https://index.docker.io/v1/")


async def test_helper_without_credentials_leaves_it_to_auths(docker: DockerConfig, tmp_path: Path) -> None:
    """A helper that has nothing for a registry is not an error."""
    helper(tmp_path, "none", "echo credentials not found in native keychain; exit 1")
    configure(docker, {"credsStore": "none", "auths": {"reg.example": auth("ada", "1")}})
    assert await docker.find("reg.example") == Login("ada", "1")
    assert await docker.find("other.example") is None


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
        await docker.find("reg.example")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_missing_helper(docker: DockerConfig) -> None:
    """A helper that is not installed is named."""
    configure(docker, {"credsStore": "absent"})
    with pytest.raises(Unauthorized, match="docker-credential-absent: No such file"):
        await docker.find("reg.example")


async def test_sources_in_order() -> None:
    """The first source with a login wins; a login for one registry is for no other."""
    first, second = FixedLogin(Login("a", "1"), "reg.example"), FixedLogin(Login("b", "2"))
    both = FirstOf((NoCredentials(), first, second))
    assert await both.find("reg.example") == Login("a", "1")
    assert await both.find("other.example") == Login("b", "2")
    assert await FirstOf(()).find("reg.example") is None


def test_a_login_hides_its_secret() -> None:
    """A login can be printed."""
    assert "hunter2" not in repr(Login("ada", "hunter2"))
