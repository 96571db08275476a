# SPDX-License-Identifier: Apache-2.0
"""The log's row of a read that failed, from the service itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from soci.errors import RegistryUnavailable, SociError
from soci.span import Spans
from soci_bus.asks import FetchSpans, MountLayer
from soci_bus.events import Missed
from soci_bus.face import Context
from soci_bus.memory import MemoryBus
from soci_mounter.reader import Miss
from soci_mounter.said import failed_read
from soci_mounter.service import Mounter
from soci_runtime.config import Config
from soci_runtime.logs import configure_logs
from support.mounter_layers import item, make, noise


async def test_a_failed_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At error, once a read, with the layer, its size, how much of it is here and why the rest is not; a read that
    only waited is no error.
    """
    configure_logs("info", "test")
    made = make([item("file", noise(300_000)), item("other", noise(300_000, 2))])
    made.put(tmp_path / "cache")
    bus = MemoryBus()
    broken = False

    async def fetch(ask: FetchSpans, _context: Context) -> object:
        if broken:
            raise RegistryUnavailable("the registry is away")
        made.fill(tmp_path / "cache", range(ask.first, ask.last + 1))
        return ask.answer()

    await bus.serve(FetchSpans, fetch)
    (tmp_path / "mounter").mkdir()
    mounter = Mounter(Config(root=tmp_path, read_deadline=0.3, mount_mode="fuse"), bus)
    await mounter.mounts.mount(MountLayer("m1", "r/i:1", made.layer, made.ztoc_digest))

    async def read(name: bytes) -> bytes:
        root = mounter.filesystem.lookup(1, b"m1")
        found = mounter.filesystem.lookup(root.ino, name) if root else None
        assert found
        return await mounter.filesystem.read(mounter.filesystem.open(found.ino, os.O_RDONLY), 0, 100)

    await read(b"file")
    broken = True
    with pytest.raises(SociError):
        await read(b"other")
    reader = mounter.mounts.reader("m1")
    assert reader
    assert 0 < reader.present_count() < reader.spans.count
    await mounter.mounts.close()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (failure,) = [one for one in told if one["level"] == "error"]
    assert (failure["msg"], failure["digest"], failure["size"]) == ("FUSE read failed", made.layer, len(made.blob))
    assert 0 < failure["fetchedSize"] < len(made.blob)
    assert failure["fetchedPercent"] == pytest.approx(100 * failure["fetchedSize"] / len(made.blob), abs=0.1)
    assert "the registry is away" in failure["error"]
    missed = [kept.event for kept in bus.events if isinstance(kept.event, Missed)]
    assert [bool(one.failed) for one in missed] == [False, True]


def test_all_and_nothing() -> None:
    """Shared bytes are counted once at most, and an odd name breaks no line."""
    spans = Spans.of(make([item("file", noise(300_000))]).ztoc)
    miss = Miss("m", make([]).layer, b"\xff", 0, 1, 1.0, 10, None, SociError("no"))
    every, none = failed_read(miss, spans, lambda _span: True), failed_read(miss, spans, lambda _span: False)
    assert (every["fetchedPercent"], none["fetchedPercent"], none["fetchedSize"]) == (100.0, 0.0, 0)
    assert every["path"] == "\\xff"
