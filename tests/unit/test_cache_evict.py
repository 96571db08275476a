# SPDX-License-Identifier: Apache-2.0
"""Bytes that leave the cache: no reader takes a hole for bytes, nobody who is at it is disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.errors import LimitExceeded, NotFound, Unavailable
from soci_cache import LayerStore, LayerWriter, evict, locks, store
from soci_cache.evict import is_read, remove_layer, take_away
from soci_cache.presence import AHEAD, FILLED, NEEDED
from support.mounter_layers import Made, item, make, noise

READ = """
import sys, time
from pathlib import Path
from soci_cache import LayerStore
reader = LayerStore(Path(sys.argv[1])).read(sys.argv[2], sys.argv[3])
tar = Path(sys.argv[4]).read_bytes()
sizes = [reader.spans.uncompressed(span) for span in range(reader.spans.count)]
ends = time.monotonic() + float(sys.argv[5])
good = 0
print("ready", flush=True)
while time.monotonic() < ends:
    for span, (start, end) in enumerate(sizes):
        data = reader.get(end - start, start, range(span, span + 1))
        if data is not None:
            assert data == tar[start:end], f"span {span} is wrong"
            good += 1
print(good, flush=True)
"""
SECONDS = 2.0
LIMIT = 30.0


@pytest.fixture(scope="module")
def made() -> Made:
    """A layer of about a dozen spans."""
    return make([item("a", noise(700_000))])


@pytest.fixture
def cache(tmp_path: Path, made: Made) -> LayerStore:
    """A cache with all of the layer in it."""
    cache = LayerStore(tmp_path / "cache")
    cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
    fill(cache, made)
    return cache


@pytest.fixture
def place(cache: LayerStore, made: Made) -> Path:
    return cache.directory(made.layer, made.ztoc_digest)


def fill(cache: LayerStore, made: Made, mark: int = NEEDED) -> None:
    with cache.write(made.layer, made.ztoc_digest) as writer:
        for span in writer.missing(range(writer.spans.count)):
            start, end = writer.spans.uncompressed(span)
            writer.fill(span, made.tar[start:end], mark)


def take(cache: LayerStore, made: Made, *spans: int) -> tuple[int, int]:
    with cache.write(made.layer, made.ztoc_digest) as writer, locks.folder(writer.directory):
        return take_away(writer.directory, writer.spans, spans)


def test_spans_go_and_come_again(cache: LayerStore, made: Made, place: Path) -> None:
    """Their room is free, their neighbours keep every byte, and they can be filled anew, with another mark."""
    before = (place / "layer.tar").stat().st_blocks
    went, freed = take(cache, made, 2, 3, 7)
    assert went == 3
    assert freed == (before - (place / "layer.tar").stat().st_blocks) * 512
    assert freed >= 2 * (64 << 10)
    with cache.read(made.layer, made.ztoc_digest) as reader:
        count = reader.spans.count
        assert reader.missing(range(count)) == [2, 3, 7]
        for span in range(count):
            start, end = reader.spans.uncompressed(span)
            data = reader.get(end - start, start, range(span, span + 1))
            assert data == (None if span in {2, 3, 7} else made.tar[start:end])
        assert (place / "layer.tar").stat().st_size == made.ztoc.uncompressed_size
        fill(cache, made, AHEAD)
        assert reader.missing(range(count)) == []
        assert reader.pread(made.ztoc.uncompressed_size, 0) == made.tar[: made.ztoc.uncompressed_size]
    here = cache.here(made.layer, made.ztoc_digest)
    assert here
    assert (here.present, here.whatever) == (count, count)


def test_what_went_stays_away_after_a_boot(
    cache: LayerStore, made: Made, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's record of the taking, or else the bytes, say so; marks keep what they came for."""
    take(cache, made, 4)
    fill(cache, made, FILLED)
    take(cache, made, 1)
    monkeypatch.setattr(store, "boot_id", lambda: "0" * 36)
    with cache.read(made.layer, made.ztoc_digest) as reader:
        assert reader.missing(range(reader.spans.count)) == [1]
        assert reader._presence[4] == FILLED
        assert reader._presence[5] == NEEDED


def test_a_span_that_is_being_filled_stays(cache: LayerStore, made: Made) -> None:
    """Between its bytes and its mark nobody makes a hole of it; others of the same call go."""
    take(cache, made, 5)
    went: list[tuple[int, int]] = []
    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(5)

        def pieces() -> Iterator[bytes]:
            yield made.tar[start : end - 100]
            went.append(take(cache, made, 5, 6))
            yield made.tar[end - 100 : end]

        writer.fill_pieces(5, pieces())
        assert went[0][0] == 1
        assert writer.missing(range(writer.spans.count)) == [6]
    with cache.read(made.layer, made.ztoc_digest) as reader:
        assert reader.pread(end - start, start) == made.tar[start:end]


