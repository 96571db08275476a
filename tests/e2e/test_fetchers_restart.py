# SPDX-License-Identifier: Apache-2.0
"""Fetchers stopped and started one after the other, as an upgrade does it, while files are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from soci_dev.faults import Delay, Seen
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

FETCHERS = 3
SEED = 78


def test_an_upgrade_of_all_fetchers_fails_no_read(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    """Every file reads right, no read is told as failed, and what a stopped fetcher had taken is not fetched again."""
    stack = make_stack(fetchers=FETCHERS)
    built = lazy.seeded_image(tmp_path, seed=SEED)
    asked: list[str] = []

    def hook(seen: Seen) -> Delay | None:
        if not seen.is_blob:
            return None
        asked.append(f"{seen.path} {seen.range}")
        return Delay(1.0)

    def read(path: Path) -> tuple[int, str]:
        return int(path.name), hashlib.sha256(path.read_bytes()).hexdigest()

    with Proxy(stack.registry) as proxy:
        reference = lazy.push(built, proxy, "upgraded")
        lazy.build_index(stack, reference, span_size=1 << 16)
        lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
        proxy.hook = hook
        with lazy.rootfs(stack, "sociable", lazy.top_chain(built)) as root, ThreadPoolExecutor(2) as readers:
            reading = [readers.submit(read, path) for path in sorted((root / "data").iterdir())]
            for number in range(1, FETCHERS + 1):
                assert stack.stop(f"fetcher-{number}") == 0
                stack.start(f"fetcher-{number}")
            found = dict(future.result() for future in reading)
    assert found == {
        number: hashlib.sha256(lazy.data_file(SEED, number)).hexdigest() for number in range(lazy.DATA_FILES)
    }
    assert len(asked) == len(set(asked))
    launched = lazy.launch(stack, lazy.launches(stack, reference)[-1]["id"])
    assert launched["miss_count"] > 0
    assert launched["failed_reads"] == 0
