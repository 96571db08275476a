# SPDX-License-Identifier: Apache-2.0
"""The mounter's mounts, by FUSE and by EROFS: its server in another process, its layers real gzip tars."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soci.digest import sha256_digest
from soci.errors import AlreadyExists, InvalidInput, NotFound
from soci.ztoc import encode_ztoc
from soci_mounter import kernel
from support.mounter_bench import WAYS_TO_SHOW, Bench, described
from support.mounter_layers import CAPABILITY, Made, everything, item, make, noise, unpack

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse"),
]


@pytest.fixture(scope="module")
def full() -> Made:
    return make(everything())


WAYS = pytest.mark.parametrize("bench", WAYS_TO_SHOW, indirect=True)
"""Both ways to show a layer. A test without it is of FUSE alone."""


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(tmp_path, getattr(request, "param", "fuse"))
    try:
        yield made
    finally:
        made.close()


def fails_with(number: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as info:
        action()
    assert info.value.errno == number, info.value


@WAYS
def test_a_mount_shows_what_unpacking_would(bench: Bench, full: Made, tmp_path: Path) -> None:
    """Types, modes, owners, sizes, times, links, devices, attributes and bytes equal those of the unpacked tar."""
    path = bench.mount(bench.start(), "m1", full)
    want = described(unpack(full.tar, tmp_path / "unpacked"))
    got = described(path)
    implied = {"dev", "deep", "deep/er", "deep/er/and", "deep/er/and/deeper"}
    assert sorted(got) == sorted(want)
    differing = {key: (got[key], want[key]) for key in want if got[key] != want[key] and key not in implied}
    assert differing == {}
    assert {got[key][0:3] for key in implied} == {("drwxr-xr-x", 0, 0)}


@WAYS
def test_file_capabilities_come_through(bench: Bench) -> None:
    """The kernel finds ``security.capability`` with its binary value."""
    header = {"SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape")}
    made = make([item("ping", b"#", mode=0o755, pax_headers=header)])
    path = bench.mount(bench.start(), "m1", made)
    assert os.getxattr(path / "ping", "security.capability") == CAPABILITY


@WAYS
def test_mounting_fetches_nothing_and_reading_only_what_it_needs(bench: Bench, full: Made) -> None:
    """The tree is there with no span present; a small read brings few of them, and a second read none."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    assert len(list(path.rglob("*"))) > 700
    assert bench.present(full) == 0
    assert (path / "etc/late").read_bytes() == b"late"
    present = bench.present(full)
    assert 0 < present < 3 < full.ztoc.max_span_id + 1
    fetched = server.ask("fetched")
    assert (path / "etc/late").read_bytes() == b"late"
    assert server.ask("fetched") == fetched


@WAYS
def test_reading_in_order_runs_ahead(bench: Bench, full: Made) -> None:
    """A large file read from its start is fetched ahead of the reader, no span twice."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    assert hashlib.sha256((path / "big").read_bytes()).digest() == hashlib.sha256(noise(1_500_000, 2)).digest()
    fetched, _ = server.ask("fetched")
    spans = [span for first, last, _, _ in fetched for span in range(first, last + 1)]
    assert len(spans) == len(set(spans))
    assert any(why == "read-ahead" for _, _, why, _ in fetched)


@WAYS
def test_many_readers_of_one_file_fetch_each_span_once(bench: Bench, full: Made) -> None:
    """Sixteen threads that read the same cold file get its bytes, and no span is asked for twice."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    digests: list[bytes] = []

    def read() -> None:
        digests.append(hashlib.sha256((path / "big").read_bytes()).digest())

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert digests == [hashlib.sha256(noise(1_500_000, 2)).digest()] * 16
    fetched, _ = server.ask("fetched")
    spans = [span for first, last, _, _ in fetched for span in range(first, last + 1)]
    assert len(spans) == len(set(spans))


