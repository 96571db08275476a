# SPDX-License-Identifier: Apache-2.0
"""The labels that `soci pull` sends."""

from __future__ import annotations

from soci.digest import Digest, sha256_digest
from soci.launch import new_traceparent, parse_traceparent
from soci.oci import Descriptor
from soci_cli import labels


def layers(count: int) -> tuple[Descriptor, ...]:
    return tuple(
        Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", sha256_digest(b"%d" % number), 100 + number)
        for number in range(count)
    )


def test_remote_labels_name_all_that_a_lazy_mount_needs() -> None:
    """Prepare of a layer carries the target, the image, the manifest, the layer with its size, and those above it."""
    some, trace = layers(3), new_traceparent()
    found = labels.remote_labels("r.io/a:1", Digest("sha256:m"), some, 1, chain=Digest("sha256:c"), trace=trace)
    assert found == {
        "containerd.io/snapshot.ref": "sha256:c",
        "containerd.io/snapshot/cri.image-ref": "r.io/a:1",
        "containerd.io/snapshot/cri.manifest-digest": "sha256:m",
        "containerd.io/snapshot/cri.layer-digest": some[1].digest,
        "containerd.io/snapshot/cri.image-layers": f"{some[1].digest},{some[2].digest}",
        "containerd.io/snapshot/remote/soci.size": "101",
        "containerd.io/snapshot/remote/soci.traceparent": str(trace),
    }
    assert parse_traceparent(found[labels.TRACEPARENT]) == trace


def test_the_list_of_layers_is_cut_to_what_containerd_takes() -> None:
    """Key and value never have more than 4096 bytes; whole digests from the layer upwards stay, in order."""
    some = [layer.digest for layer in layers(100)]
    for key in (labels.IMAGE_LAYERS, "k" * 65, "k" * 66):
        value = labels.layers_above(some, key)
        kept = value.split(",")
        assert kept == some[: len(kept)]
        size = len(key) + len(value)
        assert size <= labels.LABEL_LIMIT < size + 1 + len(some[0])


def test_every_label_of_a_large_image_fits() -> None:
    """An image of a thousand layers gives no label that containerd would refuse."""
    some, trace = layers(1000), new_traceparent()
    found = labels.remote_labels("r.io/" + "a" * 250, some[0].digest, some, 0, chain=some[0].digest, trace=trace)
    assert all(len(key) + len(value) <= labels.LABEL_LIMIT for key, value in found.items())


def test_the_collector_is_told_what_names_what() -> None:
    """Index keeps its chosen manifest, manifest its config and layers, config its snapshot; nothing else is named."""
    some = layers(2)
    assert labels.gc_labels_of_index(3, some[0].digest) == {"containerd.io/gc.ref.content.m.3": some[0].digest}
    assert labels.gc_labels_of_manifest(some[0].digest, some) == {
        "containerd.io/gc.ref.content.config": some[0].digest,
        "containerd.io/gc.ref.content.l.0": some[0].digest,
        "containerd.io/gc.ref.content.l.1": some[1].digest,
    }
    assert labels.gc_labels_of_config("sociable", some[1].digest) == {
        "containerd.io/gc.ref.snapshot.sociable": some[1].digest
    }


def test_a_container_asks_for_no_target() -> None:
    """The root file system's Prepare has no snapshot.ref: it must never be taken for a remote layer."""
    trace = new_traceparent()
    found = labels.container_labels("r.io/a:1", trace)
    assert labels.SNAPSHOT_REF not in found
    assert found == {labels.IMAGE_REF: "r.io/a:1", labels.TRACEPARENT: str(trace)}
