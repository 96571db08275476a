# SPDX-License-Identifier: Apache-2.0
"""Containers whose layers do not fit into the span cache's budget: right bytes, and a cache that stays small."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SEED = 815
BUDGET = 6 << 20
LIMIT = 30.0
ROUNDS = 2


@pytest.fixture
def small(make_stack: Callable[..., Stack]) -> Stack:
    """Two fetchers on a node whose cache holds less than the image has, and that fills in the background, too."""
    settings = (
        f"[sociable]\nno_regret = false\ncache_budget = {BUDGET}\n[background_fetch]\nsilence_period_msec = 100\n"
    )
    return make_stack(settings=settings, fetchers=2)


def used(stack: Stack) -> int:
    """Bytes that the cache takes."""
    place = stack.root / "cache/layers"
    return sum(path.lstat().st_blocks * 512 for path in place.glob("*/*/*"))


def forget(stack: Stack) -> None:
    """Have the kernel forget the files' pages, so that the next read asks the mounter."""
    for path in (stack.root / "mounts").glob("*/data/*"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_cache_smaller_than_the_image(small: Stack, tmp_path: Path) -> None:
    """Every file is read side by side, again and again, by containers: each byte is right, while spans go and come.
    In the end the cache is within its budget, without anybody having asked."""
    built = lazy.seeded_image(tmp_path, seed=SEED)
    expected = {f"/data/{i}": hashlib.sha256(lazy.data_file(SEED, i)).hexdigest() for i in range(lazy.DATA_FILES)}
    script = "for i in 0 1 2 3 4 5 6 7; do /bin/busybox sha256sum /data/$i & done; wait"
    with Proxy(small.registry) as proxy:
        reference = lazy.push(built, proxy, "small")
        lazy.build_index(small, reference)
        for _ in range(ROUNDS):
            out = lazy.good(lazy.soci(small, "run", "--plain-http", reference, "/bin/sh", "-c", script))
            found = {name: digest for digest, name in (line.split() for line in out.splitlines())}
            assert found == expected
            forget(small)
        ends = time.monotonic() + LIMIT
        while used(small) > BUDGET:
            assert time.monotonic() < ends, f"the cache takes {used(small)} bytes of {BUDGET}"
            time.sleep(0.1)
    log = "".join(path.read_text() for path in small.logs.glob("fetcher*"))
    assert '"why": "budget"' in log or "why=budget" in log
    words = ("--root", str(small.root), "cache", "info", "--json")
    info = json.loads(lazy.good(lazy.soci(small, *words)))
    assert info["budget"] == BUDGET
    assert info["layers"] == 2
    assert info["spans"]["here"] < info["spans"]["all"]