@WAYS
def test_overlayfs_merges_mounted_layers(bench: Bench, tmp_path: Path) -> None:
    """With two lazy layers below and a writable one on top, whiteouts and opaque directories hide what they should."""
    directory: dict[str, Any] = {"kind": tarfile.DIRTYPE, "mode": 0o755}
    base = make(
        [
            item("kept", b"kept"),
            item("gone", b"gone"),
            item("box/", **directory),
            item("box/hidden", b"hidden"),
            item("run", b"#!/bin/sh\necho ran\n", mode=0o755),
        ]
    )
    upper = make([item(".wh.gone"), item("box/", **directory), item("box/.wh..wh..opq"), item("box/new", b"new")])
    server = bench.start()
    one = bench.mount(server, "m1", base)
    two = bench.mount(server, "m2", upper, (str(one),))
    top, work, merged = (tmp_path / name for name in ("top", "work", "merged"))
    for folder in (top, work, merged):
        folder.mkdir()
    bench.mounted.append(merged)
    options = f"lowerdir={two}:{one},upperdir={top},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True, timeout=20)
    assert sorted(entry.name for entry in merged.iterdir()) == ["box", "kept", "run"]
    assert [entry.name for entry in (merged / "box").iterdir()] == ["new"]
    assert (merged / "kept").read_bytes() == b"kept"
    (merged / "kept").write_bytes(b"changed")
    assert (top / "kept").read_bytes() == b"changed"
    assert (one / "kept").read_bytes() == b"kept"
    assert subprocess.run([merged / "run"], capture_output=True, check=True, timeout=20).stdout == b"ran\n"


@WAYS
def test_implied_directories_take_after_the_layers_below(bench: Bench) -> None:
    """Their attributes come from a lower layer on the same FUSE mount, unless a whiteout is in between."""
    attributes = {"SCHILY.xattr.user.k": "v"}
    base = make(
        [
            item(
                "srv/", kind=tarfile.DIRTYPE, mode=0o2750, uid=11, gid=12, mtime=1_400_000_000, pax_headers=attributes
            ),
            item("opt/", kind=tarfile.DIRTYPE, mode=0o700, uid=11),
        ]
    )
    middle = make([item(".wh.opt"), item("else", b"")])
    upper = make([item("srv/file", b"x"), item("opt/file", b"y"), item("fresh/file", b"z")])
    server = bench.start()
    one = bench.mount(server, "m1", base)
    two = bench.mount(server, "m2", middle, (str(one),))
    three = bench.mount(server, "m3", upper, (str(two), str(one)))
    seen = (three / "srv").stat()
    assert (stat.filemode(seen.st_mode), seen.st_uid, seen.st_gid) == ("drwxr-s---", 11, 12)
    assert seen.st_mtime == 1_400_000_000
    assert os.getxattr(three / "srv", "user.k") == b"v"
    for name in ("opt", "fresh"):
        seen = (three / name).stat()
        assert (stat.filemode(seen.st_mode), seen.st_uid) == ("drwxr-xr-x", 0)


@WAYS
def test_the_file_system_is_read_only(bench: Bench, full: Made) -> None:
    """Every way to change something is EROFS."""
    path = bench.mount(bench.start(), "m1", full)
    for action in (
        lambda: (path / "etc/late").write_bytes(b""),
        (path / "new").mkdir,
        (path / "etc/late").unlink,
        lambda: (path / "etc/late").rename(path / "etc/later"),
        lambda: (path / "etc/late").chmod(0o600),
        lambda: (path / "link").symlink_to("x"),
        lambda: os.setxattr(path / "etc/late", "user.a", b"b"),
    ):
        fails_with(errno.EROFS, action)


@WAYS
def test_other_users_read_as_the_modes_say(bench: Bench, full: Made) -> None:
    """The kernel checks permissions: a stranger reads an open file and is refused a closed one."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    for folder in [bench.root, *bench.root.parents][:4]:
        folder.chmod(folder.stat().st_mode | 0o111)
    good = subprocess.run(["cat", path / "etc/late"], user=65534, capture_output=True, check=False, timeout=20)
    bad = subprocess.run(["cat", path / "etc/empty"], user=65534, capture_output=True, check=False, timeout=20)
    assert good.stdout == b"late"
    assert b"Permission denied" in bad.stderr
    assert stat.S_IMODE((bench.root / "mounts").stat().st_mode) == 0o711


def test_the_hidden_directory_says_how_the_layer_is_shown(bench: Bench, full: Made) -> None:
    """Root finds it by its name and reads how much came, anew each time; no listing has it."""
    if bench.mode != "fuse":
        pytest.skip("a static image has no such thing")
    server = bench.start()
    path = bench.mount(server, "m1", full)
    file = path / ".soci-snapshotter" / f"{full.layer}.json"
    assert ".soci-snapshotter" not in [one.name for one in path.iterdir()]
    said = json.loads(file.read_text())
    assert (said["fetchedSize"], said["mode"], said["digest"]) == (0, "fuse", full.layer)
    (path / "big").read_bytes()
    assert json.loads(file.read_text())["fetchedPercent"] > 50
    assert file.read_bytes().endswith(b"}\n")


def test_statfs_answers(bench: Bench, full: Made) -> None:
    """The numbers are those of the cache's file system, with names of 255 bytes."""
    path = bench.mount(bench.start(), "m1", full)
    assert os.statvfs(path).f_namemax == 255
    assert os.statvfs(path).f_blocks == os.statvfs(bench.root / "cache").f_blocks


