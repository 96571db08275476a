# SPDX-License-Identifier: Apache-2.0
"""How a layer comes, and why: every row of the decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soci.digest import sha256_digest
from soci_bus.asks import IndexedLayer, IndexFound
from soci_snapshotter.mode import Defer, Facts, Lazy, Whole, choose

LAYER, OTHER, ZTOC, INDEX = (sha256_digest(text) for text in (b"layer", b"other", b"ztoc", b"index"))
INDEXED = IndexedLayer(LAYER, ZTOC, 99)
FOUND = IndexFound(INDEX, "v1-referrer", (IndexedLayer(OTHER, ZTOC, 1), INDEXED))
GOOD = Facts(LAYER, index=FOUND)


@pytest.mark.parametrize(
    ("facts", "mode", "why"),
    [
        (GOOD, Lazy, f"index {INDEX} (v1-referrer)"),
        (Facts(None, labels_wrong="no labels"), Defer, "no labels"),
        (Facts(LAYER, no_index="none was pushed"), Defer, "none was pushed"),
        (replace(GOOD, index=IndexFound(INDEX, "explicit", ())), Whole, "no zTOC"),
        (replace(GOOD, layer=sha256_digest(b"?")), Whole, "no zTOC"),
        (replace(GOOD, size=9, min_layer_size=10), Whole, "min_layer_size"),
        (replace(GOOD, size=10, min_layer_size=10), Lazy, "index"),
        (replace(GOOD, size=None, min_layer_size=10), Lazy, "index"),
        (replace(GOOD, lazy_failed="timeout"), Whole, "timeout"),
        (replace(GOOD, lazy_failed="timeout", whole_failed="no room"), Defer, "(timeout), nor unpacked here: no room"),
        (replace(GOOD, whole_failed="no room", size=1, min_layer_size=5), Defer, "no room"),
        (Facts(None, labels_wrong="no labels", whole_failed="x"), Defer, "no labels"),
        (Facts(LAYER, no_index="gone", size=1, min_layer_size=5), Defer, "gone"),
    ],
)
def test_rows(facts: Facts, mode: type, why: str) -> None:
    """Each set of facts has one mode, with its reason."""
    chosen = choose(facts)
    assert isinstance(chosen, mode)
    assert why in chosen.why


def test_lazy_names_its_ztoc() -> None:
    """The zTOC of the layer itself is taken, not of another of the index."""
    chosen = choose(GOOD)
    assert isinstance(chosen, Lazy)
    assert chosen.ztoc == INDEXED


def test_failures_end() -> None:
    """With each failure among the facts the next answer is another, and the last is to defer."""
    facts, modes = GOOD, []
    for _ in range(4):
        mode = choose(facts)
        modes.append(mode.name)
        if isinstance(mode, Lazy):
            facts = replace(facts, lazy_failed="x")
        elif isinstance(mode, Whole):
            facts = replace(facts, whole_failed="x")
        else:
            break
    assert modes == ["lazy", "whole", "defer"]
