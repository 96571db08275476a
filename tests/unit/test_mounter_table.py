# SPDX-License-Identifier: Apache-2.0
"""A layer's table of contents goes when nobody uses it, and comes back."""

from __future__ import annotations

import asyncio

import pytest

from soci.entries import Entries
from soci.errors import FailedPrecondition, NotFound
from soci.tree import LayerTree
from soci_mounter import table as module
from soci_mounter.table import Table
from support.mounter_layers import Made, everything, make


@pytest.fixture(scope="module")
def made() -> Made:
    return make(everything())


@pytest.fixture
def loads() -> list[int]:
    return []


@pytest.fixture
def table(made: Made, loads: list[int], monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)
    entries = Entries.of(made.ztoc.entries)

    def load() -> Entries:
        loads.append(1)
        return entries

    return Table(entries, LayerTree.of(entries), load, verify=True)


async def test_it_comes_back_once_for_all_who_want_it(table: Table, made: Made, loads: list[int]) -> None:
    """Forgotten, it is read again by the first who needs it, while others wait for that; headers then compare again."""
    headers = table.headers
    assert headers
    entry = made.ztoc.entries[1]
    start, end = headers.place(entry.offset)
    assert table.forget()
    assert not table.forget()
    assert headers.place(entry.offset) == (start, end)
    with pytest.raises(FailedPrecondition):
        headers.check(entry.offset, made.tar[start:end])
    trees = await asyncio.gather(*(table.tree() for _ in range(5)))
    await asyncio.gather(headers.ready(), table.node(0))
    headers.check(entry.offset, made.tar[start:end])
    assert loads == [1]
    assert len(trees[0]) == len(LayerTree.of(made.ztoc.entries))


async def test_it_stays_while_it_is_used_or_somebody_has_it(
    table: Table, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A use a moment ago keeps it, and so does a FUSE mount, which has the tree anyway."""
    monkeypatch.setattr(module, "KEEP_SECONDS", 60.0)
    await table.tree()
    assert not table.forget()
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)
    table.pinned = True
    assert not table.forget()
    assert loads == []


async def test_a_table_that_cannot_be_read_is_an_error_each_time(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loading raises goes through, and the next who asks tries again."""
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)
    entries, gone = Entries.of(made.ztoc.entries), [True]

    def load() -> Entries:
        if gone:
            raise NotFound("gone")
        return entries

    table = Table(entries, LayerTree.of(entries), load, verify=False)
    assert table.headers is None
    assert table.forget()
    for _ in range(2):
        with pytest.raises(NotFound):
            await table.tree()
    gone.clear()
    await table.tree()