def test_mounting_twice_is_once(bench: Bench, full: Made) -> None:
    """The same ask gets the same path; another layer under the name is refused; a layer that is not here is not found."""
    server = bench.start()
    other = make([item("a", b"b")])
    assert bench.mount(server, "m1", full) == bench.mount(server, "m1", full)
    with pytest.raises(AlreadyExists):
        bench.mount(server, "m1", other)
    with pytest.raises(NotFound):
        server.ask("mount", mount="m2", image="i", layer="sha256:" + "0" * 64, ztoc=full.ztoc_digest)
    assert server.ask("check", mounts=["m1", "m2"]) == ["m1"]


@WAYS
def test_an_unmounted_directory_is_gone_and_its_name_is_free(bench: Bench, full: Made) -> None:
    """After unmount-layer the path is ENOENT at once; another layer may then have the name."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    assert (path / "etc").is_dir()
    server.ask("unmount", mount="m1")
    server.ask("unmount", mount="m1")
    until = time.monotonic() + 5
    while path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not path.exists()
    assert list((bench.root / "mounts").iterdir()) == []
    assert server.ask("check", mounts=["m1"]) == []
    other = bench.mount(server, "m1", make([item("other", b"other")]))
    assert [entry.name for entry in other.iterdir()] == ["other"]


@pytest.mark.parametrize("how", ["registry-unavailable", "mismatch", "hang"])
@WAYS
def test_a_read_that_cannot_be_served_fails_at_its_deadline_and_later_succeeds(
    bench: Bench, full: Made, how: str
) -> None:
    """EIO comes at the deadline, names go on working, and once the cause is gone the same open file reads well."""
    server = bench.start(deadline=1.0)
    path = bench.mount(server, "m1", full)
    server.ask("fail", how=how)
    with (path / "etc/late").open("rb", buffering=0) as file:
        began = time.monotonic()
        fails_with(errno.EIO, file.read)
        assert time.monotonic() - began >= 0.9
        assert len(list((path / "many").iterdir())) == 700
        server.ask("fail", how="")
        assert file.read() == b"late"
    events = server.ask("events")
    assert any(name == "Missed" and failed for name, _, failed in events)


def test_waiting_readers_do_not_keep_names_from_being_looked_at(bench: Bench, full: Made) -> None:
    """With two hundred reads waiting for a registry that is away, stat and readdir still answer."""
    server = bench.start(deadline=3.0)
    path = bench.mount(server, "m1", full)
    server.ask("fail", how="registry-unavailable")
    results: list[object] = []

    def read(number: int) -> None:
        try:
            results.append((path / f"many/{number:04}").read_bytes())
        except OSError as error:
            results.append(error.errno)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    assert (path / "bin/short").readlink() == Path("tool")
    assert len(list((path / "many").iterdir())) == 700
    for thread in threads:
        thread.join(20)
    assert results == [errno.EIO] * 200


def test_the_kernel_may_have_many_reads_waiting(bench: Bench, full: Made, tmp_path: Path) -> None:
    """Its limit of read-ahead requests is raised: twelve waiting ones would hold up the reads of all layers."""
    bench.mount(bench.start(), "m1", full)
    ((device, kind),) = kernel.mounted_at(bench.root / "mounts")
    assert kind == "fuse.soci"
    connections = tmp_path / "connections"
    connections.mkdir()
    bench.mounted.append(connections)
    subprocess.run(["mount", "-t", "fusectl", "fusectl", str(connections)], check=True, timeout=20)
    assert (connections / device.partition(":")[2] / "max_background").read_text().strip() == str(kernel.MAX_BACKGROUND)


@WAYS
def test_what_is_here_is_served_without_a_fetcher(bench: Bench, full: Made) -> None:
    """With every span present nobody is asked, and reads succeed though the fetcher fails."""
    server = bench.start(deadline=1.0)
    path = bench.mount(server, "m1", full)
    full.fill(bench.root / "cache", range(full.ztoc.max_span_id + 1))
    server.ask("fail", how="registry-unavailable")
    assert (path / "big").read_bytes() == noise(1_500_000, 2)
    assert server.ask("fetched")[0] == []


@pytest.mark.parametrize(
    ("operation", "action"),
    [
        ("lookup", lambda path: (path / "bin/tool").stat()),
        ("getattr", lambda path: path.parent.stat()),
        ("readlink", lambda path: (path / "bin/short").readlink()),
        ("opendir", os.listdir),
        ("readdir", os.listdir),
        ("open", lambda path: (path / "etc/late").open("rb")),
        ("read", lambda path: (path / "etc/late").read_bytes()),
        ("getxattr", lambda path: os.getxattr(path, "user.x")),
        ("listxattr", os.listxattr),
        ("statfs", os.statvfs),
    ],
)
def test_a_defect_in_an_operation_is_an_error_and_no_hang(
    bench: Bench, full: Made, operation: str, action: Callable[[Path], object]
) -> None:
    """Whatever exception an operation raises, its caller gets EIO at once, and the server lives."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    server.ask("break", operation=operation)
    time.sleep(1.1 if operation == "getattr" else 0)  # the root's attributes are kept for a second
    fails_with(errno.EIO, lambda: action(path))
    assert server.ask("check", mounts=["m1"]) == ["m1"]


