# SPDX-License-Identifier: Apache-2.0
"""What a commit measures: at once where there is little, else after a short look that says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import pytest

from soci_snapshotter import usage
from soci_snapshotter.usage import disk_usage, few_usage


def test_few_entries_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `FEW_ENTRIES` entries, in however many directories, give what a full walk gives; one more gives nothing."""
    monkeypatch.setattr(usage, "FEW_ENTRIES", 10)
    assert few_usage(tmp_path) == disk_usage(tmp_path)
    for number in range(5):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}/file").write_bytes(b"x" * 5000)
    assert few_usage(tmp_path) == disk_usage(tmp_path)
    os.link(tmp_path / "d0/file", tmp_path / "d1/again")
    assert few_usage(tmp_path) is None
    assert few_usage(tmp_path / "none") == (0, 0)


def test_a_large_directory_is_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short look stats no more entries than it may, however many there are."""
    for number in range(500):
        (tmp_path / str(number)).touch()
    looked: list[int] = []
    whole = os.scandir

    class Counting:
        def __init__(self, path: str) -> None:
            self._entries = whole(path)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._entries.close()

        def __iter__(self) -> Self:
            return self

        def __next__(self) -> os.DirEntry[str]:
            looked.append(1)
            return next(self._entries)

    monkeypatch.setattr(os, "scandir", Counting)
    assert few_usage(tmp_path) is None
    assert len(looked) == usage.FEW_ENTRIES + 1
