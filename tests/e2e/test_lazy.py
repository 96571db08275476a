# SPDX-License-Identifier: Apache-2.0
"""Images through containerd, the services, NATS, FUSE and overlayfs, all real: what a user's container sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy
from support.images import implied_directories, torture_image
from support.treecmp import differences, look

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.registry) as running:
        yield running


def test_the_lazy_root_file_system_equals_the_unpacked_one(stack: Stack, proxy: Proxy) -> None:
    """Path by path, the lazy image shows what containerd unpacks onto overlayfs: type, mode, owner, size, time,
    link target, link count and twins, device number, extended attributes and content."""
    built = torture_image()
    reference = lazy.push(built, proxy, "torture")
    lazy.build_index(stack, reference, span_size=1 << 20)
    proxy.reset()
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    (launched,) = lazy.launches(stack, reference)
    assert lazy.modes(launched) == ["lazy"] * len(built.layers)
    assert proxy.counts.body_bytes < built.size * 0.2, "the layers are shown, and most bytes did not move"

    stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    chain = lazy.top_chain(built)
    timeless = frozenset(implied_directories() | {""})  # the root is the container's own new directory
    with lazy.rootfs(stack, "sociable", chain) as ours, lazy.rootfs(stack, "overlayfs", chain) as theirs:
        lazily, unpacked = look(ours, timeless=timeless), look(theirs, timeless=timeless)
    assert len(unpacked) > 3000
    assert differences(lazily, unpacked) == []


def test_a_container_runs_before_its_image_is_here(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """`soci run` prints what the program prints, passes its exit status, and leaves most of the image where it is."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "runs")
    lazy.build_index(stack, reference)
    proxy.reset()
    assert lazy.good(lazy.soci(stack, "run", "--plain-http", reference)).startswith("hello\n")
    assert proxy.counts.body_bytes < built.size / 2
    failing = lazy.soci(stack, "run", "--plain-http", reference, "/bin/sh", "-c", "exit 42")
    assert failing.returncode == 42

    first, second = lazy.launches(stack, reference)
    assert lazy.modes(first) == ["lazy", "lazy"]
    assert first["by"] == "pull"
    assert first["container_at"] is not None
    assert second["by"] == "container"
    shown = lazy.launch(stack, first["id"])
    assert shown["miss_count"] == len(shown["misses"]) > 0
    assert {miss["path"] for miss in shown["misses"]} >= {"bin/busybox"}
    assert shown["fetched_bytes"] > 0


def test_what_was_fetched_once_is_not_fetched_again(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """A second container reads what the first one read without a request to the registry."""
    reference = lazy.push(lazy.seeded_image(tmp_path), proxy, "twice")
    lazy.build_index(stack, reference)
    words = ("run", "--plain-http", reference, "/bin/busybox", "sha256sum", "/data/3")
    first = lazy.good(lazy.soci(stack, *words))
    proxy.reset()
    assert lazy.good(lazy.soci(stack, *words)) == first
    assert proxy.counts.get == 0


def test_two_fetchers_share_the_work(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Spans asked for side by side are fetched once each, whichever fetcher of the group takes the ask."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "shared")
    lazy.build_index(stack, reference)
    script = "for i in 0 1 2 3 4 5 6 7; do /bin/busybox sha256sum /data/$i & done; wait"
    proxy.reset()
    lazy.good(lazy.soci(stack, "run", "--plain-http", reference, "/bin/sh", "-c", script))
    data = built.layers[1]
    (count,) = [count for path, count in proxy.counts.paths.items() if data["digest"] in path]
    assert count.body_bytes <= data["size"] * 1.05


def test_removing_the_image_takes_its_mounts_away(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """After the image is gone and containerd has collected garbage, no directory shows its layers any more."""
    reference = lazy.push(lazy.seeded_image(tmp_path), proxy, "goes")
    lazy.build_index(stack, reference)
    before = set((stack.root / "mounts").iterdir())
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    shown = set((stack.root / "mounts").iterdir()) - before
    assert len(shown) == 2
    stack.ctr("images", "rm", "--sync", reference)
    left = set((stack.root / "mounts").iterdir())
    assert not left & shown
