# SPDX-License-Identifier: Apache-2.0
"""What the snapshotter makes of its settings."""

from __future__ import annotations

import pytest

from soci_runtime.config import Config
from soci_runtime.workers import MAX_WORKERS
from soci_snapshotter import unpacker
from soci_snapshotter.__main__ import ahead_of, keep_of, rules_of
from soci_snapshotter.images import AHEAD_AT_ONCE
from soci_snapshotter.unpacker import Unpackers


@pytest.mark.parametrize(
    ("store", "discard", "kept"),
    [("soci", False, False), ("soci", True, False), ("containerd", False, True), ("containerd", True, False)],
)
def test_blobs_are_kept_where_both_settings_want_it(store: str, *, discard: bool, kept: bool) -> None:
    """In containerd's content store, unless unpacked layers are to be discarded."""
    assert (keep_of(Config(content_store=store, discard_unpacked_layers=discard)) is not None) == kept


@pytest.mark.parametrize(("limit", "ahead"), [(-1, AHEAD_AT_ONCE), (100, AHEAD_AT_ONCE), (2, 2), (1, 1)])
def test_max_concurrency_lowers_our_limit(limit: int, ahead: int) -> None:
    """Tables of contents are brought ahead as many at a time as it says, and never more than our own limit."""
    assert ahead_of(Config(max_concurrency=limit)) == ahead


@pytest.mark.parametrize(
    ("fallback", "parallel", "whole"),
    [("auto", False, False), ("auto", True, True), ("always", False, True), ("never", True, False)],
)
def test_the_fallback_without_an_index(fallback: str, *, parallel: bool, whole: bool) -> None:
    """The reference's key holds unless ours says otherwise."""
    assert rules_of(Config(whole_fallback=fallback, parallel_pull_fallback=parallel)).whole_without_index is whole


def test_unpacking_is_bounded_by_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker a core, for all and for one image; not two hundred where there are as many cores."""
    assert Config().max_unpacks_per_image == Config().max_unpacks == -1
    monkeypatch.setattr(unpacker, "cores", lambda: 3)
    assert Unpackers(Config().max_unpacks).workers == 3
    monkeypatch.setattr(unpacker, "cores", lambda: 200)
    assert Unpackers(Config().max_unpacks).workers == MAX_WORKERS
