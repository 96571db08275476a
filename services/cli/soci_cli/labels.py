# SPDX-License-Identifier: Apache-2.0
"""The labels by which a client tells a remote snapshotter what it needs, and containerd's collector what to keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from soci.digest import Digest
from soci.launch import TraceParent
from soci.oci import Descriptor

SNAPSHOT_REF: Final = "containerd.io/snapshot.ref"
IMAGE_REF: Final = "containerd.io/snapshot/cri.image-ref"
MANIFEST_DIGEST: Final = "containerd.io/snapshot/cri.manifest-digest"
LAYER_DIGEST: Final = "containerd.io/snapshot/cri.layer-digest"
IMAGE_LAYERS: Final = "containerd.io/snapshot/cri.image-layers"
LAYER_SIZE: Final = "containerd.io/snapshot/remote/soci.size"
TRACEPARENT: Final = "containerd.io/snapshot/remote/soci.traceparent"
REMOTE: Final = "containerd.io/snapshot/remote"
"""Set by a remote snapshotter on what it shows without having unpacked it."""

GC_CONTENT: Final = "containerd.io/gc.ref.content"
GC_SNAPSHOT: Final = "containerd.io/gc.ref.snapshot"

LABEL_LIMIT: Final = 4096
"""containerd refuses a label whose key and value together have more bytes."""


def layers_above(digests: Iterable[Digest], key: str = IMAGE_LAYERS) -> str:
    """As many digests, comma-separated, as fit a label under ``key``: the first ones."""
    room = LABEL_LIMIT - len(key)
    value = ""
    for digest in digests:
        longer = f"{value},{digest}" if value else digest
        if len(longer) > room:
            break
        value = longer
    return value


def remote_labels(  # noqa: PLR0913  one label each
    image: str, manifest: Digest, layers: Sequence[Descriptor], number: int, *, chain: Digest, trace: TraceParent
) -> dict[str, str]:
    """What Prepare of layer ``number`` (0 is the lowest) carries. ``chain`` is the chain id that it completes."""
    layer = layers[number]
    return {
        SNAPSHOT_REF: chain,
        IMAGE_REF: image,
        MANIFEST_DIGEST: manifest,
        LAYER_DIGEST: layer.digest,
        IMAGE_LAYERS: layers_above(above.digest for above in layers[number:]),
        LAYER_SIZE: str(layer.size),
        TRACEPARENT: str(trace),
    }


def container_labels(image: str, trace: TraceParent) -> dict[str, str]:
    """What Prepare of a container's root file system carries: no target, so nothing is asked of a registry."""
    return {IMAGE_REF: image, TRACEPARENT: str(trace)}


def gc_labels_of_index(number: int, manifest: Digest) -> dict[str, str]:
    """An image index keeps the manifest that was chosen from it, which was its ``number``-th."""
    return {f"{GC_CONTENT}.m.{number}": manifest}


def gc_labels_of_manifest(config: Digest, layers: Sequence[Descriptor]) -> dict[str, str]:
    """A manifest keeps its config and those layer blobs that are here; naming an absent one does no harm."""
    kept: dict[str, str] = {f"{GC_CONTENT}.l.{number}": layer.digest for number, layer in enumerate(layers)}
    return {f"{GC_CONTENT}.config": config, **kept}


def gc_labels_of_config(snapshotter: str, top: Digest) -> dict[str, str]:
    """A config keeps the snapshot that its layers end in, and so all below it."""
    return {f"{GC_SNAPSHOT}.{snapshotter}": top}
