# SPDX-License-Identifier: Apache-2.0
"""What the node remembers of launches and links."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci_snapshotter import history as module
from soci_snapshotter.estimate import Link, Need
from soci_snapshotter.history import History

LAYER = sha256_digest(b"layer")


def test_it_outlives_the_process(tmp_path: Path) -> None:
    """What was seen is there after a restart."""
    one = History(tmp_path / "h.db")
    one.saw_need(LAYER, Need(0.25, 7))
    one.saw_link("r:5000", Link(1e6, 0.02))
    one.close()
    other = History(tmp_path / "h.db")
    assert other.need(LAYER) == Need(0.25, 7)
    assert other.link("r:5000") == Link(1e6, 0.02)
    assert other.need(sha256_digest(b"?")) is None
    assert other.link("?") is None
    other.close()


def test_the_most_that_was_needed_counts(tmp_path: Path) -> None:
    """A launch that needs less does not make forget one that needed more."""
    history = History(tmp_path / "h.db")
    for need in (Need(0.5, 3), Need(0.1, 9), Need(0.2, 1)):
        history.saw_need(LAYER, need)
    assert history.need(LAYER) == Need(0.5, 9)
    history.close()


def test_the_last_link_counts_and_grows_old(tmp_path: Path) -> None:
    """A link is as it was seen last; after long it is not known any more."""
    now = 1000.0
    history = History(tmp_path / "h.db", lambda: now)
    history.saw_link("r", Link(1e6, 0.1))
    history.saw_link("r", Link(2e6, 0.2))
    assert history.link("r") == Link(2e6, 0.2)
    now += module.LINK_AGE + 1
    assert history.link("r") is None
    history.close()


def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not grow for ever."""
    monkeypatch.setattr(module, "LAYERS_KEPT", 3)
    now = 0.0
    history = History(tmp_path / "h.db", lambda: now)
    layers = [sha256_digest(bytes([number])) for number in range(5)]
    for layer in layers:
        now += 1
        history.saw_need(layer, Need(0.5, 1))
    assert [history.need(layer) is not None for layer in layers] == [False, False, True, True, True]
    history.close()


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    """Nothing in it is worth a failure."""
    (tmp_path / "h.db").write_bytes(content)
    history = History(tmp_path / "h.db")
    history.saw_need(LAYER, Need(0.5, 1))
    assert history.need(LAYER) == Need(0.5, 1)
    history.close()


def test_a_disk_that_takes_no_file_is_passed_over(tmp_path: Path) -> None:
    """Then it remembers for as long as the process runs."""
    (tmp_path / "h.db").mkdir()
    history = History(tmp_path / "h.db")
    history.saw_need(LAYER, Need(0.5, 1))
    assert history.need(LAYER) == Need(0.5, 1)
    history.close()
