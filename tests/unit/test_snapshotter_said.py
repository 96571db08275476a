# SPDX-License-Identifier: Apache-2.0
"""The log's rows by which operators of the reference tell what became of a layer."""

from __future__ import annotations

import pytest

from soci.digest import sha256_digest
from soci_bus.asks import IndexedLayer, IndexFound
from soci_snapshotter import said
from soci_snapshotter.mode import Defer, Facts, Lazy, Mode, Whole

MANIFEST, LAYER, OTHER, ZTOC, INDEX = (sha256_digest(text) for text in (b"m", b"l", b"o", b"z", b"i"))
ENTRY = IndexedLayer(LAYER, ZTOC, 99)


def index(found_by: str = "explicit", layers: tuple[IndexedLayer, ...] = (ENTRY,)) -> IndexFound:
    return IndexFound(INDEX, found_by, layers)


@pytest.mark.parametrize(
    ("mode", "failed", "row"),
    [
        (Lazy(ENTRY, "w"), "", {"remote-snapshot-prepared": "true"}),
        (Whole("w"), "", {"remote-snapshot-prepared": "false", "local-snapshot-prepared": "true"}),
        (
            Whole("w"),
            "no mount",
            {"remote-snapshot-prepared": "false", "local-snapshot-prepared": "true", "error": "no mount"},
        ),
        (
            Defer("w"),
            "",
            {"remote-snapshot-prepared": "false", "defer-snapshot-runtime": "true", "error": "w"},
        ),
        (
            Defer("w"),
            "no disk",
            {"remote-snapshot-prepared": "false", "defer-snapshot-runtime": "true", "error": "no disk"},
        ),
    ],
)
def test_layers(mode: Mode, failed: str, row: dict[str, str]) -> None:
    """One row a layer, with an error where something failed or the layer is left to containerd."""
    assert dict(said.of_layer(mode, failed)) == {"mode": mode.name, "why": "w", **row}


@pytest.mark.parametrize(
    ("found_by", "words"), [("explicit", "digest"), ("v2-annotation", "(v2)"), ("v1-referrer", "(v1)"), ("new", "new")]
)
def test_the_choice_of_an_index(found_by: str, words: str) -> None:
    """At debug, in words, with the index."""
    line = said.of_index("r/i:1", MANIFEST, index(found_by), "")
    assert line.level == "debug"
    assert words in line.message
    assert dict(line.facts) == {"image": "r/i:1", "manifest": MANIFEST, "index": INDEX, "found_by": found_by}


def test_no_index() -> None:
    """At debug, with the reason, be it that looking for them is switched off."""
    line = said.of_index("r/i:1", MANIFEST, None, "all lazy pull modes are disabled")
    assert (line.level, line.facts["why"]) == ("debug", "all lazy pull modes are disabled")


def test_sparse_layers() -> None:
    """A layer that its image's index leaves out is told at info; others, and those without an index, are not."""
    line = said.of_sparse("r/i:1", Facts(OTHER, index=index()))
    assert line
    assert (line.level, line.facts["layerDigest"], line.facts["image"]) == ("info", OTHER, "r/i:1")
    assert said.of_sparse("r/i:1", Facts(LAYER, index=index())) is None
    assert said.of_sparse("r/i:1", Facts(LAYER)) is None
    assert said.of_sparse("r/i:1", Facts(None, index=index())) is None
