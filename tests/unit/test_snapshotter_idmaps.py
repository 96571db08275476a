# SPDX-License-Identifier: Apache-2.0
"""Id maps: what labels mean, whom a file then belongs to, what is asked of the mounter, what a copy keeps."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.digest import sha256_digest
from soci.errors import InvalidInput, LimitExceeded, SociError, Unavailable
from soci.idmap import MAX_EXTENTS, NO_ID, IdMap, parse_id_map
from soci_bus import asks
from soci_bus.memory import MemoryBus
from soci_snapshotter import idmap, idmap_copy, idmap_local, idmap_mount, userxattr
from soci_snapshotter import labels as names
from soci_snapshotter.idmap import (
    GIDS,
    OVERFLOW,
    UIDS,
    MappedLayers,
    Owners,
    active_usage,
    client_part,
    is_remapped,
    mapped_places,
    owners_of,
)
from soci_snapshotter.idmap_copy import copy_layer
from soci_snapshotter.mounts import Mount, Places, mounts_of
from soci_snapshotter.state import Snapshot
from soci_snapshotter.usage import lazy_usage
from support.mounter_layers import SPAN_SIZE, item, make, noise

LAYER, ZTOC = sha256_digest(b"layer"), sha256_digest(b"ztoc")
LAZY = {
    names.REMOTE: names.REMOTE_VALUE,
    names.ZTOC: str(ZTOC),
    "containerd.io/snapshot/cri.image-ref": "docker.io/library/redis:7",
    "containerd.io/snapshot/cri.manifest-digest": str(sha256_digest(b"manifest")),
    "containerd.io/snapshot/cri.layer-digest": str(LAYER),
}
MAP = {UIDS: "0:100000:65536", GIDS: "0:200000:65536"}


def snapshot(number: int, kind: str = "committed", **labels: str) -> Snapshot:
    return Snapshot(number, f"n{number}", kind, "", labels, 1, 1)  # type: ignore[arg-type]


# --- maps


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("0:100000:65536", 0, 100_000),
        ("0:100000:65536", 65_535, 165_535),
        ("0:100000:65536", 65_536, NO_ID),
        ("0:100000:65536", -1, NO_ID),
        ("0:100000:65536", NO_ID, NO_ID),
        ("0:100000:65536", 1 << 40, NO_ID),
        ("1:100001:10,0:5:1", 0, 5),
        ("1:100001:10,0:5:1", 10, 100_010),
        ("1:100001:10,0:5:1", 11, NO_ID),
        ("5:0:1", 4, NO_ID),
        ("0:0:4294967295", 4_294_967_294, 4_294_967_294),
    ],
)
def test_the_host_number_of_a_container_number(text: str, inside: int, outside: int) -> None:
    """The first of an extent, the last of it, those beside it, and those that are no numbers of 32 bits."""
    assert parse_id_map(text).host(inside) == outside


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0:1",
        "0:1:2:3",
        "0:1:2,",
        "a:1:2",
        "-1:1:2",
        "+1:1:2",
        " 0:1:2",
        "0:1:2\n",
        "0:1:٢",
        "0:1:0",
        "0:1:99999999999",
        "0:0:4294967296",
        "4294967295:0:1",
        "0:4294967295:1",
        "4294967290:0:6",
        "0:1:10,5:100:10",
        "0:1:10,100:5:10",
        ",".join(f"{2 * one}:{2 * one}:1" for one in range(MAX_EXTENTS + 1)),
        '[{"container_id":0}]',
    ],
)
def test_what_is_no_map(text: str) -> None:
    """Wrong forms, empty or overlapping extents, numbers beyond 32 bits, and more extents than a kernel takes."""
    with pytest.raises(InvalidInput):
        parse_id_map(text)


@given(st.text(alphabet="0123456789:,-x ", max_size=40))
def test_any_text_is_a_map_or_refused(text: str) -> None:
    """Whatever a label says, the answer is a map that reads back, or `InvalidInput`."""
    try:
        made = parse_id_map(text)
    except InvalidInput:
        return
    assert parse_id_map(made.text()) == made
    assert all(made.host(inside) == outside and made.has_host(outside) for inside, outside, _ in made.extents)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=4))
def test_a_map_says_what_its_extents_say(extents: list[tuple[int, int, int]]) -> None:
    """Number by number, a map agrees with its extents written out; those that name a number twice are refused."""
    pairs = [(inside + step, outside + step) for inside, outside, length in extents for step in range(length)]
    clear = all(len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1))
    if not clear:
        with pytest.raises(InvalidInput, match="twice"):
            IdMap.of(extents)
        return
    made = IdMap.of(extents)
    assert [made.host(number) for number in range(80)] == [dict(pairs).get(number, NO_ID) for number in range(80)]


def test_as_many_extents_as_a_kernel_takes() -> None:
    """A map of `MAX_EXTENTS` reads, and reads back, whatever order it came in."""
    extents = [(2 * one, 1_000_000 - 3 * one, 2) for one in range(MAX_EXTENTS)]
    made = IdMap.of(reversed(extents))
    assert made == parse_id_map(made.text())
    assert [made.host(inside) for inside, _, _ in extents] == [outside for _, outside, _ in extents]


# --- labels


@pytest.mark.parametrize(
    ("labels", "below", "wanted"),
    [
        ({}, None, False),
        ({UIDS: "", GIDS: ""}, None, False),
        (MAP, None, True),
        (MAP, snapshot(1), True),
        (MAP, snapshot(1, **{names.MAPPED: "true"}), False),
        ({**MAP, names.REF: "sha256:x"}, None, False),
    ],
)
def test_when_owners_are_mapped(labels: dict[str, str], below: Snapshot | None, *, wanted: bool) -> None:
    """Where both labels are there, but not for a layer, nor over a copy that containerd mapped itself."""
    assert (owners_of(labels, below) is not None) is wanted


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({UIDS: MAP[UIDS]}, GIDS),
        ({GIDS: MAP[GIDS]}, UIDS),
        ({**MAP, UIDS: "0:1"}, UIDS),
        ({**MAP, GIDS: "0:1:0"}, GIDS),
    ],
)
def test_the_wrong_label_is_named(labels: dict[str, str], named: str) -> None:
    """A label that is missing or malformed is `InvalidInput`, and the text says which."""
    with pytest.raises(InvalidInput, match=named):
        owners_of(labels, None)


def test_what_is_nobodys_belongs_to_nobody() -> None:
    """A copy gives what the map leaves out to 65534, unless the map makes that number somebody."""
    owners = Owners(parse_id_map("0:100000:10"), parse_id_map("0:200000:10,70000:65534:1"))
    assert owners.of(3, 4) == (100_003, 200_004)
    assert owners.of(10, 0) == (OVERFLOW, 200_000)
    with pytest.raises(InvalidInput, match="65534"):
        owners.of(0, 10)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("default/9/sha256:aa-1-2", "default/8/sha256:aa-1-2-remap", True),
        ("sha256:aa", "sha256:aa-remap", True),
        ("default/9/sha256:aa", "default/8/extract-1 sha256:aa", False),
        ("default/9/a/b", "default/8/a/b-remap", True),
        ("default/9/a", "default/8/b-remap", False),
    ],
)
def test_a_copy_that_containerd_mapped(name: str, key: str, *, expected: bool) -> None:
    """It is committed under its key's name without ``-remap``, whatever namespace and numbers stand before both."""
    assert is_remapped(name, key) is expected
    assert client_part(name) == name.removeprefix("default/9/")


