# SPDX-License-Identifier: Apache-2.0
"""Blobs of whole layers in a real containerd's content store: there as long as the image is, and no longer."""

from __future__ import annotations

import secrets
import tarfile
from pathlib import Path

import pytest

from soci.digest import Digest
from soci.errors import FailedPrecondition, Mismatch, Unavailable
from soci_containerd import connect
from soci_dev import image
from soci_dev.stack import Stack
from soci_snapshotter.keeping import ContentKeeper
from soci_snapshotter.whole import Arrived, WantedLayer
from support.lazy import seeded_image

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]


def arrived(stack: Stack, reference: str, built: image.Image, number: int) -> Arrived:
    """A layer of the image as it is when its blob is whole."""
    layer = built.layers[number]
    digest = Digest(layer["digest"])
    wanted = WantedLayer(digest, layer["size"], layer["mediaType"], digest)
    path = built.folder / "blobs/sha256" / digest.partition(":")[2]
    return Arrived(reference, Digest(built.digest), stack.namespace, wanted, layer["size"], path)


async def content(stack: Stack, digest: str) -> bool:
    async with connect(str(stack.containerd_address), stack.namespace) as client:
        return await client.content.exists(Digest(digest))


async def test_kept_as_long_as_the_image(bare_stack: Stack, tmp_path: Path) -> None:
    """An image of which containerd has no layer blob can be exported once they are kept; garbage collection leaves them
    until the image goes."""
    stack = bare_stack
    built = seeded_image(tmp_path / "image")
    reference = image.push(built, stack.registry, "kept/" + secrets.token_hex(6))
    layers = [str(layer["digest"]) for layer in built.layers]
    stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    stack.ctr("content", "rm", *layers)
    assert stack.ctr("images", "export", str(tmp_path / "no.tar"), reference, check=False).returncode != 0
    keeper = ContentKeeper(str(stack.containerd_address))
    for number in range(2):
        await keeper.keep(arrived(stack, reference, built, number))
        await keeper.keep(arrived(stack, reference, built, number))  # here already: nothing happens
    collect_garbage(stack)
    assert [await content(stack, layer) for layer in layers] == [True, True]
    stack.ctr("images", "export", str(tmp_path / "image.tar"), reference)
    with tarfile.open(tmp_path / "image.tar") as archive:
        assert {f"blobs/sha256/{layer.partition(':')[2]}" for layer in layers} <= set(archive.getnames())
    stack.ctr("images", "rm", "--sync", reference)
    assert [await content(stack, layer) for layer in layers] == [False, False]


def collect_garbage(stack: Stack) -> None:
    """Forget an image and wait for the collection that follows."""
    stack.ctr("images", "tag", stack.ctr("images", "ls", "-q").stdout.split()[0], "none.example/x:1")
    stack.ctr("images", "rm", "--sync", "none.example/x:1")


async def test_labels_of_our_own_keep_it(bare_stack: Stack, tmp_path: Path) -> None:
    """Also where the manifest that the client stored refers to no layer by itself."""
    stack = bare_stack
    built = seeded_image(tmp_path / "image")
    reference = image.push(built, stack.registry, "kept/" + secrets.token_hex(6))
    stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    layer = str(built.layers[1]["digest"])
    stack.ctr("content", "rm", layer)
    stack.ctr("content", "label", built.digest, *(f"containerd.io/gc.ref.content.l.{number}=" for number in range(2)))
    await ContentKeeper(str(stack.containerd_address)).keep(arrived(stack, reference, built, 1))
    collect_garbage(stack)
    assert await content(stack, layer)
    stack.ctr("images", "rm", "--sync", reference)
    assert not await content(stack, layer)


async def test_what_no_image_wants(bare_stack: Stack, tmp_path: Path) -> None:
    """A blob whose manifest containerd does not have is no error, and is collected."""
    stack = bare_stack
    other = seeded_image(tmp_path / "other")
    reference = image.push(other, stack.registry, "kept/" + secrets.token_hex(6))
    stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    built = seeded_image(tmp_path / "image")
    await ContentKeeper(str(stack.containerd_address)).keep(arrived(stack, reference, built, 0))
    collect_garbage(stack)

    assert not await content(stack, str(built.layers[0]["digest"]))


async def test_what_cannot_be_kept(bare_stack: Stack, tmp_path: Path) -> None:
    """A wrong size, a missing namespace and a containerd that is away are errors of ours."""
    built = seeded_image(tmp_path / "image")
    one = arrived(bare_stack, "r/i:1", built, 0)
    keeper = ContentKeeper(str(bare_stack.containerd_address))
    with pytest.raises(Mismatch):
        await keeper.keep(Arrived(one.image, one.manifest, one.namespace, one.wanted, one.size - 1, one.path))
    with pytest.raises(FailedPrecondition):
        await keeper.keep(Arrived(one.image, one.manifest, "", one.wanted, one.size, one.path))
    with pytest.raises(Unavailable):
        await ContentKeeper(str(tmp_path / "no.sock")).keep(one)
