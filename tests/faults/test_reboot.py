# SPDX-License-Identifier: Apache-2.0
"""A machine that went down hard and comes up with the registry away: lazy images are lazy still, and run."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from soci_cache.presence import HEADER, boot_id
from soci_dev import leftovers
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SEED = 4711


@pytest.fixture
def machine(make_stack: Callable[..., Stack]) -> Stack:
    """A node of one's own, whose reads give up soon."""
    return make_stack(settings="[sociable]\nno_regret = false\nread_deadline_sec = 3\n")


def power_cycle(stack: Stack) -> int:
    """Kill everything, take every mount away, and have the cache's marks be of another boot; how many layers have any.

    A boot changes three things here: no process, no mount, and another boot id. The last cannot be changed, so the
    marks are dated back instead.
    """
    names = [name for name in stack.daemons if name != "registry"]
    for name in names:
        stack.kill(name)
    leftovers.unmount_below(stack.folder)
    maps = list((stack.root / "cache" / "layers").glob("*/*/spans"))
    other = str(uuid.uuid4()).encode()
    for path in maps:
        content = path.read_bytes()
        assert content[:HEADER].count(boot_id().encode()) == 1
        path.write_bytes(content[:HEADER].replace(boot_id().encode(), other) + content[HEADER:])
    for name in names:
        stack.start(name)
    return len(maps)


def test_after_a_reboot_lazy_images_run_without_the_registry(machine: Stack, tmp_path: Path) -> None:
    """What was read before is there, proved again by its journal; what was not fails with an error in its time, and
    reads right once the registry is back. No layer was unpacked, and the snapshots are those of before."""
    built = lazy.seeded_image(tmp_path, seed=SEED)
    expected = {number: hashlib.sha256(lazy.data_file(SEED, number)).hexdigest() for number in (2, 6)}
    with Proxy(machine.registry) as proxy:
        reference = lazy.push(built, proxy, "reboot")
        lazy.build_index(machine, reference)

        def checksum(number: int) -> tuple[int, str]:
            words = (
                "run",
                "--plain-http",
                "--pull",
                "never",
                reference,
                "/bin/busybox",
                "sha256sum",
                f"/data/{number}",
            )
            done = lazy.soci(machine, *words)
            return done.returncode, (done.stdout.split() or [""])[0]

        lazy.good(lazy.soci(machine, "pull", "--plain-http", reference))
        assert checksum(2) == (0, expected[2])
        before = machine.ctr("snapshots", "--snapshotter", "sociable", "ls").stdout
        machine.stop("registry")
        assert power_cycle(machine) == len(built.layers)
        proxy.reset()
        assert checksum(2) == (0, expected[2])
        assert proxy.counts.body_bytes == 0
        assert checksum(6)[0] != 0
        assert machine.ctr("snapshots", "--snapshotter", "sociable", "ls").stdout == before
        machine.start("registry")
        assert checksum(6) == (0, expected[6])
        moved = proxy.counts.body_bytes
    assert 0 < moved < built.size / 2, "lazy still"
