# SPDX-License-Identifier: Apache-2.0
"""When an image cannot be loaded lazily it comes whole, says why, and runs; no container ever sees a wrong byte."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from soci_dev import image
from soci_dev.faults import Corrupt, Fault, Hook, Seen
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

READ_DEADLINE = 3.0
AGAIN_SECONDS = 15.0


@pytest.fixture(scope="module")
def short_stack(make_stack: Callable[..., Stack]) -> Stack:
    """A stack whose reads give up after `READ_DEADLINE` seconds."""
    settings = f"[sociable]\nno_regret = false\nread_deadline_sec = {READ_DEADLINE}\nindex_failure_ttl_sec = 0\n"
    return make_stack(settings=settings)


@pytest.fixture
def proxy(short_stack: Stack) -> Iterator[Proxy]:
    with Proxy(short_stack.registry) as running:
        yield running


def only(layer: str, fault: Fault) -> Hook:
    """A hook that gives ``fault`` to every read of this blob."""
    return lambda seen: fault if seen.is_blob and layer in seen.path else None


def test_an_image_without_an_index_comes_whole_and_says_so(short_stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """With no index, containerd downloads and unpacks the layers, and the launch names the reason."""
    reference = lazy.push(lazy.seeded_image(tmp_path), proxy, "no-index")
    done = lazy.soci(short_stack, "run", "--plain-http", reference)
    assert lazy.good(done).startswith("hello\n")
    (launched,) = lazy.launches(short_stack, reference)
    assert lazy.modes(launched) == ["defer", "defer"]
    assert "has no SOCI index" in launched["no_index"]
    assert "soci index build" in launched["no_index"]


def test_a_damaged_ztoc_makes_its_layer_come_whole(short_stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """A zTOC that is not what its digest says is refused: that layer is unpacked by us, the other one is lazy."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "bad-ztoc")
    made = lazy.build_index(short_stack, reference)
    proxy.hook = only(made["layers"][1]["ztoc"], Corrupt(100))
    words = ("run", "--plain-http", reference, "/bin/busybox", "sha256sum", "/data/5")
    done = lazy.soci(short_stack, *words)
    expected = checksum(tmp_path)
    assert lazy.good(done).split()[0] == expected
    (launched,) = lazy.launches(short_stack, reference)
    assert lazy.modes(launched) == ["lazy", "whole"]
    assert made["layers"][1]["ztoc"][:20] in launched["layers"][1]["why"]


def checksum(layout: Path) -> str:
    """The checksum of ``/data/5`` in the image of this layout, from its own layer blob."""
    built = image.read_image(layout)
    assert built is not None
    blob = layout / "blobs" / "sha256" / built.layers[1]["digest"].removeprefix("sha256:")
    with tarfile.open(blob) as tar:
        file = tar.extractfile("data/5")
        assert file is not None
        return hashlib.sha256(file.read()).hexdigest()


def test_a_layer_that_is_not_in_the_index_comes_whole(short_stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """The indexer skips layers under its minimum; the snapshotter unpacks those itself and the rest stays lazy."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "sparse")
    smallest = str(built.layers[0]["size"] + 1)
    lazy.good(lazy.soci(short_stack, "index", "build", "--min-layer-size", smallest, reference))
    proxy.reset()
    assert lazy.good(lazy.soci(short_stack, "run", "--plain-http", reference)).startswith("hello\n")
    (launched,) = lazy.launches(short_stack, reference)
    assert lazy.modes(launched) == ["whole", "lazy"]
    assert "has no zTOC for it" in launched["layers"][0]["why"]
    assert proxy.counts.body_bytes < built.size / 2


def test_a_span_that_never_matches_is_an_error_and_never_a_wrong_byte(
    short_stack: Stack, proxy: Proxy, tmp_path: Path
) -> None:
    """While the registry gives wrong bytes a read fails with EIO; once it gives right ones the same file reads well,
    with nothing restarted."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "corrupt")
    lazy.build_index(short_stack, reference)
    lazy.good(lazy.soci(short_stack, "pull", "--plain-http", reference))
    proxy.hook = only(built.layers[1]["digest"], Corrupt(0))
    with lazy.rootfs(short_stack, "sociable", lazy.top_chain(built)) as root:
        with pytest.raises(OSError, match="Input/output error"):
            (root / "data" / "5").read_bytes()
        assert (root / "hello").read_bytes().startswith(b"echo hello"), "other layers are not touched by it"
        proxy.hook = None
        assert hashlib.sha256(read_again(root / "data" / "5")).hexdigest() == checksum(tmp_path)


def read_again(path: Path) -> bytes:
    """A file's bytes after a fault, within seconds: a try that is under way from before may still fail."""
    deadline = time.monotonic() + AGAIN_SECONDS
    while True:
        try:
            return path.read_bytes()
        except OSError:
            if time.monotonic() > deadline:
                raise


def test_a_registry_that_is_away_is_an_error_and_then_comes_back(
    short_stack: Stack, proxy: Proxy, tmp_path: Path
) -> None:
    """Names and attributes are always there; bytes that are not fail with EIO after the deadline, and read well once
    the registry is back."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "away")
    lazy.build_index(short_stack, reference)
    lazy.good(lazy.soci(short_stack, "pull", "--plain-http", reference))
    short_stack.stop("registry")
    try:
        with lazy.rootfs(short_stack, "sociable", lazy.top_chain(built)) as root:
            assert sorted(path.name for path in (root / "data").iterdir()) == [str(i) for i in range(lazy.DATA_FILES)]
            with pytest.raises(OSError, match="Input/output error"):
                (root / "data" / "5").read_bytes()
            short_stack.start("registry")
            found = hashlib.sha256(read_again(root / "data" / "5")).hexdigest()
    finally:
        if short_stack.daemons["registry"].returncode is not None:
            short_stack.start("registry")
    assert found == checksum(tmp_path)


def test_an_unreachable_registry_fails_the_pull_with_its_name(short_stack: Stack) -> None:
    """The message names the registry; nothing hangs."""
    done = lazy.soci(short_stack, "pull", "--plain-http", "127.0.0.1:1/nothing:1")
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert done.stderr.startswith("soci: ")


def test_a_hook_sees_ranges(proxy: Proxy) -> None:
    """The faults above reach ranged reads too: the hook is asked for each request."""
    seen: list[Seen] = []
    proxy.hook = seen.append
    httpx.get(f"http://{proxy.address}/v2/", headers={"Range": "bytes=0-1"})
    assert seen[0].range == "bytes=0-1"
