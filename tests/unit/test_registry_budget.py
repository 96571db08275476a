# SPDX-License-Identifier: Apache-2.0
"""The budget of a host: who may take which slot, within a process and between processes that share a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from soci_registry.budget import OVERDRAFT_SECONDS, Budget, may_overdraw, pause_left
from soci_registry.failure import TryError
from soci_registry.gates import Gates
from soci_registry.slots import FILES_MAX, NodeSlots, SlotBook, file_name
from soci_registry.urls import Origin

HOST = Origin("https", "reg.example", 443)
PAUSE_MAX = 60.0


@pytest.mark.parametrize(
    ("total", "urgent", "others"),
    [(1, [0], [0]), (2, [1, 0], [1]), (4, [3, 2, 1, 0], [3, 2, 1]), (16, [*range(15, -1, -1)], [*range(15, 3, -1)])],
)
def test_which_slots_are_open_to_whom(total: int, urgent: list[int], others: list[int]) -> None:
    """A quarter is kept for urgent requests, which try it last; a budget of one is for everybody."""
    assert list(Budget(total).open_to(urgent=True)) == urgent
    assert list(Budget(total).open_to(urgent=False)) == others


@pytest.mark.parametrize(
    ("held", "waiting", "urgent", "may"),
    [
        (15, 0, True, True),
        (7, 1, True, True),
        (8, 1, True, False),
        (3, 3, True, True),
        (4, 3, True, False),
        (5, 1, False, True),
        (6, 1, False, False),
        (0, 99, False, True),
        (1, 99, False, False),
    ],
)
def test_who_takes_one_more(held: int, waiting: int, may: bool, *, urgent: bool) -> None:  # noqa: FBT001
    """While others wait nobody takes more than its part, which is at least one slot."""
    assert Budget(16).may_take(held, waiting, urgent=urgent) is may


@pytest.mark.parametrize(
    ("end", "now", "left"), [(0, 5, 0.0), (5_000_000_000, 1_000_000_000, 4.0), (5, 5, 0.0), (1 << 63, 0, 0.0)]
)
def test_how_long_a_pause_lasts(end: int, now: int, left: float) -> None:
    """A pause is over when its time is; one longer than anybody may ask for is a spoilt file, and none."""
    assert pause_left(end, now, PAUSE_MAX) == left


@pytest.mark.parametrize(
    ("inside", "waited", "urgent", "may"),
    [
        (0, 5.0, True, True),
        (0, 4.9, True, False),
        (1, 99.0, True, False),
        (0, 29.0, False, False),
        (0, 30.0, False, True),
    ],
)
def test_who_goes_beyond_the_budget(inside: int, waited: float, may: bool, *, urgent: bool) -> None:  # noqa: FBT001
    """A process without any request under way is not kept from asking for ever, urgent requests least."""
    assert may_overdraw(inside, waited, urgent=urgent) is may


def test_hosts_have_files_of_bounded_number() -> None:
    """However many hosts there are, so many files are made; scheme and port make another host."""
    assert file_name(HOST) == file_name(Origin("https", "reg.example", 443))
    assert len({file_name(Origin(scheme, "reg.example", port)) for scheme in ("http", "https") for port in (1, 2)}) == 4
    assert all(len(file_name(Origin("http", f"h{number}", 1))) == 4 for number in range(100))
    assert FILES_MAX == 16**4


class Two:
    """Two processes' views of one host's slots."""

    def __init__(self, total: int, path: Path) -> None:
        self.one, self.two = (NodeSlots(Budget(total), path, PAUSE_MAX) for _ in range(2))

    def close(self) -> None:
        self.one.close()
        self.two.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    found = Two(4, tmp_path / "host")
    yield found
    found.close()


def test_slots_are_the_nodes(two: Two) -> None:
    """What one process holds the other cannot take; kept slots are for urgent requests; what is given back is free."""
    assert [two.one.take(urgent=False), two.two.take(urgent=False), two.one.take(urgent=False)] == [3, 2, 1]
    assert two.two.take(urgent=False) is None
    assert two.two.take(urgent=True) == 0
    assert two.one.take(urgent=True) is None
    two.one.give(3)
    assert two.two.take(urgent=False) == 3


def test_a_process_that_ends_holds_nothing(two: Two) -> None:
    """However a process ends, its slots and its waiting end with it."""
    for _ in range(4):
        two.one.take(urgent=True)
    two.one.wait(urgent=True, waiting=True)
    assert two.two.take(urgent=True) is None
    two.one.close()
    assert [two.two.take(urgent=True) for _ in range(4)] == [3, 2, 1, 0]


def test_who_waits_gets_a_part(two: Two) -> None:
    """A process with more than its part takes nothing while another one waits, and everything when none does."""
    assert [two.one.take(urgent=True) for _ in range(3)] == [3, 2, 1]
    two.two.wait(urgent=True, waiting=True)
    assert two.one.take(urgent=True) is None
    assert two.two.take(urgent=True) == 0
    two.two.wait(urgent=True, waiting=False)
    two.one.give(1)
    assert two.one.take(urgent=True) == 1


def test_all_who_wait_are_counted(tmp_path: Path) -> None:
    """Each waiting process counts once in each row, in whatever order the kernel names their locks."""
    with ExitStack() as stack:
        everybody = [NodeSlots(Budget(4), tmp_path / "host", PAUSE_MAX) for _ in range(12)]
        for one in everybody:
            stack.callback(one.close)
        for one in (*everybody[5:], *everybody[1:5]):
            one.wait(urgent=True, waiting=True)
        everybody[3].wait(urgent=False, waiting=True)
        everybody[7].wait(urgent=True, waiting=False)
        assert everybody[0]._others(urgent=True) == 10
        assert everybody[0]._others(urgent=False) == 11
        assert everybody[1]._others(urgent=True) == 9


def test_a_pause_is_the_nodes(two: Two) -> None:
    """A pause that one process was asked for holds for the other, and is never made shorter."""
    two.one.pause(30)
    assert 29 < two.two.paused() <= 30
    two.two.pause(5)
    assert 29 < two.one.paused() <= 30
    assert 29 < two.two.paused() <= 30


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 8, b"\xff" * 100])
def test_a_spoilt_file_holds_nobody_back(tmp_path: Path, content: bytes) -> None:
    """Whatever the file holds, it makes no pause that nobody has asked for."""
    (tmp_path / "host").write_bytes(content)
    slots = NodeSlots(Budget(4), tmp_path / "host", PAUSE_MAX)
    assert slots.paused() == 0
    slots.pause(1)
    assert 0 < slots.paused() <= 1
    slots.close()


def test_another_boot_is_forgotten(tmp_path: Path) -> None:
    """What an earlier boot has left is neither believed nor kept."""
    (tmp_path / "another-boot").mkdir()
    (tmp_path / "another-boot" / file_name(HOST)).write_bytes(b"\xff" * 8)
    slots = SlotBook(Budget(4), tmp_path, pause_max=PAUSE_MAX).of(HOST)
    assert slots.paused() == 0
    slots.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_used_is_told_once(tmp_path: Path) -> None:
    """Where there can be no common budget each process keeps its own, and the log says so once."""
    told: list[str] = []
    (tmp_path / "folder").write_text("a file")
    book = SlotBook(Budget(2), tmp_path / "folder", pause_max=PAUSE_MAX, tell=lambda what, /, **_: told.append(what))
    first, second = book.of(HOST), book.of(HOST)
    assert [first.take(urgent=True) for _ in range(3)] == [1, 0, None]
    assert second.take(urgent=True) == 1
    assert told == ["no common budget for registries"]


# --- gates ----------------------------------------------------------------------------------------------------------


class Door:
    """Requests at a gate, let out by hand; ``order`` is who went in."""

    def __init__(self, gates: Gates, order: list[str]) -> None:
        self.gates, self.order = gates, order
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, name: str, *, urgent: bool) -> None:
        self.leave[name] = asyncio.Event()

        async def one() -> None:
            async with self.gates.slot(HOST, urgent=urgent):
                self.order.append(name)
                await self.leave[name].wait()

        self.tasks.append(asyncio.create_task(one()))

    async def out(self, *names: str) -> None:
        for name in names:
            self.leave[name].set()
        await asyncio.sleep(0.05)


def gates(total: int, folder: Path | None) -> Gates:
    return Gates(SlotBook(Budget(total), folder, pause_max=PAUSE_MAX))


@pytest.mark.parametrize("shared", [False, True])
async def test_urgent_requests_go_first(tmp_path: Path, *, shared: bool) -> None:
    """Of those who wait the urgent ones go first; the others stand in line behind them and lose no turn."""
    order: list[str] = []
    door = Door(gates(2, tmp_path if shared else None), order)
    for number in range(3):
        door.ask(f"bulk{number}", urgent=False)
    for number in range(2):
        door.ask(f"miss{number}", urgent=True)
    await door.out()
    assert order == ["bulk0", "miss0"]  # one slot is kept
    await door.out("bulk0")
    assert order[2:] == ["miss1"]
    await door.out("miss0")  # a kept slot: not for bulk
    assert order[3:] == []
    await door.out("miss1")
    assert order[3:] == ["bulk1"]
    await door.out("bulk1", "bulk2")
    await asyncio.gather(*door.tasks)
    assert order[4:] == ["bulk2"]
    door.gates.close()


async def test_one_request_of_another_process_is_not_starved(tmp_path: Path) -> None:
    """A process that waits with many requests takes no further slot while another process waits for its first."""
    order: list[str] = []
    one, two = (Door(gates(2, tmp_path), order) for _ in range(2))
    for number in range(6):
        one.ask(f"one{number}", urgent=True)
    await one.out()
    two.ask("two", urgent=True)
    await one.out()
    assert order == ["one0", "one1"]
    await one.out("one0")
    assert order[2:] == ["two"]
    await one.out(*(f"one{number}" for number in range(6)))
    await two.out("two")
    await asyncio.gather(*one.tasks, *two.tasks)
    one.gates.close()
    two.gates.close()


async def test_a_stopped_process_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all slots are in hands that do not move, each process still makes one request at a time."""
    monkeypatch.setitem(OVERDRAFT_SECONDS, True, 0.02)  # noqa: FBT003
    order: list[str] = []
    stopped, door = (Door(gates(2, tmp_path), order) for _ in range(2))
    for name in ("stopped0", "stopped1"):
        stopped.ask(name, urgent=True)
    await stopped.out()
    for name in ("one", "two"):
        door.ask(name, urgent=True)
    await door.out()
    assert order[2:] == ["one"]
    await door.out("one")
    assert order[3:] == ["two"]
    door.ask("three", urgent=True)
    await stopped.out("stopped0")
    assert order[4:] == ["three"]  # a slot is free again
    await stopped.out("stopped1")
    await door.out("two", "three")
    await asyncio.gather(*stopped.tasks, *door.tasks)
    assert all(gate.inside == 0 for gate in (*door.gates._all.values(), *stopped.gates._all.values()))
    stopped.gates.close()
    door.gates.close()


