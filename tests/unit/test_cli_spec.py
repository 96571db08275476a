# SPDX-License-Identifier: Apache-2.0
"""The OCI runtime specification made from an image config."""

from __future__ import annotations

import json
from typing import Any

import pytest

from soci.errors import InvalidConfig, SociError, Unsupported
from soci.oci import Config
from soci_cli.spec import CAPABILITIES, DEFAULT_PATH, Wish, encode_spec, make_spec, parse_user


def spec_of(config: Config, wish: Wish | None = None) -> dict[str, Any]:
    made = make_spec(config, wish or Wish(), "c1", "ns")
    decoded: dict[str, Any] = json.loads(encode_spec(made))
    return decoded


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "words", "args"),
    [
        ((), ("a", "b"), (), ["a", "b"]),
        (("e",), ("a",), (), ["e", "a"]),
        (("e", "-x"), ("a", "b"), ("w",), ["e", "-x", "w"]),
        (("e",), (), (), ["e"]),
        ((), ("a",), ("w", "--flag"), ["w", "--flag"]),
    ],
)
def test_arguments(entrypoint: tuple[str, ...], cmd: tuple[str, ...], words: tuple[str, ...], args: list[str]) -> None:
    """The user's words replace the image's command and follow its entrypoint."""
    assert spec_of(Config((), entrypoint=entrypoint, cmd=cmd), Wish(words))["process"]["args"] == args


def test_an_image_without_a_command_says_so() -> None:
    """No entrypoint, no command and no words is an error with the way out."""
    with pytest.raises(InvalidConfig, match="add one after the image"):
        spec_of(Config(()))


@pytest.mark.parametrize(
    ("image", "added", "expected"),
    [
        ((), (), [DEFAULT_PATH]),
        (("PATH=/opt", "A=1"), (), ["PATH=/opt", "A=1"]),
        (("A=1", "B=2"), ("A=3", "C="), [DEFAULT_PATH, "A=3", "B=2", "C="]),
        (("A=x=y",), (), [DEFAULT_PATH, "A=x=y"]),
    ],
)
def test_environment(image: tuple[str, ...], added: tuple[str, ...], expected: list[str]) -> None:
    """A name has one value: the user's, else the image's; PATH always has one."""
    config = Config((), cmd=("x",), env=image)
    assert spec_of(config, Wish(environment=added))["process"]["env"] == expected


@pytest.mark.parametrize("variable", ["A", "=x", "", "A\0=x"])
def test_a_variable_that_is_none_is_refused(variable: str) -> None:
    """``--env`` takes NAME=value only."""
    with pytest.raises(InvalidConfig, match="NAME=value"):
        spec_of(Config((), cmd=("x",)), Wish(environment=(variable,)))


@pytest.mark.parametrize(
    ("text", "ids"),
    [("", (0, 0)), ("root", (0, 0)), ("1000", (1000, 0)), ("1000:50", (1000, 50)), ("0:root", (0, 0))],
)
def test_users(text: str, ids: tuple[int, int]) -> None:
    """Numbers and root are known without the image's own files; a group that is not named is 0."""
    assert parse_user(text) == ids


@pytest.mark.parametrize("text", ["www-data", "1000:users", "1:2:3", "-1", "1 ", "\u0661", "9" * 11])
def test_users_that_need_a_look_up(text: str) -> None:
    """Any other user is a clear error, never root by accident."""
    with pytest.raises(Unsupported, match="only numbers"):
        parse_user(text)


def test_a_user_out_of_range() -> None:
    """The uid that means "no change" to the kernel is refused."""
    with pytest.raises(InvalidConfig, match="out of range"):
        parse_user(str((1 << 32) - 1))


def test_capabilities_follow_the_user() -> None:
    """Root holds the fourteen defaults; another user holds none, and can win them from a file only."""
    root = spec_of(Config((), cmd=("x",)))["process"]["capabilities"]
    assert root["effective"] == root["permitted"] == root["bounding"] == list(CAPABILITIES)
    other = spec_of(Config((), cmd=("x",), user="1000"))["process"]["capabilities"]
    assert other == {"bounding": list(CAPABILITIES), "effective": [], "permitted": []}
    assert "inheritable" not in root
    assert "ambient" not in root


def test_the_network_is_private_unless_wished() -> None:
    """``--net-host`` leaves the network namespace out and shows the host's resolver; nothing else changes."""
    private, shared = spec_of(Config((), cmd=("x",))), spec_of(Config((), cmd=("x",)), Wish(host_network=True))
    kinds = [{n["type"] for n in made["linux"]["namespaces"]} for made in (private, shared)]
    assert kinds[0] - kinds[1] == {"network"}
    added = [mount for mount in shared["mounts"] if mount not in private["mounts"]]
    assert {mount["destination"] for mount in added} == {"/etc/hosts", "/etc/resolv.conf"}
    assert all("ro" in mount["options"] for mount in added)


def test_what_stands_around_the_process() -> None:
    """cgroup path, cwd, host name and the hidden parts of /proc are where runc expects them."""
    made = spec_of(Config((), cmd=("x",), working_dir="/srv"))
    assert made["linux"]["cgroupsPath"] == "/ns/c1"
    assert made["process"]["cwd"] == "/srv"
    assert made["hostname"] == "c1"
    assert made["root"] == {"path": "rootfs", "readonly": False}
    assert "/proc/kcore" in made["linux"]["maskedPaths"]
    assert made["process"]["noNewPrivileges"] is True
    assert [m["destination"] for m in made["mounts"]][:3] == ["/proc", "/dev", "/dev/pts"]


def test_bytes_that_are_no_text_are_refused() -> None:
    """An argument with a broken byte (as Python's surrogate) gives one of our errors."""
    with pytest.raises(SociError, match="UTF-8"):
        spec_of(Config((), cmd=("x\udcff",)))