def test_mapped_layers_on_disk(tmp_path: Path) -> None:
    """Directories ``<layer>_<container>`` are found by their container; other names are not ours."""
    for name in ("1", "1_2", "11_2", "1_30", "new-1", "0_2", "1_02", "1_2_3", "a_2", "1_2000000000000000000000"):
        (tmp_path / name).mkdir()
    assert {number: sorted(kept) for number, kept in mapped_places(tmp_path).items()} == {
        2: ["11_2", "1_2"],
        30: ["1_30"],
    }
    with pytest.raises(SociError):
        mapped_places(tmp_path / "none")


# --- what the kernel can


@pytest.mark.parametrize(
    ("release", "expected"),
    [("5.18.9", False), ("5.19", True), ("5.19.0-rc1", True), ("6.1.0-13-amd64", True), ("10.0", True), ("x", False)],
)
def test_kernels_whose_overlayfs_takes_mapped_layers(release: str, *, expected: bool) -> None:
    """Linux 5.19 and later."""
    assert idmap_mount.overlay_takes(release) is expected


SHARED = "30 1 8:1 / / rw - ext4 /dev/a rw\n31 30 8:1 /x /var/lib/our\\040folder rw shared:4 - ext4 /dev/a rw"
SLAVE = "30 1 8:1 / / rw shared:1 - ext4 /dev/a rw\n31 30 8:1 /x /var/lib/our\\040folder rw master:4 - ext4 /dev/a rw"
HIDDEN = SHARED + "\n32 31 8:1 /y /var/lib/our\\040folder rw - ext4 /dev/a rw"
ELSEWHERE = "90 1 8:1 / / rw - ext4 /dev/a rw\n131 90 0:1 / /30 rw - x 31 rw"
FIRST = "pid:[4026531836]"


