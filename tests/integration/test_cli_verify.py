# SPDX-License-Identifier: Apache-2.0
"""``soci index verify`` against a real registry: which index it finds, what it says, and its exit status."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, sha256_digest
from soci.index import INDEX_DIGEST_ANNOTATION, SOCI_INDEX_V1, IndexEntry, SociIndex, encode_index, ztoc_entry
from soci.oci import OCI_MANIFEST, Descriptor, Manifest, parse_manifest
from soci.toc import Ztoc
from soci.ztoc import encode_ztoc
from soci_dev import image
from soci_dev.tarball import member
from soci_registry import NoCredentials, Registry, RegistrySettings, Repository
from soci_registry.content import RegistryContent
from support import indexed
from support.images import noise

COMMAND_SECONDS = 50


@dataclass(frozen=True)
class Place:
    """An image of a gzip and a plain layer in a registry."""

    reference: str
    built: image.Image
    subject: Descriptor
    manifest: Manifest

    async def entries(self, repository: Repository, change: Callable[[Ztoc], Ztoc]) -> tuple[IndexEntry, ...]:
        """Push zTOCs for all layers; the first one is changed."""
        found = []
        for number, layer in enumerate(self.manifest.layers):
            ztoc = indexed.zip_ztoc(self.built, number)
            content = encode_ztoc(change(ztoc) if not number else ztoc)
            await repository.push_blob(content)
            found.append(ztoc_entry(layer, sha256_digest(content), len(content), indexed.SPAN_SIZE))
        return tuple(found)


@pytest.fixture
def place(tmp_path: Path, registry: str) -> Place:
    layers = [
        image.add_layer(tmp_path, [member("a", content=noise(1, 300_000)), member("b")]),
        image.add_layer(tmp_path, [member("c", content=noise(2, 100_000))], gzip=False),
    ]
    built = image.write_image(tmp_path, layers)
    raw = (built.folder / "blobs" / "sha256" / built.digest.removeprefix("sha256:")).read_bytes()
    manifest = parse_manifest(raw)
    assert isinstance(manifest, Manifest)
    reference = image.push(built, registry, "v/" + secrets.token_hex(6), "1")
    return Place(reference, built, Descriptor(OCI_MANIFEST, Digest(built.digest), len(raw)), manifest)


async def within(reference: str, work: Callable[[Repository], Awaitable[Digest]]) -> Digest:
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as registry:
        return await work(registry.repository(reference))


async def push_index(place: Place, change: Callable[[Ztoc], Ztoc] = lambda ztoc: ztoc, version: int = 1) -> Digest:
    """Push an index as a builder would; a version 1 is listed as the image's referrer."""

    async def work(repository: Repository) -> Digest:
        entries = await place.entries(repository, change)
        index = SociIndex.v1(entries, place.subject) if version == 1 else SociIndex.v2(entries)
        content = encode_index(index)
        await repository.push_blob(b"{}")
        descriptor = Descriptor(OCI_MANIFEST, sha256_digest(content), len(content), artifact_type=SOCI_INDEX_V1)
        await RegistryContent(repository).push(descriptor, content)
        return descriptor.digest

    return await within(place.reference, work)


def verify(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soci_cli", "index", "verify", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)


def lying(ztoc: Ztoc) -> Ztoc:
    return replace(ztoc, entries=tuple(replace(entry, uid=1000, mode=0o777) for entry in ztoc.entries))


async def test_a_right_index_is_proven(place: Place) -> None:
    """Exit status 0, one line; the index is found as the registry lists it."""
    index = await push_index(place)
    done = verify(place.reference)
    assert (done.returncode, done.stdout) == (
        0,
        f"{place.reference}: index {index} (v1-referrer) is proven\n",
    )
    assert done.stderr.count("proven: ") == 2


async def test_each_defect_is_a_line(place: Place) -> None:
    """Exit status 1; layer and path are named."""
    await push_index(place, lying)
    layer = place.manifest.layers[0].digest
    done = verify(place.reference)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:-1] == [
        f"layer {layer}: path {name}: {what}, the table of contents says {lie}"
        for name in ("a", "b")
        for what, lie in (("owner is 0", "1000"), ("mode is 0o644", "0o777"))
    ]
    assert "4 defects" in done.stderr


async def test_as_json(place: Place) -> None:
    """The same for programs: what was looked at, and every defect with its place."""
    index = await push_index(place, lying)
    done = verify("--json", place.reference)
    assert done.returncode == 1
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["index"], found["version"], found["found_by"], found["proven"]) == (index, 1, "v1-referrer", False)
    assert [layer["compression"] for layer in found["layers"]] == ["gzip", "uncompressed"]
    assert [layer["defects"] for layer in found["layers"]] == [4, 0]
    assert found["defects"][0] == {
        "layer": place.manifest.layers[0].digest,
        "place": "path a",
        "text": "owner is 0, the table of contents says 1000",
    }
    assert done.stderr == ""


async def test_an_explicit_index_is_the_one_that_is_looked_at(place: Place) -> None:
    """By its digest, whatever the registry lists."""
    good = await push_index(place)
    bad = await push_index(place, lying)
    assert verify("--index", good, place.reference).returncode == 0
    assert verify("--index", bad, place.reference).returncode == 1


async def test_an_index_that_the_manifest_names_is_found(place: Place) -> None:
    """Version 2: the annotation in the image's own manifest."""
    index = await push_index(place, version=2)
    annotated = {**place.built.manifest, "annotations": {INDEX_DIGEST_ANNOTATION: index}}

    async def work(repository: Repository) -> Digest:
        return (await repository.push_manifest(json.dumps(annotated).encode(), OCI_MANIFEST, "2")).digest

    manifest = await within(place.reference, work)
    found = json.loads(verify("--json", place.reference.removesuffix(":1") + ":2").stdout)
    assert (found["manifest"], found["index"], found["found_by"]) == (manifest, index, "v2-annotation")
    assert found["proven"]


def test_an_image_without_an_index_is_an_error(place: Place) -> None:
    """In one line that says what to do."""
    done = verify(place.reference)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"soci: {place.reference} has no SOCI index")
