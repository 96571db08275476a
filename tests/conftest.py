# SPDX-License-Identifier: Apache-2.0
"""Fixtures that start real daemons. Each session has folders of its own; what a crashed session left is cleaned first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog

from soci_dev.folders import cache_folder
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack, clean_stale

_PREFIX = "t-"  # short: socket paths are


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test that runs a service's `main` in this process leaves a logger that writes to a file which is closed."""
    del item
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs root where we are not; never for another reason."""
    if item.get_closest_marker("root"):
        if os.geteuid() != 0:
            pytest.skip("needs root: it mounts and runs containers")
        if not Path("/dev/fuse").exists():
            pytest.skip("needs /dev/fuse, which this machine does not have")


SMALL_IMAGES = "[sociable]\nno_regret = false\n"
"""Images of tests are small, and registries near: all of their layers would come whole."""
if os.environ.get("SOCIABLE_MOUNT_MODE"):  # the whole suite by the other way to show layers
    SMALL_IMAGES += f'mount_mode = "{os.environ["SOCIABLE_MOUNT_MODE"]}"\n'
SMALL_IMAGES += "[background_fetch]\ndisable = true\n"  # many tests count what was fetched


@pytest.fixture(scope="session")
def stack_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes folders for stacks: short paths, on a real file system where we are root."""
    del tmp_path_factory  # its paths are too long for sockets
    parent = cache_folder() / "run" if os.geteuid() == 0 else Path(tempfile.gettempdir()) / f"sociable-{os.geteuid()}"
    parent.mkdir(parents=True, exist_ok=True)
    clean_stale(parent, _PREFIX)
    return lambda: Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))


@pytest.fixture(scope="session")
def make_stack(stack_folder: Callable[[], Path]) -> Iterator[Callable[..., Stack]]:
    """Starts a private `Stack` with the given keyword arguments; it ends with the session."""
    with ExitStack() as open_now:

        def make(**options: Any) -> Stack:
            options.setdefault("settings", SMALL_IMAGES)
            return open_now.enter_context(Stack(stack_folder(), **options))

        yield make


@pytest.fixture(scope="session")
def daemons(make_stack: Callable[..., Stack]) -> Stack:
    """NATS and two registries; needs no root."""
    return make_stack(registries=2, services=(), containerd=False)


@pytest.fixture(scope="session")
def nats_url(daemons: Stack) -> str:
    """A real NATS server with JetStream."""
    return daemons.nats_url


@pytest.fixture(scope="session")
def registry(daemons: Stack) -> str:
    """``127.0.0.1:port`` of a real registry that speaks plain HTTP."""
    return daemons.registry


@pytest.fixture
def proxy(registry: str) -> Iterator[Proxy]:
    """A counting, spoiling proxy before `registry`, fresh for each test."""
    with Proxy(registry) as running:
        yield running


@pytest.fixture(scope="session")
def bare_stack(make_stack: Callable[..., Stack]) -> Stack:
    """NATS, a registry and containerd, without our services. Root."""
    return make_stack(services=())


@pytest.fixture(scope="session")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """Everything: NATS, a registry, containerd with CRI, our services with two fetchers. Root."""
    return make_stack(fetchers=2, cri=True)