@pytest.mark.parametrize(
    ("mountinfo", "first", "pids", "expected"),
    [
        (SLAVE, SLAVE, FIRST, True),
        (SLAVE, ELSEWHERE, FIRST, False),
        (SLAVE, SLAVE, "pid:[7]", False),
        (SHARED, ELSEWHERE, FIRST, True),
        (SHARED, SHARED, "pid:[7]", True),
        (HIDDEN, ELSEWHERE, FIRST, False),
        (SLAVE, "", "", False),
        ("", "", "", False),
    ],
)
def test_whether_containerd_sees_our_mounts(mountinfo: str, first: str, pids: str, *, expected: bool) -> None:
    """In the machine's own mount namespace, or where the folder's topmost mount is shared."""
    assert idmap_mount.seen_outside(Path("/var/lib/our folder/snapshots"), mountinfo, first, pids) is expected


@pytest.mark.parametrize(
    ("uid_map", "takes", "expected"),
    [
        ("         0          0 4294967295\n", True, False),
        ("         0       1000          1\n", True, True),
        ("         0       1000          1\n", False, False),
        ("         0     100000      65536\n     65536 1 1\n", True, True),
        ("", True, True),
    ],
)
def test_when_overlayfs_keeps_user_attributes(uid_map: str, *, takes: bool, expected: bool) -> None:
    """In a user namespace, if its overlayfs takes the option; outside of all nobody even tries."""
    tried: list[bool] = []

    def take() -> bool:
        tried.append(takes)
        return takes

    assert userxattr.decide(uid_map, take) is expected
    assert bool(tried) is ("4294967295" not in uid_map)


# --- what is asked of the mounter


class Node:
    """A mounter of a few lines on a bus in memory."""

    def __init__(self, root: Path) -> None:
        self.places = Places(root / "snapshots", root / "mounts")
        self.places.snapshots.mkdir()
        self.bus = MemoryBus()
        self.asked: list[asks.MountLayer] = []
        self.mapped = MappedLayers(self.bus, self.places)

    async def begin(self) -> None:
        await self.bus.serve(asks.MountLayer, self._mount)
        await self.bus.serve(asks.CheckMounts, self._check)

    async def _mount(self, ask: asks.MountLayer, _context: object) -> asks.LayerMounted:
        await asyncio.sleep(0)
        assert (self.places.snapshots / ask.mount / "shown").exists(), "marked before it is shown"
        self.asked.append(ask)
        return asks.LayerMounted(str(self.places.mounts / ask.mount))

    async def _check(self, ask: asks.CheckMounts, _context: object) -> asks.MountsShown:
        shown = {one.mount for one in self.asked}
        return asks.MountsShown(tuple(mount for mount in ask.mounts if mount in shown))


async def test_lazy_layers_are_shown_once_more(tmp_path: Path) -> None:
    """Each is asked for once, with the maps and the plain layers below it, however many calls want it at once."""
    node = Node(tmp_path)
    await node.begin()
    top, low = snapshot(5, **LAZY), snapshot(3, **LAZY)
    container = snapshot(9, "active", **MAP)
    assert await asyncio.gather(*(node.mapped.have(container, [top, low]) for _ in range(5))) == [True] * 5
    assert {one.mount: one.lower for one in node.asked} == {"5_9": (str(node.places.mounts / "3"),), "3_9": ()}
    assert len(node.asked) == 2
    assert node.asked[0].uid_map == ((0, 100_000, 65_536),)
    assert node.asked[0].gid_map == ((0, 200_000, 65_536),)
    assert (node.asked[0].layer, node.asked[0].ztoc) == (LAYER, ZTOC)
    assert {one.name for one in node.places.snapshots.iterdir()} == {"5_9", "3_9"}
    assert not await node.mapped.have(snapshot(10, "active"), [top, low])


async def test_the_mounter_is_away(tmp_path: Path) -> None:
    """Then the container's call is `Unavailable`, and may be tried again."""
    node = Node(tmp_path)
    with pytest.raises(Unavailable):
        await node.mapped.have(snapshot(9, "active", **MAP), [snapshot(5, **LAZY)])


