# SPDX-License-Identifier: Apache-2.0
"""A blob that is read while it comes: the reader never goes past what is there, and sees how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from soci.errors import FailedPrecondition, InvalidInput, SociError, Unavailable
from soci_cache import arriving
from soci_cache.arriving import COMING, COMPLETE, FAILED, ArrivingReader, ArrivingWriter, announce, beside, forget


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    """A file that was announced."""
    announce(tmp_path / "blob")
    return tmp_path / "blob"


def never() -> bool:
    return False


def writing(blob: Path) -> ArrivingWriter:
    """The writer, which must be to be had."""
    writer = ArrivingWriter.claim(blob)
    assert writer is not None
    return writer


def counted(limit: int) -> Callable[[], bool]:
    """True from the ``limit``-th question on."""
    answers = iter([False] * (limit - 1))
    return lambda: next(answers, True)


def test_the_reader_sees_what_is_counted_and_no_more(blob: Path) -> None:
    """Bytes that are written but not counted are not read; the end is told by the state alone."""
    with closing(writing(blob)) as writer, closing(ArrivingReader(blob, stopped=counted(2))) as reader:
        writer.write(0, b"abcdef")
        writer.advance(4)
        assert reader.read(3) == b"abc"
        assert reader.read(10) == b"d"
        with pytest.raises(SociError, match="given up"):
            reader.read(10)
        writer.advance(2)  # never back
        assert writer.arrived == 4
        writer.advance(6)
        assert reader.read(10) == b"ef"
        writer.finish(COMPLETE)
        assert reader.read(10) == b""
        assert reader.read(10) == b""


def test_the_reader_waits(blob: Path) -> None:
    """Everything that a slow writer brings comes through, chunks that arrive out of order included."""
    content = os.urandom(300_000)
    got: list[bytes] = []

    def read() -> None:
        with closing(ArrivingReader(blob, stopped=never)) as reader:
            while piece := reader.read(7_001):
                got.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    with closing(writing(blob)) as writer:
        for start in range(0, len(content), 50_000):
            for half in (start + 25_000, start):
                writer.write(half, content[half : half + 25_000])
            writer.advance(start + 50_000)
        writer.finish(COMPLETE)
    thread.join()
    assert b"".join(got) == content


def test_a_blob_that_failed(blob: Path) -> None:
    """The reader hears of it at once, also where bytes are left to read."""
    with closing(writing(blob)) as writer, closing(ArrivingReader(blob, stopped=never)) as reader:
        writer.write(0, b"abc")
        writer.advance(3)
        writer.finish(FAILED)
        with pytest.raises(Unavailable):
            reader.read(1)
    assert arriving.progress(blob) == (3, FAILED)


def test_a_reader_does_not_wait_for_ever(blob: Path) -> None:
    """Nothing for its time is an error."""
    with (
        closing(ArrivingReader(blob, stopped=never, stall=0.05)) as reader,
        pytest.raises(Unavailable, match=r"0\.05 s"),
    ):
        reader.read(1)


def test_one_writer_at_a_time(blob: Path) -> None:
    """A second one is told that there is one; after the first let go it goes on behind what is there."""
    assert (arriving.is_written(blob), arriving.writers(blob)) == (False, 0)
    with closing(writing(blob)) as first:
        assert (arriving.is_written(blob), arriving.writers(blob)) == (True, 1)
        assert ArrivingWriter.claim(blob) is None
        first.write(0, b"abc")
        first.advance(3)
    assert not arriving.is_written(blob)
    with closing(writing(blob)) as second:
        assert (second.arrived, second.state) == (3, COMING)
        assert arriving.writers(blob) == 2
        buffer = bytearray(10)
        assert second.read_into(memoryview(buffer), 1) == 2
        assert buffer[:2] == b"bc"


HOLD = """
import sys, time
from pathlib import Path
from soci_cache.arriving import ArrivingWriter
writer = ArrivingWriter.claim(Path(sys.argv[1]))
writer.write(0, b"abc")
writer.advance(3)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(blob: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes."""
    words = [sys.executable, "-c", HOLD, str(blob)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_writer_that_dies(blob: Path, holder: subprocess.Popen[str]) -> None:
    """Its lock goes with it, what it counted stays, and the blob never becomes complete by itself."""
    assert arriving.is_written(blob)
    assert ArrivingWriter.claim(blob) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not arriving.is_written(blob)
    assert arriving.progress(blob) == (3, COMING)
    with closing(writing(blob)) as writer:
        assert writer.arrived == 3


def test_a_blob_that_nobody_wants_any_more(blob: Path) -> None:
    """The writer sees it, and none can begin."""
    with closing(writing(blob)) as writer:
        before = writer.wanted
        forget(blob)
        assert (before, writer.wanted) == (True, False)
        writer.write(0, b"abc")
        writer.advance(3)
    assert list(blob.parent.iterdir()) == []
    with pytest.raises(FailedPrecondition):
        ArrivingWriter.claim(blob)
    assert not arriving.is_written(blob)
    assert arriving.progress(blob)[1] == FAILED
    with pytest.raises(OSError):
        ArrivingReader(blob, stopped=never)
    forget(blob)


def test_only_what_was_announced_is_written_to(tmp_path: Path) -> None:
    """No file is made, none is written through a symlink, and none is announced twice."""
    blob = tmp_path / "blob"
    with pytest.raises(FailedPrecondition):
        ArrivingWriter.claim(blob)
    announce(blob)
    with pytest.raises(FileExistsError):
        announce(blob)
    blob.unlink()
    with pytest.raises(FailedPrecondition):
        ArrivingWriter.claim(blob)
    kept = tmp_path / "kept"
    kept.write_bytes(b"precious")
    blob.symlink_to(kept)
    with pytest.raises(OSError):
        ArrivingWriter.claim(blob)
    assert kept.read_bytes() == b"precious"
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(InvalidInput):
        ArrivingWriter.claim(blob)


@pytest.mark.parametrize("content", [b"", b"x" * 15, b"x" * 17])
def test_a_strange_file_beside_a_blob(blob: Path, content: bytes) -> None:
    """Refused by writer and reader, and no descriptor is left open."""
    beside(blob).write_bytes(content)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(InvalidInput):
        ArrivingWriter.claim(blob)
    with pytest.raises(InvalidInput):
        ArrivingReader(blob, stopped=never)
    assert arriving.progress(blob)[1] == FAILED
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_count_that_lies(blob: Path) -> None:
    """More bytes counted than there are: an error, not an endless wait or an early end."""
    with closing(writing(blob)) as writer, closing(ArrivingReader(blob, stopped=never)) as reader:
        writer.write(0, b"abc")
        writer.advance(5)
        assert reader.read(10) == b"abc"
        with pytest.raises(InvalidInput):
            reader.read(10)
