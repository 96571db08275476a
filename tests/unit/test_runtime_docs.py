# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/configuration.md are those of the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci.errors import InvalidInput
from soci_dev.docs import PAGE, filled, run
from soci_runtime.inert import INERT
from soci_runtime.settings import SETTINGS


def test_the_page_is_current() -> None:
    """Every setting and every key without effect has its row; ``./dev docs`` would change nothing."""
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page
    for key in [one.key for one in SETTINGS] + [one.key for one in INERT]:
        table, _, name = key.rpartition(".")
        assert f"| `[{table}] {name}` |" in page or (not table and f"| `{name}` |" in page), key
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(SETTINGS) + len(INERT)


def test_a_stale_page_is_told_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--check`` nothing is written; without it the page is, and what stands around the tables stays."""
    page = tmp_path / "page.md"
    stale = PAGE.read_text(encoding="utf-8").replace("| `mount_timeout_sec` |", "| `mount_timeout` |")
    page.write_text(stale)
    assert run(check=True, page=page) == 1
    assert "./dev docs" in capsys.readouterr().out
    assert page.read_text() == stale
    assert run(check=False, page=page) == 0
    assert page.read_text() == PAGE.read_text(encoding="utf-8")
    assert run(check=True, page=page) == 0


def test_a_page_without_marks_is_refused() -> None:
    """It is not known where the tables would go."""
    with pytest.raises(InvalidInput, match="settings"):
        filled("# Configuration\n")
