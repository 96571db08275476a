# SPDX-License-Identifier: Apache-2.0
"""Background fill by real services: a node that is left alone needs its registry no more."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from soci_cache.presence import HEADER
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

FILL_SECONDS = 60.0
SETTINGS = """\
[sociable]
no_regret = false
[background_fetch]
silence_period_msec = 300
"""


def holes(stack: Stack) -> int:
    """Spans of all lazy layers that are not here; -1 where no layer is."""
    maps = [path.read_bytes()[HEADER:] for path in (stack.root / "cache" / "layers").glob("*/*/spans")]
    return sum(one.count(0) for one in maps) if maps else -1


def test_a_launch_is_filled_and_then_needs_no_registry(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    """After a while without reads all spans are here, each fetched once, and files read right without any registry."""
    stack = make_stack(fetchers=2, settings=SETTINGS)
    built = lazy.seeded_image(tmp_path, seed=77)
    with Proxy(stack.registry) as proxy:
        reference = lazy.push(built, proxy, "filled")
        lazy.build_index(stack, reference)
        lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
        ends = time.monotonic() + FILL_SECONDS
        while holes(stack) != 0:
            assert time.monotonic() < ends, f"{holes(stack)} spans are still absent"
            time.sleep(0.1)
    stack.kill("registry")
    with lazy.rootfs(stack, "sociable", lazy.top_chain(built)) as root:
        for number in range(lazy.DATA_FILES):
            wanted = hashlib.sha256(lazy.data_file(77, number)).hexdigest()
            assert hashlib.sha256((root / "data" / str(number)).read_bytes()).hexdigest() == wanted
