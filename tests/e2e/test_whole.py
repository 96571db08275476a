# SPDX-License-Identifier: Apache-2.0
"""Layers that come whole: by the administrator's choice, without an index, and where that is sooner than lazily."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci.digest import Digest
from soci_containerd import connect
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy
from support.images import implied_directories, torture_image
from support.treecmp import differences, look

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

PARALLEL = """
[pull_modes.parallel_pull_unpack]
enable = true
max_concurrent_unpacks_per_image = 2
concurrent_download_chunk_size = "256kb"
discard_unpacked_layers = true
"""


@pytest.fixture(scope="module")
def parallel(make_stack: Callable[..., Stack]) -> Stack:
    """A stack that loads nothing lazily."""
    return make_stack(settings=PARALLEL)


USUAL = '[sociable]\nwhole_fallback = "always"\n'


@pytest.fixture(scope="module")
def usual(make_stack: Callable[..., Stack]) -> Stack:
    """A stack as it is without settings, but for what an image without an index gets."""
    return make_stack(settings=USUAL)


@pytest.fixture
def proxy(usual: Stack) -> Iterator[Proxy]:
    with Proxy(usual.registry) as running:
        yield running


def test_a_parallel_pull_equals_containerds(parallel: Stack) -> None:
    """Every layer is downloaded in chunks, once, and unpacked side by side, to what containerd unpacks path by path."""
    built = torture_image()
    with Proxy(parallel.registry) as proxy:
        reference = lazy.push(built, proxy, "parallel")
        proxy.reset()
        lazy.good(lazy.soci(parallel, "pull", "--plain-http", reference))
        moved = proxy.counts.body_bytes
        (launched,) = lazy.launches(parallel, reference)
        assert lazy.modes(launched) == ["whole"] * len(built.layers)
        assert built.size * 0.9 < moved < built.size * 1.1
        parallel.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    chain = lazy.top_chain(built)
    timeless = frozenset(implied_directories() | {""})  # the root is the container's own new directory
    with lazy.rootfs(parallel, "sociable", chain) as ours, lazy.rootfs(parallel, "overlayfs", chain) as theirs:
        unpacked = look(theirs, timeless=timeless)
        assert differences(look(ours, timeless=timeless), unpacked) == []
    assert len(unpacked) > 3000
    assert list((parallel.root / "snapshotter" / "unpack").iterdir()) == []


def test_an_image_without_an_index_comes_whole(usual: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """As a fallback, nothing is left to containerd; the reason is that there is no index."""
    reference = lazy.push(lazy.seeded_image(tmp_path), proxy, "plain")
    assert lazy.good(lazy.soci(usual, "run", "--plain-http", reference)).startswith("hello\n")
    (launched,) = lazy.launches(usual, reference)
    assert lazy.modes(launched) == ["whole", "whole"]
    assert "index" in launched["layers"][0]["why"]


def test_a_small_layer_comes_whole_and_a_large_one_lazily(usual: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """A layer of a megabyte is sooner here than mounted; one of eight is mounted, and most of it does not move."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "regret")
    lazy.build_index(usual, reference)
    proxy.reset()
    assert lazy.good(lazy.soci(usual, "run", "--plain-http", reference)).startswith("hello\n")
    (launched,) = lazy.launches(usual, reference)
    assert lazy.modes(launched) == ["whole", "lazy"]
    assert "sooner here whole" in launched["layers"][0]["why"]
    assert proxy.counts.body_bytes < built.size / 2


def with_settings(stack: Stack, settings: str) -> None:
    """Start the snapshotter anew, with these."""
    stack.stop("snapshotter")
    (stack.folder / "services.toml").write_text(settings)
    stack.start("snapshotter")


async def stored(stack: Stack, digests: list[str]) -> list[bool]:
    """Which of them containerd's content store has."""
    async with connect(str(stack.containerd_address), stack.namespace) as client:
        return [await client.content.exists(Digest(digest)) for digest in digests]


async def test_blobs_are_kept_for_who_wants_to_push(usual: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """With containerd's content store every blob of a whole layer is in it for as long as the image, and was downloaded
    once; where unpacked layers are to be discarded, none is."""
    keep = f'[content_store]\ntype = "containerd"\ncontainerd_address = "{usual.containerd_address}"\n'
    discard = "[pull_modes.parallel_pull_unpack]\ndiscard_unpacked_layers = true\n"
    try:
        for name, settings, kept in (("keep", USUAL + keep, True), ("discard", USUAL + keep + discard, False)):
            with_settings(usual, settings)
            built = lazy.seeded_image(tmp_path / name, seed=secrets.randbelow(1 << 30))
            digests = [str(layer["digest"]) for layer in built.layers]
            reference = lazy.push(built, proxy, name)
            proxy.reset()
            lazy.good(lazy.soci(usual, "pull", "--plain-http", reference))
            assert proxy.counts.body_bytes < 1.1 * built.size
            (launched,) = lazy.launches(usual, reference)
            assert lazy.modes(launched) == ["whole"] * len(digests)
            usual.ctr("images", "tag", reference, "none.example/x:1")
            usual.ctr("images", "rm", "--sync", "none.example/x:1")  # collects garbage
            assert await stored(usual, digests) == [kept] * len(digests)
            exported = usual.ctr("images", "export", str(tmp_path / f"{name}.tar"), reference, check=False)
            assert (exported.returncode == 0) is kept
            usual.ctr("images", "rm", "--sync", reference)
            assert await stored(usual, digests) == [False] * len(digests)
    finally:
        with_settings(usual, USUAL)