def test_a_fill_waits_for_who_takes_the_span_away(
    cache: LayerStore, made: Made, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on once the lock is free, and fails after a limit where it never is."""
    take(cache, made, 3)
    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(3)
        tar = os.open(place / "layer.tar", os.O_RDWR)
        assert locks.take_span(tar, 3)
        with monkeypatch.context() as patch:
            patch.setattr(locks, "SPAN_WAIT", 0.05)
            with pytest.raises(Unavailable, match="span 3"):
                writer.fill(3, made.tar[start:end])
        freeing = threading.Timer(0.05, os.close, (tar,))
        freeing.start()
        writer.fill(3, made.tar[start:end])
        freeing.join()
        assert writer.present(3)


def test_a_span_filled_twice_is_left_alone(cache: LayerStore, made: Made) -> None:
    """Once it is here another filling writes nothing: readers are at it."""
    with cache.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(2)
        writer.fill(2, bytes(end - start))
    with cache.read(made.layer, made.ztoc_digest) as reader:
        assert reader.pread(end - start, start) == made.tar[start:end]


def test_a_file_system_without_holes_loses_nothing(
    cache: LayerStore, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bytes cannot be given back, no mark goes."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(evict, "punch", refuse)
    with pytest.raises(OSError, match="not supported"):
        take(cache, made, 1)
    with cache.read(made.layer, made.ztoc_digest) as reader:
        assert reader.missing(range(reader.spans.count)) == []


def test_readers_beside_an_evictor_see_no_wrong_byte(
    cache: LayerStore, made: Made, place: Path, tmp_path: Path
) -> None:
    """Two readers in other processes, while spans go and come as fast as they can: right bytes or none."""
    tar = tmp_path / "tar"
    tar.write_bytes(made.tar)
    words = (tmp_path / "cache", made.layer, made.ztoc_digest, tar, SECONDS)
    readers = [
        subprocess.Popen([sys.executable, "-c", READ, *map(str, words)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for one in readers:
        assert one.stdout is not None
        assert one.stdout.readline() == b"ready\n"
    rounds = 0
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        take(cache, made, *range(0, 11, 1 + rounds % 3))
        fill(cache, made)
        rounds += 1
    for one in readers:
        said, _ = one.communicate(timeout=LIMIT)
        assert one.returncode == 0
        assert int(said) > 0
    assert rounds > 3


def test_a_layer_goes_unless_it_is_read(cache: LayerStore, made: Made, place: Path) -> None:
    """A reader, of whatever process, keeps the folder; without one nothing is left of it, and its room is free."""
    reader = cache.read(made.layer, made.ztoc_digest)
    assert is_read(place)
    with locks.folder(place):
        assert remove_layer(place) is None
    assert reader.pread(10, 0) == made.tar[:10]
    reader.close()
    assert not is_read(place)
    with cache.write(made.layer, made.ztoc_digest) as writer:  # a fetcher's open file must not keep the room
        with locks.folder(place):
            size = remove_layer(place)
        assert size is not None
        assert size > made.ztoc.uncompressed_size
        assert os.fstat(writer._tar).st_blocks == 0
        assert not writer.current()
    assert not place.parent.exists()
    with pytest.raises(NotFound):
        cache.read(made.layer, made.ztoc_digest)


def test_who_waited_for_a_folder_that_went_makes_it_anew(cache: LayerStore, made: Made, place: Path) -> None:
    """A preparing that finds the folder locked, and then gone, has a folder of its own in the end."""
    done: list[bool] = []

    def prepare() -> None:
        cache.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
        done.append(True)

    with locks.folder(place):
        other = threading.Thread(target=prepare)
        other.start()
        time.sleep(0.1)  # it waits for the lock now; if not, it is even simpler
        remove_layer(place)
    other.join(LIMIT)
    assert done
    with cache.read(made.layer, made.ztoc_digest) as reader:
        assert reader.present_count() == 0


def test_a_killed_evictor_leaves_no_wrong_byte(cache: LayerStore, made: Made, place: Path, tmp_path: Path) -> None:
    """Killed at random while it takes spans away: what is marked has its bytes, and all can be filled again."""
    script = (
        "import sys; from pathlib import Path\n"
        "from soci_cache import LayerStore, locks; from soci_cache.evict import take_away\n"
        "store = LayerStore(Path(sys.argv[1])); writer = store.write(sys.argv[2], sys.argv[3])\n"
        "print('ready', flush=True)\n"
        "for span in range(writer.spans.count):\n"
        "    with locks.folder(writer.directory): take_away(writer.directory, writer.spans, [span])\n"
        "    print(span, flush=True)\n"
    )
    for kept in (0, 1, 2, 5):
        words = [sys.executable, "-c", script, str(tmp_path / "cache"), made.layer, made.ztoc_digest]
        child = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(kept + 1):
            assert child.stdout.readline()
        child.kill()
        child.communicate(timeout=LIMIT)
        with cache.read(made.layer, made.ztoc_digest) as reader:
            for span in range(reader.spans.count):
                start, end = reader.spans.uncompressed(span)
                data = reader.get(end - start, start, range(span, span + 1))
                assert data in {None, made.tar[start:end]}
        fill(cache, made)
        with cache.read(made.layer, made.ztoc_digest) as reader:
            assert reader.pread(made.ztoc.uncompressed_size, 0) == made.tar[: made.ztoc.uncompressed_size]


def test_a_full_disk_is_asked_for_room_once(
    cache: LayerStore, made: Made, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that finds no room is tried again after room was made."""
    take(cache, made, 2)
    asked: list[tuple[Path, int]] = []
    roomy = LayerStore(cache._layers.parent, room=lambda where, size: asked.append((where, size)))
    real = os.pwrite

    def write(descriptor: int, data: bytes, offset: int) -> int:
        if not asked:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    told: list[tuple[LayerWriter, int]] = []
    roomy._told = lambda writer, size: told.append((writer, size))
    with roomy.write(made.layer, made.ztoc_digest) as writer:
        start, end = writer.spans.uncompressed(2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write)
            with pytest.raises(LimitExceeded):  # and nothing goes for what nobody needs
                writer.fill(2, made.tar[start:end], FILLED)
            assert asked == []
            writer.fill(2, made.tar[start:end])
        assert writer.full()
        assert asked == [(place, end - start)]
        assert told == [(writer, end - start)]
