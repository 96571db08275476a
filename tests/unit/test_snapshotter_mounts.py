# SPDX-License-Identifier: Apache-2.0
"""The mounts of each case, over local and lazy parents; launches; disk usage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from soci.errors import Unsupported
from soci.launch import new_traceparent
from soci_snapshotter import launches
from soci_snapshotter.labels import REMOTE
from soci_snapshotter.launches import LAUNCH_GAP, Launches
from soci_snapshotter.mounts import OVERLAY_LAYERS, Mount, Places, mounts_of
from soci_snapshotter.state import Kind, Snapshot
from soci_snapshotter.usage import disk_usage

PLACES = Places(Path("/r/s"), Path("/r/m"))


def snapshot(number: int, kind: Kind = "committed", *, lazy: bool = False) -> Snapshot:
    return Snapshot(number, f"n{number}", kind, "", {REMOTE: "remote snapshot"} if lazy else {}, 1, 1)


LOCAL, LAZY = snapshot(2), snapshot(1, lazy=True)


@pytest.mark.parametrize(
    ("kind", "parents", "expected"),
    [
        ("active", [], Mount("bind", "/r/s/9/fs", ("rw", "rbind"))),
        ("view", [], Mount("bind", "/r/s/9/fs", ("ro", "rbind"))),
        ("view", [LOCAL], Mount("bind", "/r/s/2/fs", ("ro", "rbind"))),
        ("view", [LAZY], Mount("bind", "/r/m/1", ("ro", "rbind"))),
        ("view", [LOCAL, LAZY], Mount("overlay", "overlay", ("lowerdir=/r/s/2/fs:/r/m/1",))),
        (
            "active",
            [LAZY],
            Mount("overlay", "overlay", ("workdir=/r/s/9/work", "upperdir=/r/s/9/fs", "lowerdir=/r/m/1")),
        ),
        (
            "active",
            [LOCAL, LAZY],
            Mount("overlay", "overlay", ("workdir=/r/s/9/work", "upperdir=/r/s/9/fs", "lowerdir=/r/s/2/fs:/r/m/1")),
        ),
    ],
)
def test_mounts(kind: Kind, parents: list[Snapshot], expected: Mount) -> None:
    """Each case has its mount, the options in containerd's order, the nearest parent first."""
    assert mounts_of(snapshot(9, kind), parents, PLACES, index_off=False) == (expected,)
    (with_index,) = mounts_of(snapshot(9, kind), parents, PLACES, index_off=True)
    extra = ("index=off",) if expected.type == "overlay" else ()
    assert with_index.options == extra + expected.options


def test_too_many_layers() -> None:
    """More layers than the kernel takes are refused with the number, not by the kernel with a riddle."""
    parents = [snapshot(number) for number in range(OVERLAY_LAYERS + 1)]
    with pytest.raises(Unsupported, match=str(OVERLAY_LAYERS)):
        mounts_of(snapshot(9999, "active"), parents, PLACES, index_off=False)
    assert mounts_of(snapshot(9999, "active"), parents[1:], PLACES, index_off=False)


def test_launch_goes_on() -> None:
    """Calls for one image in one namespace are one launch, until its container is prepared or nobody calls."""
    open_launches, trace = Launches(), new_traceparent()
    assert open_launches.find("ns", "m", None, 0.0) is None
    open_launches.begin("ns", "m", trace, 0.0)
    assert open_launches.find("ns", "m", None, LAUNCH_GAP) == trace
    assert open_launches.find("ns", "m", trace, LAUNCH_GAP * 1.5) == trace
    assert open_launches.find("other", "m", None, LAUNCH_GAP) is None
    assert open_launches.find("ns", "m", new_traceparent(), LAUNCH_GAP) is None
    assert open_launches.find("ns", "m", None, LAUNCH_GAP * 3) is None
    open_launches.begin("ns", "m", trace, 0.0)
    open_launches.end("ns", "m")
    open_launches.end("ns", "m")
    assert open_launches.find("ns", "m", None, 0.0) is None


def test_launches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many open launches the one not heard of for longest goes."""
    monkeypatch.setattr(launches, "OPEN_LAUNCHES", 2)
    open_launches = Launches()
    for name in ("a", "b"):
        open_launches.begin("ns", name, new_traceparent(), 0.0)
    assert open_launches.find("ns", "a", None, 1.0)
    open_launches.begin("ns", "c", new_traceparent(), 2.0)
    assert [bool(open_launches.find("ns", name, None, 3.0)) for name in ("a", "b", "c")] == [True, False, True]


def test_usage(tmp_path: Path) -> None:
    """Bytes are what the disk gives, hard links count once, symlinks are not followed, what is not there is nothing."""
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    (top / "file").write_bytes(b"x" * 10_000)
    os.link(top / "file", top / "d" / "twin")
    (top / "link").symlink_to(tmp_path)
    with (top / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    size, inodes = disk_usage(top)
    expected = sum(
        path.lstat().st_blocks * 512 for path in (top, top / "d", top / "file", top / "link", top / "sparse")
    )
    assert (size, inodes) == (expected, 5)
    assert disk_usage(tmp_path / "nothing") == (0, 0)


@pytest.mark.root
def test_usage_stays_on_its_file_system(tmp_path: Path) -> None:
    """What is mounted inside is not counted."""
    (tmp_path / "proc").mkdir()
    before = disk_usage(tmp_path)
    os.system(f"mount -t proc proc {tmp_path}/proc")
    try:
        size, inodes = disk_usage(tmp_path)
    finally:
        os.system(f"umount {tmp_path}/proc")
    assert inodes == before[1] - 1  # the mount point itself is the other file system's
    assert size <= before[0]
