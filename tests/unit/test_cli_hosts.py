# SPDX-License-Identifier: Apache-2.0
"""Where a command's pushes go: folders of hosts, and certificates that are not looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci_cli.build_flags import parse_platforms
from soci_cli.hosts import CommandHosts, split_folders
from soci_registry.manner import Manner, Trust
from soci_registry.route import Host


@pytest.mark.parametrize(
    ("words", "folders"),
    [((), ()), (("/a",), ("/a",)), (("/a,/b:/c", "/d"), ("/a", "/b", "/c", "/d")), (("", ",/a:"), ("/a",))],
)
def test_folders_are_named_as_nerdctl_and_containerd_do(words: tuple[str, ...], folders: tuple[str, ...]) -> None:
    """Commas and colons stand between folders; nothing between two of them is nothing."""
    assert split_folders(words) == tuple(map(Path, folders))


def test_skipping_the_check_keeps_all_else(tmp_path: Path) -> None:
    """Every host of a registry takes any certificate then, found in files or not, and nothing else of it changes."""
    none = CommandHosts((), frozenset(), skip_verify=False)
    assert none.hosts("a.example") == ()
    trusting = Manner(trust=Trust(skip_verify=True))
    found = CommandHosts((), frozenset(), skip_verify=True).hosts("a.example")
    assert found == (Host("https://a.example", manner=trusting),)
    found = CommandHosts((), frozenset({"a.example"}), skip_verify=True).hosts("a.example")
    assert found == (Host("http://a.example", manner=trusting),)

    (tmp_path / "a.example").mkdir()
    text = 'server = "https://b.example"\n[header]\nx = ["y"]\n[host."https://c.example"]\ncapabilities = ["pull"]\n'
    (tmp_path / "a.example" / "hosts.toml").write_text(text)
    plain = CommandHosts((str(tmp_path),), frozenset(), skip_verify=False).hosts("a.example")
    found = CommandHosts((str(tmp_path),), frozenset(), skip_verify=True).hosts("a.example")
    assert [host.base for host in found] == [host.base for host in plain] == ["https://c.example", "https://b.example"]
    assert [host.capabilities for host in found] == [host.capabilities for host in plain]
    manners = [host.manner for host in found if host.manner and host.manner.trust]
    assert [manner.trust.skip_verify for manner in manners if manner.trust] == [True, True]
    assert [manner.headers for manner in manners] == [host.manner.headers if host.manner else () for host in plain]


def test_platforms_with_commas() -> None:
    """Several in one word are as several words, each once."""
    assert parse_platforms(["linux/amd64,linux/arm64", "linux/amd64"]) == parse_platforms(
        ["linux/amd64", "linux/arm64"]
    )