@pytest.mark.parametrize("operation", ["release", "releasedir"])
def test_a_defect_in_closing_is_no_hang(bench: Bench, full: Made, operation: str) -> None:
    """Closing answers even when it fails within; later reads work."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    server.ask("break", operation=operation)
    assert (path / "etc/late").read_bytes() == b"late"
    assert "late" in [entry.name for entry in (path / "etc").iterdir()]
    assert (path / "etc/grün").read_bytes() == b"utf-8"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_successor_shows_the_same_layers_without_the_network(
    bench: Bench, full: Made, number: signal.Signals
) -> None:
    """After SIGTERM the mount is gone, after SIGKILL it is dead; the next mounter needs no hand and no registry."""
    base = make([item("srv/", kind=tarfile.DIRTYPE, mode=0o700, uid=5)])
    upper = make([item("srv/file", b"x")])
    server = bench.start()
    one = bench.mount(server, "m1", base)
    two = bench.mount(server, "m2", upper, (str(one),))
    whole = bench.mount(server, "m3", full)
    before = {path: described(path) for path in (one, two, whole)}
    status = server.end(number)
    if number == signal.SIGTERM:
        assert status == 0
        assert kernel.mounted_at(bench.root / "mounts") == []
    else:
        fails_with(errno.ENOTCONN, lambda: list(one.iterdir()))
    successor = bench.start()
    assert successor.ask("check", mounts=["m1", "m2", "m3", "m4"]) == ["m1", "m2", "m3"]
    assert len(kernel.mounted_at(bench.root / "mounts")) == 1
    successor.ask("fail", how="registry-unavailable")
    assert {path: described(path) for path in (one, two, whole)} == before


def test_a_second_mounter_on_one_root_refuses(bench: Bench, full: Made) -> None:
    """It ends with an error and leaves the first one's mount alone."""
    server = bench.start()
    path = bench.mount(server, "m1", full)
    with pytest.raises(AssertionError, match="ended with 1"):
        bench.start()
    assert (path / "etc/late").read_bytes() == b"late"


def test_a_mounter_whose_mount_is_taken_away_ends(bench: Bench, full: Made) -> None:
    """When somebody unmounts the FUSE file system the process exits with an error, for its supervisor to see."""
    server = bench.start()
    bench.mount(server, "m1", full)
    kernel.clear(bench.root / "mounts")
    assert server.process.wait(20) == 1


@WAYS
def test_wrong_headers_are_refused(bench: Bench) -> None:
    """A table of contents that gives another name to a file's bytes is found out, unless checking is switched off."""
    truth = make([item("name", b"x" * 5000), item("other", b"y" * 5000)])
    entries = tuple(replace(entry, name=entry.name[::-1]) for entry in truth.ztoc.entries)
    ztoc = replace(truth.ztoc, entries=entries)
    content = encode_ztoc(ztoc)
    lie = replace(truth, ztoc=ztoc, ztoc_bytes=content, ztoc_digest=sha256_digest(content))
    server = bench.start()
    path = bench.mount(server, "m1", lie)
    fails_with(errno.EIO, (path / "eman").read_bytes)
    server.end()
    bench.start(verify=False)
    assert (path / "eman").read_bytes() == b"x" * 5000


@WAYS
def test_misses_belong_to_the_launch_that_was_attached(bench: Bench, full: Made) -> None:
    """Fetches and miss events after attach-launch carry its id."""
    launch = "ab" * 16
    server = bench.start()
    path = bench.mount(server, "m1", full)
    (path / "etc/late").read_bytes()
    server.ask("attach", launch=launch, mounts=["m1"])
    (path / "big").read_bytes()
    assert server.ask("fetched")[1][-1] == launch
    assert launch in {of for name, of, _ in server.ask("events") if name == "Missed"}


MAPS: dict[str, Any] = {"uid_map": [[0, 100_000, 1001]], "gid_map": [[0, 200_000, 1001]]}


