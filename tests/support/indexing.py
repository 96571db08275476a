# SPDX-License-Identifier: Apache-2.0
"""Images in a content store, made of the golden layers."""

from __future__ import annotations

from pathlib import Path

from soci.digest import parse_digest, sha256_digest
from soci.oci import (
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
)
from soci_indexing.stores import LayoutStore
from support.vectors import content, vectors

SUBJECT = Descriptor(OCI_MANIFEST, parse_digest("sha256:" + "33" * 32), 1234)
IMAGE = parse_digest("sha256:" + "44" * 32)


def golden_layer(name: str, *, docker: bool = False) -> Descriptor:
    """The descriptor of a golden layer."""
    vector = vectors(name=name)[0]
    gzip = vector["algorithm"] == "gzip"
    kind = {(True, True): DOCKER_LAYER_GZIP, (True, False): OCI_LAYER_GZIP, (False, True): DOCKER_LAYER}
    data = content(vector["input"])
    return Descriptor(kind.get((gzip, docker), OCI_LAYER), sha256_digest(data), len(data))


async def golden_image(root: Path, *names: str, docker: bool = False) -> tuple[LayoutStore, Manifest]:
    """A store with these golden layers, and a manifest of them."""
    store = LayoutStore(root)
    for name in names:
        await store.push(golden_layer(name), content(vectors(name=name)[0]["input"]))
    config = Descriptor(OCI_CONFIG, sha256_digest(b"config"), 6)
    return store, Manifest(OCI_MANIFEST, config, tuple(golden_layer(name, docker=docker) for name in names))
