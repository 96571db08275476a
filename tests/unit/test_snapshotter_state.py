# SPDX-License-Identifier: Apache-2.0
"""What each call may do to snapshots: containerd's rules, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound
from soci_snapshotter import state
from soci_snapshotter.state import (
    Change,
    Kind,
    Snapshot,
    decide_commit,
    decide_prepare,
    decide_remove,
    decide_update,
    fold,
)


def snapshot(kind: Kind, name: str = "s", parent: str = "", labels: dict[str, str] | None = None) -> Snapshot:
    return Snapshot(5, name, kind, parent, labels or {}, 10, 20, 30, 40)


BASE = snapshot("committed", "base")


@pytest.mark.parametrize("kind", ["active", "view"])
@pytest.mark.parametrize(
    ("key", "parent", "taken", "below", "outcome"),
    [
        ("k", "", None, None, None),
        ("k", "base", None, BASE, None),
        ("", "", None, None, InvalidInput),
        ("k", "", snapshot("active", "k"), None, AlreadyExists),
        ("k", "", snapshot("committed", "k"), None, AlreadyExists),
        ("k", "base", None, None, NotFound),
        ("k", "base", None, snapshot("active", "base"), InvalidInput),
        ("k", "base", None, snapshot("view", "base"), InvalidInput),
        ("k", "base", snapshot("view", "k"), None, NotFound),
        ("k" * (state.NAME_LIMIT + 1), "", None, None, InvalidInput),
    ],
)
def test_prepare(kind: Kind, key: str, parent: str, taken: Any, below: Any, outcome: type[Exception] | None) -> None:
    """A parent must be there and committed, and the key free, in this order."""
    if outcome:
        with pytest.raises(outcome):
            decide_prepare(key, parent, kind, {}, taken=taken, below=below)
    else:
        made = decide_prepare(key, parent, kind, {"a": "1"}, taken=taken, below=below)
        assert made == Change("prepared", 0, key, kind, parent, {"a": "1"})


ACTIVE = snapshot("active", "k", labels={"old": "1"})
ON_BASE = snapshot("active", "k", "base")


@pytest.mark.parametrize(
    ("name", "active", "taken", "parent", "below", "outcome"),
    [
        ("n", ACTIVE, None, "", None, ""),
        ("n", ON_BASE, None, "", None, "base"),
        ("n", ON_BASE, None, "base", BASE, "base"),
        ("n", ACTIVE, None, "base", BASE, "base"),
        ("", ACTIVE, None, "", None, InvalidInput),
        ("n", ACTIVE, BASE, "", None, AlreadyExists),
        ("n", None, BASE, "", None, AlreadyExists),
        ("k", ACTIVE, ACTIVE, "", None, AlreadyExists),
        ("n", None, None, "", None, NotFound),
        ("n", snapshot("view", "k"), None, "", None, FailedPrecondition),
        ("n", snapshot("committed", "k"), None, "", None, FailedPrecondition),
        ("n", ON_BASE, None, "other", snapshot("committed", "other"), InvalidInput),
        ("n", ACTIVE, None, "gone", None, NotFound),
        ("n", ACTIVE, None, "base", snapshot("active", "base"), FailedPrecondition),
    ],
)
def test_commit(name: str, active: Any, taken: Any, parent: str, below: Any, outcome: Any) -> None:
    """The name must be free, the key active, and a parent given now the same as before, or the first and committed."""
    new = {"new": "1"}
    if isinstance(outcome, str):
        made = decide_commit(name, "k", new, active=active, taken=taken, parent=parent, below=below, size=1, inodes=2)
        assert made == Change("committed", 5, name, "committed", outcome, new, 1, 2)
    else:
        with pytest.raises(outcome):
            decide_commit(name, "k", new, active=active, taken=taken, parent=parent, below=below)


def test_remove() -> None:
    """Only what is there and has no children goes."""
    assert decide_remove("s", found=BASE, children=0).what == "removed"
    with pytest.raises(NotFound):
        decide_remove("s", found=None, children=0)
    with pytest.raises(FailedPrecondition, match="cannot remove snapshot with child"):
        decide_remove("s", found=BASE, children=2)


@pytest.mark.parametrize(
    ("paths", "labels", "expected"),
    [
        ([], {"b": "2"}, {"b": "2", "ours": "yes"}),
        (["labels"], {"b": "2"}, {"b": "2", "ours": "yes"}),
        (["labels"], {"ours": "no"}, {"ours": "yes"}),
        (["labels.b"], {"b": "2", "c": "3"}, {"a": "1", "b": "2", "ours": "yes"}),
        (["labels.a"], {}, {"ours": "yes"}),
        (["labels.a", "labels.x.y"], {"a": "9", "x.y": "z"}, {"a": "9", "x.y": "z", "ours": "yes"}),
        (["labels", "labels.b"], {"b": "2"}, {"b": "2", "ours": "yes"}),
        ([], {"empty": ""}, {"ours": "yes"}),
    ],
)
def test_update(paths: list[str], labels: dict[str, str], expected: dict[str, str]) -> None:
    """All labels or single ones change; one without a value goes; ours stay."""
    found = snapshot("committed", labels={"a": "1", "ours": "yes"})
    made = decide_update("s", labels, paths, found=found, kept=("ours",))
    assert made == Change("relabelled", 5, "s", "committed", "", expected, 30, 40)


@pytest.mark.parametrize("paths", [["name"], ["kind"], ["labels."], ["label"], ["parent", "labels"], ["labels.ours"]])
def test_update_refuses(paths: list[str]) -> None:
    """Nothing but labels can be updated, and not the snapshotter's own by name."""
    with pytest.raises(InvalidInput):
        decide_update("s", {"ours": "x"}, paths, found=snapshot("active"), kept=("ours",))


def test_update_of_nothing() -> None:
    """A snapshot that is not there cannot be updated."""
    with pytest.raises(NotFound):
        decide_update("s", {}, [], found=None)


@pytest.mark.parametrize(
    "labels",
    [{"k": "v" * state.LABEL_LIMIT}, {"é" * 2048: "v"}, {str(n): "v" for n in range(state.LABELS_LIMIT + 1)}],
)
def test_label_limits(labels: dict[str, str]) -> None:
    """Too long a label, in bytes, and too many labels are refused by every call that sets them."""
    with pytest.raises(InvalidInput):
        decide_prepare("k", "", "active", labels, taken=None, below=None)
    with pytest.raises(InvalidInput):
        decide_commit("n", "k", labels, active=ACTIVE, taken=None)
    with pytest.raises(InvalidInput):
        decide_update("s", labels, [], found=ACTIVE)
    assert decide_prepare("k", "", "active", {"k": "v" * (state.LABEL_LIMIT - 1)}, taken=None, below=None)


def test_fold() -> None:
    """A commit begins the times anew and keeps the number; new labels keep the creation time; removed is nothing."""
    active = fold(None, Change("prepared", 3, "k", "active", "p", {"a": "1"}), 100)
    assert active == Snapshot(3, "k", "active", "p", {"a": "1"}, 100, 100)
    done = fold(active, Change("committed", 3, "n", "committed", "p", {}, 7, 8), 200)
    assert done == Snapshot(3, "n", "committed", "p", {}, 200, 200, 7, 8)
    again = fold(done, Change("relabelled", 3, "n", "committed", "p", {"b": "2"}, 7, 8), 300)
    assert again == Snapshot(3, "n", "committed", "p", {"b": "2"}, 200, 300, 7, 8)
    assert fold(again, Change("removed", 3, "n", "committed", "p"), 400) is None
