# SPDX-License-Identifier: Apache-2.0
"""The span cache with several processes at it, killed ones among them, and on a disk that is full."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci.errors import LimitExceeded
from soci.span import Spans
from soci_cache import LayerStore, LayerWriter, tidy
from soci_cache.journal import encode_record
from soci_cache.presence import FILLED, NEEDED
from soci_cache.proof import COMPLETE, prove
from support.mounter_layers import Made, item, make, noise

LIMIT = 30.0
"""Seconds for a child."""

PREPARE = """
import sys
from pathlib import Path
from soci_cache import LayerStore
store = LayerStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read(1)
store.prepare(sys.argv[2], sys.argv[3], Path(sys.argv[4]).read_bytes()).close()
"""
FILL = """
import random, sys
from pathlib import Path
from soci_cache import LayerStore
writer = LayerStore(Path(sys.argv[1])).write(sys.argv[2], sys.argv[3])
tar = Path(sys.argv[4]).read_bytes()
order = list(range(writer.spans.count))
random.Random(int(sys.argv[5])).shuffle(order)
print("ready", flush=True)
for span in order:
    start, end = writer.spans.uncompressed(span)
    writer.fill(span, tar[start:end])
    print(span, flush=True)
"""


@pytest.fixture(scope="module")
def made() -> Made:
    """A layer of about a hundred spans."""
    return make([item("a", noise(3_000_000))], span_size=1 << 15)


def child(script: str, *words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def present(store: LayerStore, made: Made) -> list[int]:
    with store.read(made.layer, made.ztoc_digest) as reader:
        here = [span for span in range(reader.spans.count) if reader.present(span)]
        for span in here:
            start, end = reader.spans.uncompressed(span)
            assert reader.pread(end - start, start) == made.tar[start:end], f"span {span} is marked, but not here"
        return here


def test_two_processes_prepare_at_once(tmp_path: Path, made: Made) -> None:
    """Both succeed, there is one folder, and no draft is left."""
    blob = tmp_path / "ztoc"
    blob.write_bytes(made.ztoc_bytes)
    for number in range(4):
        cache = tmp_path / str(number)
        children = [child(PREPARE, cache, made.layer, made.ztoc_digest, blob) for _ in range(3)]
        for one in children:
            assert one.stdout is not None
            assert one.stdout.readline() == b"ready\n"
        for one in children:
            assert one.stdin is not None
            one.stdin.write(b"x")
            one.stdin.flush()
        for one in children:
            one.communicate(timeout=LIMIT)
            assert one.returncode == 0
        place = LayerStore(cache).directory(made.layer, made.ztoc_digest)
        assert sorted(path.name for path in place.parent.iterdir()) == [place.name]
        assert sorted(path.name for path in place.iterdir()) == ["journal", "layer.tar", "spans", "ztoc"]


def test_a_killed_writer_marks_nothing_that_is_not_here(tmp_path: Path, made: Made) -> None:
    """Two writers at a time, killed at random points: each mark has its bytes, and what was said filled is marked."""
    tar = tmp_path / "tar"
    tar.write_bytes(made.tar)
    store = LayerStore(tmp_path / "cache")
    store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
    chance = random.Random(4)
    for number in range(8):
        words = (tmp_path / "cache", made.layer, made.ztoc_digest, tar)
        killed, other = child(FILL, *words, number), child(FILL, *words, 100 + number)
        said: list[int] = []
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"ready\n"
        said.extend(int(killed.stdout.readline()) for _ in range(chance.randrange(12)))
        for one in (killed, other):
            one.send_signal(signal.SIGKILL)
            one.communicate(timeout=LIMIT)
        here = present(store, made)
        assert set(said) <= set(here)
        with store.write(made.layer, made.ztoc_digest) as writer:
            for span in here:
                writer._presence.clear(span)


def test_a_killed_writer_s_journal_is_believed_after_a_boot(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed writer said filled is still here when the boot id is another, page cache permitting."""
    tar = tmp_path / "tar"
    tar.write_bytes(made.tar)
    store = LayerStore(tmp_path / "cache")
    store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
    writer = child(FILL, tmp_path / "cache", made.layer, made.ztoc_digest, tar, 1)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    said = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=LIMIT)
    monkeypatch.setattr("soci_cache.store.boot_id", lambda: "0" * 36)
    assert set(said) <= set(present(store, made))


CHURN = """
import random, sys
from pathlib import Path
from soci.errors import SociError
from soci_cache import LayerStore, locks
from soci_cache.evict import take_away
from soci_cache.proof import forget_whole, prove
store = LayerStore(Path(sys.argv[1]))
writer = store.write(sys.argv[2], sys.argv[3])
tar = Path(sys.argv[4]).read_bytes()
chance = random.Random(int(sys.argv[5]))
last = writer.spans.count - 1
print("ready", flush=True)
while True:
    for span in chance.sample(range(last + 1), last + 1):
        start, end = writer.spans.uncompressed(span)
        writer.fill_pieces(span, (tar[start : end if span < last else None],), chance.choice((1, 2, 3)), tail=True)
    prove(writer.directory, writer.spans)
    with locks.folder(writer.directory):
        forget_whole(writer.directory, writer._presence)
        take_away(writer.directory, writer.spans, chance.sample(range(last + 1), chance.randrange(last)))
"""


def flip_bytes(place: Path, chance: random.Random) -> None:
    with (place / "layer.tar").open("r+b") as tar:
        size = tar.seek(0, os.SEEK_END)
        for _ in range(20):
            tar.seek(chance.randrange(size))
            tar.write(b"flip")
        tar.truncate(size)


