# SPDX-License-Identifier: Apache-2.0
"""The parts of bringing whole layers that need no registry: asking again, settling, one sync for many."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.digest import Digest
from soci.errors import DeadlineExceeded, NotFound, RegistryUnavailable, SociError, Unavailable
from soci_bus.asks import FetchLayer, LayerFetched
from soci_bus.face import Context
from soci_bus.memory import MemoryBus
from soci_cache.arriving import COMPLETE, ArrivingWriter, announce
from soci_snapshotter import fetching, placing
from soci_snapshotter.fetching import fetch_blob, may_pass
from soci_snapshotter.parents import OPEN_DIRECTORIES, Parents
from soci_snapshotter.placing import Syncs
from soci_snapshotter.settle import Implied, settle
from soci_snapshotter.unpack_worker import Result, decode_result, encode_result

LAYER = Digest("sha256:" + "1" * 64)
Try = Callable[[ArrivingWriter], Awaitable[None]]

# --- asking for a blob


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An announced file, and a watch that does not take long."""
    monkeypatch.setattr(fetching, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.0)
    announce(tmp_path / "blob")
    return tmp_path / "blob"


def grow(writer: ArrivingWriter) -> None:
    writer.write(writer.arrived, b"x")
    writer.advance(writer.arrived + 1)


async def asked(blob: Path, *tries: Try) -> tuple[int, int]:
    """Ask fetchers that behave as ``tries`` do, one after the other; the blob's size and how often was asked."""
    bus = MemoryBus()
    left = iter(tries)
    count = 0

    async def fetch(ask: FetchLayer, _context: Context) -> LayerFetched:
        nonlocal count
        count += 1
        with closing(writer_of(blob)) as writer:
            await next(left)(writer)
            size = writer.arrived
        return LayerFetched(ask.path, size)

    await bus.serve(FetchLayer, fetch)
    return await fetch_blob(bus, FetchLayer("r/i:1", LAYER, None, str(blob)), None), count


def writer_of(blob: Path) -> ArrivingWriter:
    writer = ArrivingWriter.claim(blob)
    assert writer is not None
    return writer


async def good(writer: ArrivingWriter) -> None:
    grow(writer)
    writer.finish(COMPLETE)


def failing(error: SociError, *, grows: bool = False) -> Try:
    async def fail(writer: ArrivingWriter) -> None:
        if grows:
            grow(writer)
        raise error

    return fail


async def never(_writer: ArrivingWriter) -> None:
    await asyncio.Event().wait()


async def test_an_answer(blob: Path) -> None:
    """One ask, and its answer is the size."""
    assert await asked(blob, good) == (1, 1)


@pytest.mark.parametrize("error", [NotFound("no"), RegistryUnavailable("away")], ids=repr)
async def test_what_the_registry_says_is_final(blob: Path, error: SociError) -> None:
    """Nobody else is asked."""
    with pytest.raises(type(error)):
        await asked(blob, failing(error), good)


async def test_what_may_pass_is_tried_again(blob: Path) -> None:
    """Until a fetcher brings it."""
    away = failing(Unavailable("going down"))
    assert await asked(blob, away, away, good) == (1, 3)


async def test_no_more_than_a_few_times(blob: Path) -> None:
    """The last error is raised."""
    late = failing(DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded):
        await asked(blob, late, late, late, good)


async def test_as_often_as_something_comes(blob: Path) -> None:
    """A large blob takes longer than an ask may."""
    late = failing(DeadlineExceeded("late"), grows=True)
    assert await asked(blob, *[late] * 10, good) == (11, 11)


async def test_a_fetcher_that_dies_silently(blob: Path) -> None:
    """Its lock is free and no answer comes: another one is asked."""

    async def dies(writer: ArrivingWriter) -> None:
        writer.close()
        await asyncio.Event().wait()

    bus = MemoryBus()
    count = 0

    async def fetch(ask: FetchLayer, _context: Context) -> LayerFetched:
        nonlocal count
        count += 1
        writer = writer_of(blob)
        if count == 1:
            await dies(writer)
        await good(writer)
        writer.close()
        return LayerFetched(ask.path, 1)

    await bus.serve(FetchLayer, fetch)
    assert await fetch_blob(bus, FetchLayer("r/i:1", LAYER, None, str(blob)), None) == 1
    assert count == 2


