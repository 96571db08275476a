# SPDX-License-Identifier: Apache-2.0
"""Images with SOCI indexes in an OCI layout, honest ones and ones that lie."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci.index import IndexEntry, SociIndex, encode_index, ztoc_entry
from soci.oci import OCI_MANIFEST, Descriptor, Manifest, layer_compression, parse_manifest
from soci.toc import Ztoc
from soci.ztoc import encode_ztoc
from soci_dev import image
from soci_indexing.stores import LayoutStore
from soci_indexing.verify import Verdict, verify_index

SPAN_SIZE = 1 << 16
OCTETS = "application/octet-stream"

Change = Callable[[Ztoc], Ztoc]


@dataclass(frozen=True)
class Indexed:
    """An image in ``store`` below a folder, and one of its indexes."""

    store: LayoutStore
    image: image.Image
    subject: Descriptor
    manifest: Manifest
    index: Digest
    entries: tuple[IndexEntry, ...]

    def verify(self, index: Digest | None = None) -> Verdict:
        return asyncio.run(verify_index(self.store, self.subject, self.manifest, index or self.index))


def layer_blob(built: image.Image, number: int) -> bytes:
    return blob_of(built, str(built.layers[number]["digest"]))


def blob_of(built: image.Image, digest: str) -> bytes:
    return (built.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()


def zip_ztoc(built: image.Image, number: int, span_size: int = SPAN_SIZE) -> Ztoc:
    """The honest zTOC of a layer."""
    compression = layer_compression(built.layers[number]["mediaType"])
    assert compression is not None
    builder = ZtocBuilder(compression, span_size)
    builder.feed(layer_blob(built, number))
    return builder.finish().ztoc


def unchanged(ztoc: Ztoc) -> Ztoc:
    return ztoc


def indexed(root: Path, layers: Iterable[image.Layer], changes: Mapping[int, Change] | None = None) -> Indexed:
    """An image of ``layers``, made in ``root / "content"``, with an index whose zTOCs went through ``changes``."""
    built = image.write_image(root / "content", list(layers))
    return with_index(root, built, changes or {})


def with_index(root: Path, built: image.Image, changes: Mapping[int, Change]) -> Indexed:
    store = LayoutStore(root)
    raw = blob_of(built, built.digest)
    manifest = parse_manifest(raw)
    assert isinstance(manifest, Manifest)
    subject = Descriptor(OCI_MANIFEST, Digest(built.digest), len(raw))
    entries = []
    for number, layer in enumerate(manifest.layers):
        content = encode_ztoc(changes.get(number, unchanged)(zip_ztoc(built, number)))
        entries.append(ztoc_entry(layer, put(store, content), len(content), SPAN_SIZE))
    found = SociIndex.v1(tuple(entries), subject)
    return Indexed(store, built, subject, manifest, put_index(store, found), tuple(entries))


def put(store: LayoutStore, content: bytes) -> Digest:
    digest = sha256_digest(content)
    asyncio.run(store.push(Descriptor(OCTETS, digest, len(content)), content))
    return digest


def put_index(store: LayoutStore, index: SociIndex) -> Digest:
    return put(store, encode_index(index))