async def test_a_copy_that_nobody_waits_for_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a call is cancelled its copying is told to stop, and has stopped before the call ends."""
    node = Node(tmp_path)
    begun, ended = threading.Event(), threading.Event()

    def copying(_source: Path, _place: Path, _owners: Owners, stopped: Callable[[], bool]) -> None:
        begun.set()
        while not stopped():
            time.sleep(0.001)
        ended.set()

    monkeypatch.setattr(idmap, "have_local", copying)
    call = asyncio.ensure_future(node.mapped.have(snapshot(9, "active", **MAP), [snapshot(3)]))
    await asyncio.to_thread(begun.wait, 20)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


# --- what containerd is told


@pytest.mark.parametrize(
    ("kind", "parents", "options"),
    [
        ("view", [snapshot(5, **LAZY)], ("bind", "/m/5_9", ("ro", "rbind"))),
        ("view", [snapshot(3)], ("bind", "/s/3_9/fs", ("ro", "rbind"))),
        ("view", [snapshot(5, **LAZY), snapshot(3)], ("overlay", "overlay", ("lowerdir=/m/5_9:/s/3_9/fs",))),
        (
            "active",
            [snapshot(5, **LAZY), snapshot(3)],
            ("overlay", "overlay", ("workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir=/m/5_9:/s/3_9/fs")),
        ),
        ("active", [], ("bind", "/s/9/fs", ("rw", "rbind"))),
    ],
)
def test_mounts_over_mapped_layers(
    kind: str, parents: list[Snapshot], options: tuple[str, str, tuple[str, ...]]
) -> None:
    """They name the mapped layers; ``userxattr`` comes last, and only for an overlay."""
    places = Places(Path("/s"), Path("/m"))
    assert mounts_of(snapshot(9, kind), parents, places, index_off=False, mapped=True) == (Mount(*options),)
    (marked,) = mounts_of(snapshot(9, kind), parents, places, index_off=True, mapped=True, user_xattrs=True)
    if options[0] == "overlay":
        assert marked.options == ("index=off", *options[2], "userxattr")
    else:
        assert marked == Mount(*options)


def test_usage_of_a_lazy_layer(tmp_path: Path) -> None:
    """What the cache has allocated for it, without the holes of its tar; nothing for what is not in the cache."""
    made = make([item("file", noise(300_000))])
    made.put(tmp_path)
    labels = {**LAZY, names.ZTOC: str(made.ztoc_digest), "containerd.io/snapshot/cri.layer-digest": str(made.layer)}
    empty, inodes = lazy_usage(tmp_path, labels)
    assert inodes == 5
    made.fill(tmp_path, range(1))
    assert lazy_usage(tmp_path, labels)[0] >= empty + SPAN_SIZE
    assert lazy_usage(tmp_path, LAZY) == lazy_usage(None, labels) == lazy_usage(tmp_path, {}) == (0, 0)


# --- copies


class Shift:
    """Owners moved by a thousand, for who is not root: all to himself."""

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        return (uid + 1000, gid + 2000) if os.geteuid() == 0 else (uid, gid)


def copy(source: Path, to: Path) -> Path:
    copy_layer(source, to / "fs", to / "links", Shift(), lambda: False)
    return to / "fs"


def test_a_copy_keeps_everything_but_owners(tmp_path: Path) -> None:
    """Modes with setuid, times to the nanosecond, hard links, links with their targets, holes, attributes, depth."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tool").write_bytes(b"x" * 70_000)
    (source / "tool").chmod(0o6755)
    os.utime(source / "tool", ns=(1, 1_234_567_891_123_456_789))
    os.link(source / "tool", source / "again")
    (source / "sub").mkdir()
    os.link(source / "tool", source / "sub/too")
    (source / "away").symlink_to("/etc/passwd")
    (source / "loop").symlink_to("loop")
    with (source / "sparse").open("wb") as file:
        file.truncate(50 << 20)
        file.seek(30 << 20)
        file.write(b"island")
    os.mkfifo(source / "pipe")
    os.setxattr(source / "sub", "user.colour", b"blue")
    (source / os.fsdecode(b"\xff\xfe")).touch(mode=0o600)
    here = os.open(source, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("deep", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    os.utime(source / "sub", ns=(5, 6))
    source.chmod(0o1751)
    (tmp_path / "copy").mkdir()

    made = copy(source, tmp_path / "copy")
    before, after = (source / "tool").stat(), (made / "tool").stat()
    assert stat.S_IMODE(after.st_mode) == 0o6755
    assert after.st_mtime_ns == before.st_mtime_ns
    assert (after.st_uid - before.st_uid, after.st_gid - before.st_gid) == (
        (1000, 2000) if os.geteuid() == 0 else (0, 0)
    )
    assert (made / "sub/too").read_bytes() == b"x" * 70_000
    assert {(made / name).stat().st_ino for name in ("tool", "again", "sub/too")} == {after.st_ino}
    assert after.st_nlink == 3
    assert (made / "away").readlink() == Path("/etc/passwd")
    assert (made / "away").lstat().st_uid == before.st_uid + (1000 if os.geteuid() == 0 else 0)
    assert (made / "sparse").stat().st_blocks <= (source / "sparse").stat().st_blocks
    with (made / "sparse").open("rb") as file:
        file.seek((30 << 20) - 1)
        assert file.read(7) == b"\0island"
    assert (made / "sparse").stat().st_size == 50 << 20
    assert stat.S_ISFIFO((made / "pipe").stat().st_mode)
    assert os.getxattr(made / "sub", "user.colour") == b"blue"
    assert (made / "sub").stat().st_mtime_ns == 6
    assert (made / os.fsdecode(b"\xff\xfe")).exists()
    assert stat.S_IMODE(made.stat().st_mode) == 0o1751
    there = os.open(made, os.O_RDONLY)
    for _ in range(60):
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=there)
        os.close(there)
        there = below
    assert os.listdir(there) == ["deep"]  # noqa: PTH208  of a descriptor
    os.close(there)
    assert not (tmp_path / "copy/links").exists()
    idmap_local.remove_place(source)  # pytest's own clean-up follows paths
    idmap_local.remove_place(tmp_path / "copy")


def test_a_copy_has_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than `ENTRIES_LIMIT` are `LimitExceeded`, and one that nobody waits for any more ends."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / str(number)).touch()
    monkeypatch.setattr(idmap_copy, "ENTRIES_LIMIT", 3)
    with pytest.raises(LimitExceeded, match="ENTRIES_LIMIT"):
        copy(source, tmp_path)
    monkeypatch.undo()
    (tmp_path / "second").mkdir()
    with pytest.raises(SociError, match="given up"):
        copy_layer(source, tmp_path / "second/fs", tmp_path / "second/links", Shift(), lambda: True)


class Maps(Shift):
    """What `have_local` takes."""

    uids = parse_id_map("0:1000:1000")
    gids = parse_id_map("0:2000:1000")


def test_a_copy_is_made_where_no_mount_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is counted for its container, stays until the next boot, and is made anew after it or when half made."""

    def refuse(*_args: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(idmap_mount, "bind", refuse)
    places = Places(tmp_path, tmp_path / "mounts")
    layer, container = snapshot(1), snapshot(2, "active")
    (places.upper(1)).mkdir(parents=True)
    (places.upper(1) / "file").write_bytes(b"x" * 9000)
    (places.upper(2)).mkdir(parents=True)
    bare = active_usage(container, [layer], places)
    place = tmp_path / "1_2"
    (place / "draft").mkdir(parents=True)
    (place / "links").mkdir()
    idmap_local.have_local(tmp_path / "1", place, Maps(), lambda: False)
    assert (place / "fs/file").read_bytes() == b"x" * 9000
    made = (place / "fs").stat().st_ino
    size, inodes = active_usage(container, [layer], places)
    assert (size - bare[0], inodes - bare[1]) == (4096 + 12_288, 2)
    idmap_local.have_local(tmp_path / "1", place, Maps(), lambda: False)
    assert (place / "fs").stat().st_ino == made
    (place / "copied").write_text("another-boot 1 1\n")
    (place / "fs/file").write_bytes(b"damaged")
    idmap_local.have_local(tmp_path / "1", place, Maps(), lambda: False)
    assert (place / "fs/file").read_bytes() == b"x" * 9000
    idmap_local.remove_place(place)
    assert not place.exists()


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is `LimitExceeded`, and the half of a copy is gone."""

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(idmap_mount, "bind", full)
    monkeypatch.setattr(idmap_local, "copy_layer", full)
    (tmp_path / "1/fs").mkdir(parents=True)
    with pytest.raises(LimitExceeded):
        idmap_local.have_local(tmp_path / "1", tmp_path / "1_2", Maps(), lambda: False)
    assert not (tmp_path / "1_2").exists()
