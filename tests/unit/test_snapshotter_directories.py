# SPDX-License-Identifier: Apache-2.0
"""Snapshot directories: their modes, and that anything a container left in them can be deleted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci.errors import LimitExceeded, SociError, Unavailable
from soci_snapshotter import directories
from soci_snapshotter.directories import (
    error_of,
    make_directories,
    mark_shown,
    numbers,
    owner_of,
    remake_upper,
    remove_directory,
    was_shown,
)


@pytest.fixture
def dark() -> Iterator[None]:
    """A process with a strict umask."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.usefixtures("dark")
def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    """A container's root directory is open to its users, whatever the umask of the service."""
    make_directories(tmp_path / "7", active=True, owner=None)
    assert (mode(tmp_path / "7"), mode(tmp_path / "7/fs"), mode(tmp_path / "7/work")) == (0o700, 0o755, 0o711)
    (tmp_path / "7/fs/half").mkdir()
    remake_upper(tmp_path / "7/fs")
    assert mode(tmp_path / "7/fs") == 0o755
    assert list((tmp_path / "7/fs").iterdir()) == []
    make_directories(tmp_path / "8", active=False, owner=(os.getuid(), os.getgid()))
    assert not (tmp_path / "8/work").exists()


def test_what_was_there_is_thrown_away(tmp_path: Path) -> None:
    """A directory of this number is left over: nothing of it remains."""
    (tmp_path / "7/fs/old").mkdir(parents=True)
    make_directories(tmp_path / "7", active=True, owner=None)
    assert list((tmp_path / "7/fs").iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves nothing and is an error of ours; a full disk is told apart."""
    with pytest.raises(SociError, match="7"):
        make_directories(tmp_path / "missing/7", active=True, owner=None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directories, "_make_upper", full)
    with pytest.raises(LimitExceeded):
        make_directories(tmp_path / "7", active=True, owner=None)
    assert not (tmp_path / "7").exists()


def test_deep_trees_are_deleted(tmp_path: Path) -> None:
    """A tree deeper than recursion, descriptors and paths may be goes, too."""
    here = os.open(tmp_path, os.O_RDONLY)
    for level in range(3000):
        name = b"%d-" % level + b"d" * 200
        os.mkdir(name, dir_fd=here)
        os.symlink("/etc", b"link", dir_fd=here)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    victim = next(path for path in tmp_path.iterdir() if path.name.startswith("0-"))
    remove_directory(victim)
    assert not victim.exists()
    assert Path("/etc/passwd").exists()


def test_wide_and_odd_trees_are_deleted(tmp_path: Path) -> None:
    """Names of any bytes, directories without permissions, many of them; what is not there is success."""
    top = tmp_path / "top"
    for number in range(300):
        (top / f"{number}" / "sub").mkdir(parents=True)
    (top / os.fsdecode(b"\xff\xfe")).mkdir()
    os.mkfifo(top / "fifo")
    (top / "1").chmod(0o700 if os.geteuid() else 0)
    remove_directory(top)
    remove_directory(top)
    assert not top.exists()


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    """A link in place of the directory deletes nothing behind it."""
    (tmp_path / "there/kept").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(OSError):
        remove_directory(tmp_path / "link")
    assert (tmp_path / "there/kept").exists()


@pytest.mark.root
def test_a_mount_inside_is_not_emptied(tmp_path: Path) -> None:
    """What somebody mounted inside a snapshot keeps its files; the deletion fails instead."""
    inside = tmp_path / "top/inside"
    inside.mkdir(parents=True)
    os.system(f"mount -t tmpfs none {inside}")
    try:
        (inside / "precious").touch()
        with pytest.raises(OSError):
            remove_directory(tmp_path / "top")
        assert (inside / "precious").exists()
    finally:
        os.system(f"umount {inside}")
    remove_directory(tmp_path / "top")


def test_numbers(tmp_path: Path) -> None:
    """Only what is named by a number is a snapshot's directory."""
    for name in ("1", "20", "new-12", "1_2", "²", "007", "0", "1" * 30, "-3"):
        (tmp_path / name).mkdir()
    assert numbers(tmp_path) == {1, 20}
    with pytest.raises(SociError):
        numbers(tmp_path / "nothing")


def test_shown_mark(tmp_path: Path) -> None:
    """The mark that a mount may be there stays on disk."""
    make_directories(tmp_path / "7", active=True, owner=None)
    assert not was_shown(tmp_path / "7")
    mark_shown(tmp_path / "7")
    mark_shown(tmp_path / "7")
    assert was_shown(tmp_path / "7")
    with pytest.raises(SociError):
        mark_shown(tmp_path / "8")


def test_owner(tmp_path: Path) -> None:
    """The owner of a directory; a dead mount is `Unavailable`."""
    assert owner_of(tmp_path) == (os.getuid(), os.getgid())
    with pytest.raises(Unavailable):
        owner_of(tmp_path / "dead")
    assert isinstance(error_of(OSError(errno.EDQUOT, "quota"), "x"), LimitExceeded)