def cut_journal(place: Path, chance: random.Random) -> None:
    size = (place / "journal").stat().st_size
    os.truncate(place / "journal", chance.randrange(size + 1))


def other_journal(place: Path, chance: random.Random) -> None:
    records = (encode_record(span, chance.randbytes(32)) for span in range(100))
    (place / "journal").write_bytes(b"".join(records))


def wrong_count(place: Path, chance: random.Random) -> None:
    content = bytearray((place / "spans").read_bytes())
    content[12:16] = chance.randrange(1000).to_bytes(4, "little")
    (place / "spans").write_bytes(content)


def all_marked(place: Path, chance: random.Random) -> None:
    content = (place / "spans").read_bytes()
    (place / "spans").write_bytes(content[:64] + bytes([chance.choice((1, 3, 255))]) * (len(content) - 64))


def nothing(place: Path, chance: random.Random) -> None:
    del place, chance


@pytest.mark.parametrize("damage", [nothing, flip_bytes, cut_journal, other_journal, wrong_count, all_marked])
def test_killed_at_random_and_damaged(
    tmp_path: Path, made: Made, damage: Callable[[Path, random.Random], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that fill, prove and take away at once are killed with no warning, again and again; then the machine
    goes down, and the disk loses or spoils what it had. Each mark has its bytes all the same, in this boot and in the
    next, and what is filled again is the layer."""
    tar = tmp_path / "tar"
    tar.write_bytes(made.tar)
    store = LayerStore(tmp_path / "cache")
    whole = sha256_digest(made.tar)
    store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes, whole).close()
    chance = random.Random(damage.__name__)
    for number in range(3 if damage is nothing else 1):
        words = (tmp_path / "cache", made.layer, made.ztoc_digest, tar)
        children = [child(CHURN, *words, 2 * number + other) for other in range(2)]
        for one in children:
            assert one.stdout is not None
            assert one.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.02, 0.3))
        for one in children:
            one.send_signal(signal.SIGKILL)
        for one in children:
            one.communicate(timeout=LIMIT)
            assert one.returncode == -signal.SIGKILL, "it ended by itself"
        present(store, made)
    place = store.directory(made.layer, made.ztoc_digest)
    damage(place, chance)
    monkeypatch.setattr("soci_cache.store.boot_id", lambda: "0" * 36)
    present(store, made)
    with store.write(made.layer, made.ztoc_digest) as writer:
        last = writer.spans.count - 1
        writer._presence.clear(last)  # its padding may be lost
        for span in writer.missing(range(last + 1)):
            start, end = writer.spans.uncompressed(span)
            writer.fill_pieces(span, (made.tar[start : end if span < last else None],), tail=True)
        assert prove(place, writer.spans) in {None, COMPLETE}
    with store.read(made.layer, made.ztoc_digest) as reader:
        assert reader._presence.verdict == COMPLETE
    assert present(store, made) == list(range(last + 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True, timeout=LIMIT)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=LIMIT)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts")
def test_a_full_disk(small_disk: Path) -> None:
    """`LimitExceeded`; what is marked has its bytes, the span that did not fit is absent, and space helps."""
    made = make([item("a", noise(3_000_000))], span_size=1 << 18)
    store = LayerStore(small_disk / "cache")
    store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
    (small_disk / "ballast").write_bytes(bytes(300_000))
    filled: list[int] = []

    def fill_all(writer: LayerWriter) -> None:
        for span in range(writer.spans.count):
            start, end = writer.spans.uncompressed(span)
            writer.fill(span, made.tar[start:end])
            filled.append(span)

    with store.write(made.layer, made.ztoc_digest) as writer:
        with pytest.raises(LimitExceeded, match="full"):
            fill_all(writer)
        assert filled
        assert present(store, made) == filled
        (small_disk / "ballast").unlink()
        start, end = writer.spans.uncompressed(len(filled))
        writer.fill(len(filled), made.tar[start:end])
    assert present(store, made) == [*filled, len(filled)]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts")
def test_a_disk_too_full_for_a_layer(small_disk: Path, made: Made) -> None:
    """`LimitExceeded`, and nothing of the attempt is left."""
    assert len(made.ztoc_bytes) > 1 << 20
    store = LayerStore(small_disk / "cache")
    with pytest.raises(LimitExceeded, match="full"):
        store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes)
    parent = store.directory(made.layer, made.ztoc_digest).parent
    assert list(parent.iterdir()) == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts")
def test_a_full_disk_of_spans_that_nobody_needs(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is filled in the room of another one's background spans; every byte that is marked is right."""
    monkeypatch.setattr(tidy, "ROOM_BYTES", 1 << 16)
    one, two = (make([item("a", noise(300_000, seed))], span_size=1 << 16) for seed in range(2))
    cache = small_disk / "cache"

    def room(_place: Path, size: int) -> None:
        tidy.make_room(cache, size)

    store = LayerStore(cache, room=room)
    for made, mark in ((one, FILLED), (two, NEEDED)):
        store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
        if made is two:
            disk = os.statvfs(small_disk)
            (small_disk / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_bsize - 150_000))
        with store.write(made.layer, made.ztoc_digest) as writer:
            for span in range(writer.spans.count):
                start, end = writer.spans.uncompressed(span)
                writer.fill(span, made.tar[start:end], mark)
    assert present(store, two) == list(range(Spans.of(two.ztoc).count))
    left = present(store, one)
    assert 0 < len(left) < Spans.of(one.ztoc).count
