# SPDX-License-Identifier: Apache-2.0
"""Claims on spans, and quiet on the node, among processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from soci.errors import Unavailable
from soci_fetcher import quiet as module
from soci_fetcher.claims import Claims
from soci_fetcher.quiet import Quiet

HOLDER = """
import sys
from pathlib import Path
from soci_fetcher.claims import Claims
claims = Claims(Path(sys.argv[1]))
assert claims.take(3)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    (tmp_path / "spans").write_bytes(bytes(100))
    return tmp_path


def test_a_span_has_one_claim(layer: Path) -> None:
    """Who has it may say so again; others get it when it is let go, and their neighbours at any time."""
    one, two = Claims(layer), Claims(layer)
    assert one.take(3)
    assert one.take(3)
    assert not two.take(3)
    assert two.take(4)
    one.free(3)
    assert two.take(3)
    two.close()
    assert one.take(3)
    assert one.take(4)
    one.close()
    one.close()
    one.free(3)


def test_a_killed_process_lets_go(layer: Path) -> None:
    """Its claims end with it, without anybody's help."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(layer)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        mine = Claims(layer)
        assert not mine.take(3)
        holder.kill()
        holder.wait()
        assert mine.take(3)
        mine.close()


def test_a_layer_that_is_gone_cannot_be_claimed(tmp_path: Path) -> None:
    """It is said so."""
    with pytest.raises(Unavailable):
        Claims(tmp_path / "gone")


def test_readers_anywhere_break_the_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process hears of the readers of all; silence counts from when the last one had his bytes."""
    one, two = Quiet(tmp_path / "cache"), Quiet(tmp_path / "cache")
    assert not one.waits()
    with two.broken(), two.broken():
        assert one.waits()
        assert two.waits()
        assert one.silence() == two.silence() == 0.0
    assert not one.waits()
    last = (tmp_path / "cache" / module.FILE).stat().st_mtime
    monkeypatch.setattr(time, "time", lambda: last + 7.0)
    assert (one.silence(), two.silence()) == pytest.approx((7.0, 7.0), abs=1.0)
    one.close()
    two.close()


def test_one_process_fills(tmp_path: Path) -> None:
    """While one is the node's filler, no other is."""
    one, two = Quiet(tmp_path), Quiet(tmp_path)
    with one.filling() as first, two.filling() as second:
        assert (first, second) == (True, False)
    with two.filling() as alone:
        assert alone
    one.close()
    two.close()
