# SPDX-License-Identifier: Apache-2.0
"""The labels of a remote Prepare: both families, what is missing, what is wrong."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidInput
from soci_snapshotter import labels as names
from soci_snapshotter.labels import read_remote_labels, read_traceparent, without_ours

MANIFEST = "sha256:" + "a" * 64
LAYER = "sha256:" + "b" * 64
CRI = {
    "containerd.io/snapshot/cri.image-ref": "docker.io/library/redis:7",
    "containerd.io/snapshot/cri.manifest-digest": MANIFEST,
    "containerd.io/snapshot/cri.layer-digest": LAYER,
}
STARGZ = {
    "containerd.io/snapshot/remote/stargz.reference": "docker.io/library/redis:7",
    "containerd.io/snapshot/remote/stargz.digest": LAYER,
    "containerd.io/snapshot/cri.manifest-digest": MANIFEST,
}


@pytest.mark.parametrize("family", [CRI, STARGZ])
def test_both_families(family: dict[str, str]) -> None:
    """CRI's and ctr-remote's names say the same."""
    read = read_remote_labels(family)
    assert (read.image, read.manifest, read.layer) == ("docker.io/library/redis:7", MANIFEST, LAYER)
    assert read.size is None
    assert read.explicit_index is None


def test_cri_comes_first() -> None:
    """Where both families are there, CRI's counts."""
    both = {**STARGZ, **CRI, "containerd.io/snapshot/remote/stargz.reference": "other"}
    assert read_remote_labels(both).image == "docker.io/library/redis:7"


def test_size_and_index() -> None:
    """The labels that nerdctl adds are read; an empty index digest is none."""
    read = read_remote_labels({**CRI, names.SIZE: "1234", names.EXPLICIT_INDEX: MANIFEST})
    assert (read.size, read.explicit_index) == (1234, MANIFEST)
    assert read_remote_labels({**CRI, names.EXPLICIT_INDEX: ""}).explicit_index is None


@pytest.mark.parametrize("missing", list(CRI))
def test_missing(missing: str) -> None:
    """A missing or empty label is named, with the way out."""
    for labels in ({key: value for key, value in CRI.items() if key != missing}, {**CRI, missing: ""}):
        with pytest.raises(InvalidInput, match=missing) as told:
            read_remote_labels(labels)
        assert "disable_snapshot_annotations" in str(told.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("containerd.io/snapshot/cri.layer-digest", "sha256:xyz"),
        ("containerd.io/snapshot/cri.layer-digest", "../../etc"),
        ("containerd.io/snapshot/cri.manifest-digest", "sha256:" + "A" * 64),
        ("containerd.io/snapshot/cri.manifest-digest", "md5:" + "a" * 32),
        (names.SIZE, "-1"),
        (names.SIZE, "1e3"),
        (names.SIZE, "²"),
        (names.SIZE, "9" * 19),
        (names.SIZE, ""),
        (names.EXPLICIT_INDEX, "latest"),
    ],
)
def test_hostile(key: str, value: str) -> None:
    """What is no digest or size is refused: digests become paths."""
    with pytest.raises(InvalidInput):
        read_remote_labels({**CRI, key: value})


@given(st.dictionaries(st.sampled_from([*CRI, *STARGZ, names.SIZE, names.EXPLICIT_INDEX]), st.text(max_size=80)))
def test_any_values(labels: dict[str, str]) -> None:
    """Nothing but `InvalidInput` comes of any labels."""
    with suppress(InvalidInput):
        read_remote_labels({**CRI, **labels})


def test_ours_cannot_be_set() -> None:
    """A client cannot say that its snapshot is lazy."""
    for name in names.OURS:
        assert without_ours({name: "x", "kept": "y"}) == {"kept": "y"}
    assert names.REMOTE in names.OURS


def test_traceparent() -> None:
    """The client's trace is read where it is well-formed, and else as none."""
    text = f"00-{'1' * 32}-{'2' * 16}-01"
    read = read_traceparent({names.TRACEPARENT: text})
    assert read is not None
    assert str(read) == text
    assert read_traceparent({names.TRACEPARENT: "x" * 4000}) is None
    assert read_traceparent({}) is None