async def test_a_fetcher_that_dies_at_the_very_end(blob: Path) -> None:
    """The blob is complete, only nobody says so: that is an answer too."""
    bus = MemoryBus()

    async def fetch(_ask: FetchLayer, _context: Context) -> LayerFetched:
        with closing(writer_of(blob)) as writer:
            await good(writer)
        await asyncio.Event().wait()
        raise AssertionError

    await bus.serve(FetchLayer, fetch)
    assert await fetch_blob(bus, FetchLayer("r/i:1", LAYER, None, str(blob)), None) == 1


async def test_a_fetcher_that_has_no_time_yet(blob: Path) -> None:
    """An ask that waits for its turn is not given up: no writer has come yet."""
    bus = MemoryBus()
    count = 0

    async def fetch(ask: FetchLayer, _context: Context) -> LayerFetched:
        nonlocal count
        count += 1
        await asyncio.sleep(0.3)  # thirty looks
        with closing(writer_of(blob)) as writer:
            await good(writer)
        return LayerFetched(ask.path, 1)

    await bus.serve(FetchLayer, fetch)
    assert await fetch_blob(bus, FetchLayer("r/i:1", LAYER, None, str(blob)), None) == 1
    assert count == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (Unavailable(""), True),
        (DeadlineExceeded(""), True),
        (RegistryUnavailable(""), False),
        (NotFound(""), False),
        (SociError(""), False),
    ],
    ids=repr,
)
def test_which_errors_may_pass(error: SociError, passes: bool) -> None:  # noqa: FBT001
    """Those of processes, not those of the registry."""
    assert may_pass(error) == passes


# --- directories that stay open


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[tuple[Path, Parents]]:
    """A directory and the open ones in it."""
    top = tmp_path / "top"
    top.mkdir()
    root = os.open(top, os.O_RDONLY)
    parents = Parents(root)
    yield top, parents
    parents.close()
    os.close(root)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_directories_stay_open_but_not_all(tree: tuple[Path, Parents]) -> None:
    """The same descriptor for the same directory; a bounded number; the right directory however deep and however many."""
    top, parents = tree
    before = descriptors()
    (top / "a/b").mkdir(parents=True)
    assert parents.open((b"a", b"b")) == parents.open((b"a", b"b"))
    for number in range(3 * OPEN_DIRECTORIES):
        (top / f"d{number}/e").mkdir(parents=True)
        assert os.fstat(parents.open((b"d%d" % number, b"e"))).st_ino == (top / f"d{number}/e").stat().st_ino
    assert descriptors() - before <= OPEN_DIRECTORIES
    deep = (b"x",) * 300

    def make(parent: int, parts: tuple[bytes, ...]) -> None:
        os.mkdir(parts[-1], dir_fd=parent)

    found = os.fstat(parents.open(deep, make)).st_ino
    assert os.fstat(parents.open(deep)).st_ino == found == Path(top, *["x"] * 300).stat().st_ino
    assert descriptors() - before <= OPEN_DIRECTORIES
    parents.close()
    assert descriptors() == before


def test_a_directory_that_is_no_more(tree: tuple[Path, Parents]) -> None:
    """Once forgotten, it and what was below it are looked for anew; its neighbours stay open."""
    top, parents = tree
    (top / "a/b").mkdir(parents=True)
    (top / "ab").mkdir()
    kept = parents.open((b"ab",))
    parents.open((b"a", b"b"))
    parents.forget((b"a",))
    (top / "a/b").rmdir()
    (top / "a").rmdir()
    with pytest.raises(FileNotFoundError):
        parents.open((b"a", b"b"))
    assert parents.open((b"ab",)) == kept