async def test_who_gives_up_leaves_no_trace(tmp_path: Path) -> None:
    """A request that is cancelled while it waits or holds a slot gives its place and its slot to the next one."""
    order: list[str] = []
    door = Door(gates(1, tmp_path), order)
    for name in ("first", "second", "third"):
        door.ask(name, urgent=True)
    await door.out()
    door.tasks[1].cancel()
    door.tasks[0].cancel()
    await door.out()
    assert order == ["first", "third"]
    await door.out("third")
    await asyncio.gather(*door.tasks, return_exceptions=True)
    assert not any(row for gate in door.gates._all.values() for row in gate.rows.values())
    other = gates(1, tmp_path)
    async with other.slot(HOST):
        pass
    other.close()
    door.gates.close()


async def test_the_impatient_are_told_to_wait(tmp_path: Path) -> None:
    """Who has another host to ask gets an error that says how long, also for a pause that another process was given."""
    one, two = gates(1, tmp_path), gates(1, tmp_path)
    one.hold(HOST, 30)
    for _ in range(2):
        with pytest.raises(TryError) as caught:
            async with two.slot(HOST, patient=False):
                pass
        assert 29 < (caught.value.retry_after or 0) <= 30
    one.close()
    two.close()


async def test_what_is_open_is_bounded(tmp_path: Path) -> None:
    """However many hosts redirects lead to, so many files stay open; all are closed with the gates."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    it = gates(1, tmp_path)
    for number in range(600):
        async with it.slot(Origin("http", f"h{number}", 80)):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 257
    it.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
