# SPDX-License-Identifier: Apache-2.0
"""The store that is a folder: an OCI image layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from soci.digest import parse_digest, sha256_digest
from soci.errors import FailedPrecondition, LimitExceeded, Mismatch, NotFound
from soci.oci import OCI_MANIFEST, Descriptor
from soci_indexing.stores import LayoutStore

BLOB = b"some bytes"
BARE = Descriptor("application/octet-stream", sha256_digest(BLOB), len(BLOB))


@pytest.fixture
def store(tmp_path: Path) -> LayoutStore:
    return LayoutStore(tmp_path / "root")


async def whole(store: LayoutStore, descriptor: Descriptor) -> bytes:
    return b"".join([chunk async for chunk in store.stream(descriptor.digest)])


async def test_a_blob_is_stored_once_and_read_back(store: LayoutStore) -> None:
    """Pushing says whether the blob is new; reading whole and in chunks gives its bytes."""
    assert await store.info(BARE.digest) is None
    assert await store.push(BARE, BLOB) is True
    assert await store.push(BARE, BLOB) is False
    assert await store.info(BARE.digest) == 10
    assert await store.read(BARE.digest, limit=10) == BLOB
    assert await whole(store, BARE) == BLOB
    assert [found async for found in store.digests()] == [(BARE.digest, 10)]


async def test_the_folder_is_an_image_layout(store: LayoutStore, tmp_path: Path) -> None:
    """Marker, listing, blobs and their modes are where any reader of layouts looks for them."""
    await store.push(BARE, BLOB)
    folder = tmp_path / "root" / "content"
    assert (folder / "oci-layout").read_bytes() == b'{"imageLayoutVersion":"1.0.0"}'
    assert (folder / "index.json").read_bytes() == b'{"schemaVersion":2,"manifests":[]}'
    assert (folder / "blobs" / "sha256" / BARE.digest.removeprefix("sha256:")).read_bytes() == BLOB
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700
    assert list((folder / "ingest").iterdir()) == []


async def test_manifests_are_listed_once(store: LayoutStore, tmp_path: Path) -> None:
    """A blob with a manifest's type is in index.json, once, until it is deleted; members of others stay."""
    manifest = Descriptor(OCI_MANIFEST, sha256_digest(BLOB), len(BLOB))
    listing = tmp_path / "root" / "content" / "index.json"
    await store.push(BARE, BLOB)
    listing.write_text('{"schemaVersion":2,"manifests":[{"digest":"sha256:other"}],"annotations":{"a":"b"}}')
    await store.push(manifest, BLOB)
    await store.push(manifest, BLOB)
    assert json.loads(listing.read_text()) == {
        "schemaVersion": 2,
        "manifests": [
            {"digest": "sha256:other"},
            {"mediaType": OCI_MANIFEST, "digest": manifest.digest, "size": 10},
        ],
        "annotations": {"a": "b"},
    }
    await store.delete(manifest.digest)
    await store.delete(manifest.digest)
    assert json.loads(listing.read_text())["manifests"] == [{"digest": "sha256:other"}]
    assert await store.info(manifest.digest) is None


async def test_only_what_was_promised_is_stored(store: LayoutStore) -> None:
    """Other bytes, or of another size, are refused and leave nothing."""
    wrong_size = Descriptor("x", BARE.digest, 11)
    for descriptor, content in ((BARE, b"some bytez"), (BARE, b"some bytes."), (wrong_size, BLOB)):
        with pytest.raises(Mismatch):
            await store.push(descriptor, content)
    assert await store.info(BARE.digest) is None


async def test_damage_is_found_when_read(store: LayoutStore) -> None:
    """A blob whose bytes changed is `Mismatch`, whole or in chunks; one that a crash cut short is written again."""
    await store.push(BARE, BLOB)
    store.path(BARE.digest).write_bytes(b"other text")
    with pytest.raises(Mismatch):
        await store.read(BARE.digest, limit=10)
    with pytest.raises(Mismatch):
        await whole(store, BARE)
    store.path(BARE.digest).write_bytes(b"some")
    assert await store.push(BARE, BLOB) is True
    assert await store.read(BARE.digest, limit=10) == BLOB


async def test_refusals(store: LayoutStore, tmp_path: Path) -> None:
    """Absent blobs, too large ones, absent parents and a damaged listing each have their own error."""
    with pytest.raises(NotFound):
        await store.read(BARE.digest, limit=10)
    with pytest.raises(NotFound):
        await whole(store, BARE)
    await store.delete(BARE.digest)
    await store.push(BARE, BLOB)
    with pytest.raises(LimitExceeded):
        await store.read(BARE.digest, limit=9)
    with pytest.raises(NotFound):
        await LayoutStore(tmp_path / "a" / "b").push(BARE, BLOB)
    (tmp_path / "root" / "content" / "index.json").write_text("[]")
    with pytest.raises(FailedPrecondition, match="not an image layout"):
        await store.push(Descriptor(OCI_MANIFEST, BARE.digest, 10), BLOB)


async def test_strangers_among_the_blobs_are_passed_over(store: LayoutStore) -> None:
    """Listing gives only files that are named like blobs."""
    await store.push(BARE, BLOB)
    folder = store.path(BARE.digest).parent
    (folder / "README").write_text("x")
    (folder / ("0" * 64)).mkdir()
    assert [found async for found in store.digests()] == [(BARE.digest, 10)]


async def test_processes_do_not_lose_each_others_manifests(store: LayoutStore, tmp_path: Path) -> None:
    """Several processes that push manifests at once: all blobs are there, all are listed."""
    code = f"""
import asyncio, sys
from pathlib import Path
from soci.digest import sha256_digest
from soci.oci import OCI_MANIFEST, Descriptor
from soci_indexing.stores import LayoutStore
async def main():
    store = LayoutStore(Path({str(tmp_path / "root")!r}))
    for number in range(20):
        content = f"{{sys.argv[1]}}-{{number}}".encode()
        await store.push(Descriptor(OCI_MANIFEST, sha256_digest(content), len(content)), content)
asyncio.run(main())
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(3)]
    assert [process.wait(50) for process in running] == [0, 0, 0]
    listed = json.loads((tmp_path / "root" / "content" / "index.json").read_text())["manifests"]
    assert len({entry["digest"] for entry in listed}) == len(listed) == 60
    for entry in listed:
        assert await store.info(parse_digest(entry["digest"])) == entry["size"]