def test_no_way_through_a_symlink(tree: tuple[Path, Parents], tmp_path: Path) -> None:
    """Neither as the last step nor before it."""
    top, parents = tree
    (tmp_path / "outside/in").mkdir(parents=True)
    (top / "s").symlink_to(tmp_path / "outside")
    for parts in ((b"s",), (b"s", b"in")):
        with pytest.raises(OSError):
            parents.open(parts)


# --- settling


def test_settling_what_became_something_else(tmp_path: Path) -> None:
    """An implied directory that was replaced, or whose lower one is hidden or none, is left alone; the others are
    settled whatever their order."""
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for name in ("file", "gone/below", "link", "kept", "deep/er"):
        (lower / name).mkdir(parents=True)
        (lower / name).chmod(0o700)
    (upper / "deep/er").mkdir(parents=True)
    (upper / "kept").mkdir(mode=0o755)
    (upper / "own").mkdir(mode=0o711)
    (upper / "file").touch(mode=0o644)
    (upper / "link").symlink_to(lower)
    names = ("file", "file/below", "gone/below", "link", "link/kept", "own", "deep/er", "kept")
    settle(upper, [lower], [Implied(tuple(os.fsencode(name).split(b"/"))) for name in names], sync=True)
    modes = {name: (upper / name).lstat().st_mode & 0o777 for name in ("file", "own", "kept", "deep/er")}
    assert modes == {"file": 0o644, "own": 0o711, "kept": 0o700, "deep/er": 0o700}
    assert (lower / "kept").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_was_listed_later(tmp_path: Path) -> None:
    """It keeps what it says, and gets only the xattrs that it does not name."""
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for top, mode in ((upper, 0o755), (lower, 0o700)):
        (top / "d").mkdir(parents=True)
        (top / "d").chmod(mode)
        os.setxattr(top / "d", "user.both", os.fsencode(top.name))
    os.setxattr(lower / "d", "user.below", b"1")
    os.utime(upper / "d", ns=(5, 5))
    settle(upper, [lower], [Implied((b"d",), listed=True)])
    found = (upper / "d").stat()
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o755, 5)
    assert os.getxattr(upper / "d", "user.both") == b"upper"
    assert os.getxattr(upper / "d", "user.below") == b"1"


PARTS = st.lists(st.binary(min_size=1, max_size=5).filter(lambda name: b"/" not in name), min_size=1, max_size=4)


@given(st.lists(st.builds(Implied, PARTS.map(tuple), st.booleans()), max_size=5).map(tuple), st.integers(0, 1 << 60))
def test_a_result_crosses_the_socket(implied: tuple[Implied, ...], size: int) -> None:
    """Whatever bytes names are made of."""
    result = Result(size, 3, True, implied)  # noqa: FBT003
    assert decode_result(encode_result(result)) == result


# --- one sync for many


async def test_syncs_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is never content with a sync that was under way before it; all that come meanwhile share the next one."""
    begun: list[asyncio.Event] = []
    may_end = [asyncio.Event() for _ in range(3)]

    async def slow(_function: object, _folder: Path) -> None:
        begun.append(asyncio.Event())
        await may_end[len(begun) - 1].wait()

    monkeypatch.setattr(placing, "in_thread", slow)
    syncs = Syncs(tmp_path)
    first = asyncio.ensure_future(syncs.sync())
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(syncs.sync()) for _ in range(5)]
    await asyncio.sleep(0)
    assert len(begun) == 1
    may_end[0].set()
    await first
    assert not any(other.done() for other in others)
    may_end[1].set()
    await asyncio.gather(*others)
    assert len(begun) == 2


async def test_a_sync_that_fails(tmp_path: Path) -> None:
    """Its callers hear of it, and the next one tries again."""
    syncs = Syncs(tmp_path / "folder")
    with pytest.raises(SociError):
        await syncs.sync()
    (tmp_path / "folder").mkdir()
    await syncs.sync()
