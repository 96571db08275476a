# SPDX-License-Identifier: Apache-2.0
"""Images with zstd layers: lazy like others, frame by frame where there are frames, and the same as unpacked ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from soci_dev import image
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy
from support.images import _TORTURE, implied_directories
from support.treecmp import differences, look

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

FRAME = 1 << 20
KINDS: tuple[tuple[image.Compression, int], ...] = (
    ("gzip", 0),
    ("zstd", FRAME),
    ("zstd", 0),
    ("zstd", FRAME),
    ("gzip", 0),
)
"""How each of the torture image's layers is compressed here, and with frames of how many bytes."""


@pytest.fixture(scope="module")
def own_stack(make_stack: Callable[..., Stack]) -> Stack:
    """A stack that no other test pulls this image's layers into: what they hold others hold too, in gzip."""
    return make_stack()


@pytest.fixture
def proxy(own_stack: Stack) -> Iterator[Proxy]:
    with Proxy(own_stack.registry) as running:
        yield running
    for name in own_stack.ctr("images", "ls", "-q").stdout.split():
        own_stack.ctr("images", "rm", "--sync", name)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> image.Image:
    """The torture image, its layers compressed in every way there is."""
    folder = tmp_path_factory.mktemp("mixed")
    layers = [
        image.add_layer(folder, make(), compression=kind, frame_bytes=frame_bytes)
        for make, (kind, frame_bytes) in zip(_TORTURE, KINDS, strict=True)
    ]
    return image.write_image(folder, layers, cmd=["/bin/sh", "/hello"])


def equal_to_overlayfs(stack: Stack, built: image.Image, reference: str) -> None:
    """Path by path, what our snapshotter shows is what containerd unpacks onto overlayfs."""
    stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    chain = lazy.top_chain(built)
    timeless = frozenset(implied_directories() | {""})
    with lazy.rootfs(stack, "sociable", chain) as ours, lazy.rootfs(stack, "overlayfs", chain) as theirs:
        found, unpacked = look(ours, timeless=timeless), look(theirs, timeless=timeless)
    assert len(unpacked) > 3000
    assert differences(found, unpacked) == []


def test_layers_of_every_compression_are_lazy_and_right(own_stack: Stack, proxy: Proxy, mixed: image.Image) -> None:
    """Frames, one frame, and gzip in one image: shown at once, most bytes left where they are, and equal to overlayfs;
    the index is proven; a container runs."""
    reference = lazy.push(mixed, proxy, "mixed")
    lazy.build_index(own_stack, reference, span_size=FRAME)
    assert "is proven" in lazy.good(lazy.soci(own_stack, "index", "verify", "--plain-http", reference))
    proxy.reset()
    assert lazy.good(lazy.soci(own_stack, "run", "--plain-http", reference)).startswith("hello\n")
    (launched,) = lazy.launches(own_stack, reference)
    assert lazy.modes(launched) == ["lazy"] * len(KINDS)
    framed = mixed.layers[1]
    moved = sum(count.body_bytes for path, count in proxy.counts.paths.items() if framed["digest"] in path)
    assert moved < framed["size"] / 4
    equal_to_overlayfs(own_stack, mixed, reference)


def test_zstd_layers_without_a_ztoc_come_whole(own_stack: Stack, proxy: Proxy, mixed: image.Image) -> None:
    """We unpack them ourselves, like gzip ones, to the same tree."""
    reference = lazy.push(mixed, proxy, "mixed-whole")
    least = str(max(layer["size"] for layer in mixed.layers))
    lazy.good(lazy.soci(own_stack, "index", "build", "--min-layer-size", least, reference))
    lazy.good(lazy.soci(own_stack, "pull", "--plain-http", reference))
    (launched,) = lazy.launches(own_stack, reference)
    assert lazy.modes(launched) == ["whole", "lazy", "whole", "whole", "whole"]
    equal_to_overlayfs(own_stack, mixed, reference)
