# SPDX-License-Identifier: Apache-2.0
"""The labels by which containerd's clients and this snapshotter talk, and their reading. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from soci.digest import Digest, parse_digest
from soci.errors import InvalidInput
from soci.launch import TraceParent, parse_traceparent

REF = "containerd.io/snapshot.ref"
"""The chain id that a Prepare would like to find committed."""
REMOTE = "containerd.io/snapshot/remote"
REMOTE_VALUE = "remote snapshot"
HAS_INDEX = "containerd.io/snapshot/remote/has.soci.index.digest"
NAMESPACE = "containerd.io/snapshot/remote/namespace"
EXPLICIT_INDEX = "containerd.io/snapshot/remote/soci.index.digest"
SIZE = "containerd.io/snapshot/remote/soci.size"
TRACEPARENT = "containerd.io/snapshot/remote/soci.traceparent"
ZTOC = "containerd.io/snapshot/remote/soci.ztoc.digest"
"""Set by us on lazy snapshots: with it a restart shows the layer again without asking any registry."""
ZTOC_SIZE = "containerd.io/snapshot/remote/soci.ztoc.size"

MAPPED = "containerd.io/snapshot/remote/soci.mapped"
"""Set by us where containerd itself made a copy of an image with other owners: it is not mapped once more."""

OURS = (REMOTE, HAS_INDEX, NAMESPACE, ZTOC, ZTOC_SIZE, MAPPED)
"""Labels that say how a layer came: no client may set or take them away."""

# Two families of the same labels: CRI and nerdctl send the one, ctr-remote the other.
_FAMILIES = {
    "image": ("containerd.io/snapshot/cri.image-ref", "containerd.io/snapshot/remote/stargz.reference"),
    "manifest": ("containerd.io/snapshot/cri.manifest-digest",),
    "layer": ("containerd.io/snapshot/cri.layer-digest", "containerd.io/snapshot/remote/stargz.digest"),
}


@dataclass(frozen=True, slots=True)
class RemoteLabels:
    """What a Prepare says of the layer it wants."""

    image: str
    manifest: Digest
    layer: Digest
    size: int | None
    explicit_index: Digest | None
    namespace: str = ""


def read_remote_labels(labels: Mapping[str, str]) -> RemoteLabels:
    """The layer that the labels name; `InvalidInput` says which label is missing or wrong."""
    found: dict[str, str] = {}
    for field, names in _FAMILIES.items():
        value = next((labels[name] for name in names if labels.get(name)), None)
        if value is None:
            raise InvalidInput(
                f"label {names[0]} is missing: the client did not name the layer "
                "(for the CRI plugin set disable_snapshot_annotations = false; `soci pull` names it)"
            )
        found[field] = value
    size = labels.get(SIZE)
    if size is not None and not (size.isascii() and size.isdigit() and len(size) <= 18):
        raise InvalidInput(f"label {SIZE} is not a size: {size[:40]!r}")
    explicit = labels.get(EXPLICIT_INDEX)
    return RemoteLabels(
        image=found["image"],
        manifest=parse_digest(found["manifest"]),
        layer=parse_digest(found["layer"]),
        size=int(size) if size is not None else None,
        explicit_index=parse_digest(explicit) if explicit else None,
        namespace=labels.get(NAMESPACE, ""),
    )


def read_traceparent(labels: Mapping[str, str]) -> TraceParent | None:
    """The trace that the client began, if it did."""
    return parse_traceparent(labels.get(TRACEPARENT))


def without_ours(labels: Mapping[str, str]) -> dict[str, str]:
    """A client's labels, without those that only we may set."""
    return {key: value for key, value in labels.items() if key not in OURS}
