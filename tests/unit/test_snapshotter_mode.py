# SPDX-License-Identifier: Apache-2.0
"""How a layer comes, and why: every row of the decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soci.digest import sha256_digest
from soci_bus.asks import IndexedLayer, IndexFound
from soci_snapshotter.estimate import Link, Need
from soci_snapshotter.mode import Defer, Facts, Lazy, Rules, Whole, choose

LAYER, OTHER, ZTOC, INDEX = (sha256_digest(text) for text in (b"layer", b"other", b"ztoc", b"index"))
INDEXED = IndexedLayer(LAYER, ZTOC, 99)
FOUND = IndexFound(INDEX, "v1-referrer", (IndexedLayer(OTHER, ZTOC, 1), INDEXED))
GOOD = Facts(LAYER, index=FOUND)
USUAL, MIN_10 = Rules(), Rules(min_layer_size=10, no_regret=False)
ALWAYS, WITHOUT = Rules(always_whole=True), Rules(whole_without_index=True)
LINK, BIG = Link(10e6, 0.01), 100_000_000


@pytest.mark.parametrize(
    ("facts", "rules", "mode", "why"),
    [
        (GOOD, USUAL, Lazy, f"index {INDEX} (v1-referrer)"),
        (Facts(None, labels_wrong="no labels"), USUAL, Defer, "no labels"),
        (Facts(None, labels_wrong="no labels"), ALWAYS, Defer, "no labels"),
        (Facts(LAYER, no_index="none was pushed"), USUAL, Defer, "none was pushed"),
        (Facts(LAYER, no_index="none was pushed"), WITHOUT, Whole, "none was pushed"),
        (Facts(LAYER, no_index="none was pushed", whole_failed="no room"), WITHOUT, Defer, "no room"),
        (replace(GOOD, index=IndexFound(INDEX, "explicit", ())), USUAL, Whole, "no zTOC"),
        (replace(GOOD, layer=sha256_digest(b"?"), size=7), USUAL, Whole, "no zTOC for it (of 7 bytes)"),
        (replace(GOOD, size=9), MIN_10, Whole, "min_layer_size"),
        (replace(GOOD, size=10), MIN_10, Lazy, "index"),
        (replace(GOOD, size=None), MIN_10, Lazy, "index"),
        (replace(GOOD, lazy_failed="timeout"), USUAL, Whole, "timeout"),
        (
            replace(GOOD, lazy_failed="timeout", whole_failed="no room"),
            USUAL,
            Defer,
            "(timeout), nor unpacked here: no",
        ),
        (replace(GOOD, whole_failed="no room", size=1), MIN_10, Defer, "no room"),
        (Facts(None, labels_wrong="no labels", whole_failed="x"), USUAL, Defer, "no labels"),
        (Facts(LAYER, no_index="gone", size=1), MIN_10, Defer, "gone"),
        (GOOD, ALWAYS, Whole, "parallel_pull_unpack is enabled"),
        (replace(GOOD, size=BIG), ALWAYS, Whole, "parallel_pull_unpack is enabled"),
        (replace(GOOD, whole_failed="no room"), ALWAYS, Defer, "no room"),
        (replace(GOOD, size=1000), USUAL, Whole, "no link seen yet; no launch seen yet"),
        (replace(GOOD, size=1000), Rules(no_regret=False), Lazy, "index"),
        (replace(GOOD, size=1000, here=1.0), USUAL, Lazy, "index"),  # not fetched twice
        (replace(GOOD, size=BIG), USUAL, Lazy, "index"),
        (replace(GOOD, size=BIG, link=LINK, need=Need(0.1, 5)), USUAL, Lazy, "index"),
        (
            replace(GOOD, size=BIG, link=LINK, need=Need(1.0, 9)),
            USUAL,
            Whole,
            "10.0 MB/s and 10 ms seen; earlier launches",
        ),
        (replace(GOOD, size=BIG, link=LINK, need=Need(1.0, 9), here=1.0), USUAL, Lazy, "index"),
        (replace(GOOD, size=BIG, link=LINK, need=Need(1.0, 9)), Rules(no_regret=False), Lazy, "index"),
    ],
)
def test_rows(facts: Facts, rules: Rules, mode: type, why: str) -> None:
    """Each set of facts has one mode under each set of rules, with its reason."""
    chosen = choose(facts, rules)
    assert isinstance(chosen, mode)
    assert why in chosen.why


def test_lazy_names_its_ztoc() -> None:
    """The zTOC of the layer itself is taken, not of another of the index."""
    chosen = choose(GOOD, USUAL)
    assert isinstance(chosen, Lazy)
    assert chosen.ztoc == INDEXED


@pytest.mark.parametrize(
    ("rules", "expected"),
    [(USUAL, ["lazy", "whole", "defer"]), (ALWAYS, ["whole", "defer"]), (WITHOUT, ["lazy", "whole", "defer"])],
)
def test_failures_end(rules: Rules, expected: list[str]) -> None:
    """With each failure among the facts the next answer is another, and the last is to defer."""
    facts, modes = GOOD, []
    for _ in range(4):
        mode = choose(facts, rules)
        modes.append(mode.name)
        if isinstance(mode, Lazy):
            facts = replace(facts, lazy_failed="x")
        elif isinstance(mode, Whole):
            facts = replace(facts, whole_failed="x")
        else:
            break
    assert modes == expected
