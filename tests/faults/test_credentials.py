# SPDX-License-Identifier: Apache-2.0
"""Credentials that are gone or have expired when a node comes back: only bytes that are not here are missing."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci_dev.faults import Seen, Status
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

READ_DEADLINE_S = 3
DIAL_SECONDS = 15.0
CONFIG = f"[sociable]\nread_deadline_sec = {READ_DEADLINE_S}\n"
OURS = ("mounter", "fetcher-1", "snapshotter")


class Guard:
    """A registry behind Basic authentication; ``config`` is Docker's file, which all of ours read."""

    def __init__(self, proxy: Proxy, config: Path) -> None:
        self.proxy = proxy
        self.config = config
        self.change("first")
        proxy.hook = self._hook

    def change(self, password: str) -> None:
        """Have the registry take ``password`` alone."""
        self.password = password
        self._wanted = "Basic " + self._encoded(password)

    @staticmethod
    def _encoded(password: str) -> str:
        return base64.b64encode(f"node:{password}".encode()).decode()

    def log_in(self, password: str) -> None:
        """Write ``password`` where `docker login` does."""
        self.config.write_text(json.dumps({"auths": {self.proxy.address: {"auth": self._encoded(password)}}}))

    def _hook(self, seen: Seen) -> Status | None:
        if seen.headers.get("authorization") == self._wanted:
            return None
        return Status(401, {"WWW-Authenticate": 'Basic realm="registry"'})


@pytest.fixture(scope="module")
def docker_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Docker's config.json, for our services and the commands of the test."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("docker")
        patch.setenv("DOCKER_CONFIG", str(folder))
        yield folder / "config.json"


@pytest.fixture(scope="module")
def node(make_stack: Callable[..., Stack], docker_config: Path) -> Stack:
    """A stack whose reads give up soon."""
    file = docker_config.parent / "sociable.toml"
    file.write_text(CONFIG)
    flags = {name: ["--config", str(file)] for name in ("mounter", "fetcher", "snapshotter")}
    return make_stack(environment={"DOCKER_CONFIG": str(docker_config.parent)}, flags=flags)


@pytest.fixture
def guard(node: Stack, docker_config: Path) -> Iterator[Guard]:
    with Proxy(node.registry) as proxy:
        yield Guard(proxy, docker_config)


def restart(node: Stack) -> None:
    """As after a power cut, but for the kernel's page cache."""
    for name in reversed(OURS):
        node.kill(name)
    for name in OURS:
        node.start(name)
    wait_until_dialled(node)


def wait_until_dialled(node: Stack) -> None:
    """containerd backs off for some seconds from a snapshotter that was away."""
    deadline = time.monotonic() + DIAL_SECONDS
    while node.ctr("snapshots", "--snapshotter", "sociable", "ls", check=False).returncode != 0:
        assert time.monotonic() < deadline, "containerd does not dial the snapshotter again"
        time.sleep(0.1)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("how", ["gone", "expired"])
def test_credentials_lost_at_a_restart_cost_only_missing_bytes(
    node: Stack, guard: Guard, tmp_path: Path, how: str
) -> None:
    """With its credentials gone or expired a node comes back, serves what is cached, and fails other reads with EIO;
    once it has credentials again those reads are right, without another restart."""
    guard.log_in("first")
    seed = int.from_bytes(os.urandom(4))
    built = lazy.seeded_image(tmp_path, seed=seed)
    reference = lazy.push(built, guard.proxy, f"guarded-{how}")
    lazy.build_index(node, reference)
    lazy.good(lazy.soci(node, "pull", "--plain-http", reference))
    chain = lazy.top_chain(built)
    right = [hashlib.sha256(lazy.data_file(seed, number)).hexdigest() for number in range(lazy.DATA_FILES)]
    with lazy.rootfs(node, "sociable", chain) as root:
        assert checksum(root / "data" / "0") == right[0]

    if how == "gone":
        guard.config.unlink()
    else:
        guard.change("second")
    restart(node)
    with lazy.rootfs(node, "sociable", chain) as root:
        assert sorted(path.name for path in (root / "data").iterdir()) == [str(number) for number in range(8)]
        assert checksum(root / "data" / "0") == right[0]
        with pytest.raises(OSError) as caught:
            checksum(root / "data" / "7")
        assert caught.value.errno == errno.EIO
        guard.log_in(guard.password)
        assert checksum(root / "data" / "7") == right[7]
        assert checksum(root / "data" / "6") == right[6]