@WAYS
def test_one_layer_is_shown_with_several_owners(bench: Bench, full: Made, tmp_path: Path) -> None:
    """A second showing has other owners and is the same layer in all else; its spans are fetched once, and it is there
    again, with the same owners, after the mounter was killed."""
    server = bench.start()
    plain, mapped = bench.mount(server, "m1", full), bench.mount(server, "m1_7", full, **MAPS)
    before, after = described(plain), described(mapped)
    fetched, _ = server.ask("fetched")
    spans = [span for first, last, _, _ in fetched for span in range(first, last + 1)]
    assert len(spans) == len(set(spans)), "each span was fetched once for both"
    assert before.keys() == after.keys()
    expected = {
        # the group 1001 of etc is the first that the map leaves out
        key: (mode, uid + 100_000, gid + 200_000 if gid <= 1000 else 65_534, *rest)
        for key, (mode, uid, gid, *rest) in before.items()
    }
    assert {key: (after[key], value) for key, value in expected.items() if after[key] != value} == {}
    assert (mapped.stat().st_uid, mapped.stat().st_gid) == (100_000, 200_000)

    server.end(signal.SIGKILL)
    successor = bench.start()
    assert successor.ask("check", mounts=["m1", "m1_7"]) == ["m1", "m1_7"]
    assert (plain / "bin/tool").stat().st_uid == 7
    assert (mapped / "bin/tool").stat().st_uid == 100_007
    successor.ask("unmount", mount="m1_7")
    assert (plain / "bin/tool").read_bytes() == noise(300_000)


def test_nobodys_files_cannot_become_somebodys(bench: Bench, tmp_path: Path) -> None:
    """Whom a map leaves out is the kernel's invalid owner, as on an id-mapped mount: even root may not change the
    file through an overlay, though a real user of the number 65534 could."""
    made = make([item("mine", b"m", uid=0), item("nobodys", b"n", uid=5000, mode=0o644)])
    lower = bench.mount(bench.start(), "m1_2", made, **MAPS)
    top, work, merged = (tmp_path / name for name in ("top", "work", "merged"))
    for folder in (top, work, merged):
        folder.mkdir()
    bench.mounted.append(merged)
    options = f"lowerdir={lower},upperdir={top},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True, timeout=20)
    assert (merged / "nobodys").read_bytes() == b"n"
    assert (merged / "nobodys").stat().st_uid == 65_534
    fails_with(errno.EPERM, lambda: os.chown(merged / "nobodys", 100_000, 200_000))
    (merged / "mine").write_bytes(b"changed")
    assert (top / "mine").stat().st_uid == 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"uid_map": [[0, 1, 1]]},
        {"gid_map": [[0, 1, 1]]},
        {"uid_map": [[0, 1, 0]], "gid_map": [[0, 1, 1]]},
        {"uid_map": [[0, 1, 5], [3, 100, 5]], "gid_map": [[0, 1, 1]]},
    ],
)
def test_maps_that_are_none_are_refused(bench: Bench, full: Made, wrong: dict[str, Any]) -> None:
    """One without the other, an empty extent, extents that overlap: nothing is shown."""
    server = bench.start()
    with pytest.raises(InvalidInput):
        bench.mount(server, "m1_1", full, **wrong)
    assert server.ask("check", mounts=["m1_1"]) == []


@WAYS
def test_opaque_directories_for_overlayfs_in_a_user_namespace(bench: Bench, tmp_path: Path) -> None:
    """With ``user_xattrs`` the mark is ``user.overlay.opaque`` alone, and an overlay with ``userxattr`` obeys it."""
    directory: dict[str, Any] = {"kind": tarfile.DIRTYPE, "mode": 0o755}
    base = make([item("box/", **directory), item("box/hidden", b"hidden"), item("gone", b"")])
    upper = make([item("box/", **directory), item("box/.wh..wh..opq"), item("box/new", b"new"), item(".wh.gone")])
    server = bench.start()
    one = bench.mount(server, "m1", base, user_xattrs=True)
    two = bench.mount(server, "m2", upper, (str(one),), user_xattrs=True)
    assert os.listxattr(two / "box") == ["user.overlay.opaque"]
    fails_with(errno.ENODATA, lambda: os.getxattr(two / "box", "trusted.overlay.opaque"))
    merged = tmp_path / "merged"
    merged.mkdir()
    bench.mounted.append(merged)
    options = f"lowerdir={two}:{one},userxattr"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True, timeout=20)
    assert [entry.name for entry in merged.iterdir()] == ["box"]
    assert [entry.name for entry in (merged / "box").iterdir()] == ["new"]
