# SPDX-License-Identifier: Apache-2.0
"""Snapshots of containers with user namespaces, over local layers: a real process, the kernel's mounts, its overlayfs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from soci.errors import SociError
from soci.idmap import parse_id_map
from soci_snapshotter import idmap_local, idmap_mount
from soci_snapshotter.idmap import GIDS, UIDS, Owners
from support.snapshotter import Calls, Process, code_of, mounted

pytestmark = pytest.mark.root

MAP = {UIDS: "0:100000:1000", GIDS: "0:200000:1000,1000:300000:5"}
OTHER = {UIDS: "0:500000:1000", GIDS: "0:600000:1000"}
# Only a mount is a mount on a kernel whose overlayfs takes it.
kernel_maps = pytest.mark.skipif(not idmap_mount.overlay_takes(os.uname().release), reason="needs Linux 5.19")


@pytest.fixture
def process(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    """One that is not started yet; what is mounted in its folders goes before they do."""
    made = Process(stack_folder())
    yield made
    if made.daemon is not None:
        made.daemon.stop()
    for place in made.snapshots.glob("*_*") if made.snapshots.exists() else ():
        idmap_local.remove_place(place)
    made.close()


@pytest.fixture
def calls(process: Process) -> Iterator[Calls]:
    process.start()
    with closing(Calls(process.socket)) as made:
        yield made


def owner(path: Path) -> tuple[int, int]:
    seen = path.lstat()
    return seen.st_uid, seen.st_gid


def layers(calls: Calls) -> str:
    """Two local layers with files of several owners; the name of the upper one."""
    with mounted(calls.prepare("a")) as root:
        os.chown(root, 3, 4)
        (root / "of-root").write_text("root's")
        (root / "tool").write_text("#!/bin/sh\n")
        os.chown(root / "tool", 7, 1004)
        (root / "tool").chmod(0o6755)
        (root / "stranger").write_text("s")
        os.chown(root / "stranger", 70_000, 70_000)
        (root / "dir").mkdir()
        (root / "dir/gone").write_text("x")
        (root / "link").symlink_to("tool")
        os.lchown(root / "link", 8, 8)
    calls.commit("A", "a")
    with mounted(calls.prepare("b", "A")) as root:
        (root / "dir/gone").unlink()
        (root / "upper").write_text("u")
        os.link(root / "upper", root / "upper-too")
    calls.commit("B", "b")
    return "B"


def check_mapped(root: Path) -> None:
    """What a container with `MAP` sees, from the host."""
    assert owner(root / "of-root") == (100_000, 200_000)
    assert owner(root / "tool") == (100_007, 300_004)
    assert stat.S_IMODE((root / "tool").stat().st_mode) == 0o6755
    assert owner(root / "stranger") == (65_534, 65_534)
    assert owner(root / "link") == (100_008, 200_008)
    assert owner(root / "upper") == (100_000, 200_000)
    assert (root / "upper").stat().st_ino == (root / "upper-too").stat().st_ino
    assert list((root / "dir").iterdir()) == []


@contextmanager
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a file system without id-mapped mounts."""

    def bind(*_args: object) -> None:
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(idmap_mount, "bind", bind)
        yield


@kernel_maps
def test_a_container_over_local_layers(process: Process, calls: Calls) -> None:
    """Its files belong to its own users, nothing is copied, what it changes belongs to them too, and after it is
    removed and cleaned up nothing of it is left, while its layers are whole."""
    top = layers(calls)
    plain, other = calls.prepare("plain", top), calls.prepare("other", top, OTHER)
    mounts = calls.prepare("c", top, MAP)
    own = {one.name for one in process.snapshots.iterdir() if "_" in one.name}
    assert len(own) == 4
    with mounted(mounts) as root:
        check_mapped(root)
        assert owner(root) == (100_003, 200_004), "as the root of the layer below"
        with mounted(plain) as same, mounted(other) as others:
            assert owner(same / "tool") == (7, 1004)
            assert owner(others / "tool") == (500_007, 65_534)
            with (root / "of-root").open("a") as file:
                file.write(" and more")
            assert (same / "of-root").read_text() == "root's"
        assert owner(root / "of-root") == (100_000, 200_000)
    assert calls.usage("c")[0] < 50_000
    with mounted(calls.view("v", top, MAP)) as root:
        check_mapped(root)
    with mounted(calls.view("one", "A", MAP)) as root:
        assert owner(root / "tool") == (100_007, 300_004)
        assert code_of_write(root / "tool") == "read-only"
    for key in ("c", "v", "one", "other"):
        calls.remove(key)
    calls.cleanup()
    assert [one.name for one in process.snapshots.iterdir() if "_" in one.name] == []
    assert str(process.snapshots) not in Path("/proc/self/mountinfo").read_text()
    with mounted(plain) as same:
        assert (same / "upper-too").read_text() == "u"
        assert owner(same / "tool") == (7, 1004)


def code_of_write(path: Path) -> str:
    try:
        path.write_text("x")
    except OSError as error:
        return "read-only" if error.errno == 30 else str(error)
    return "written"


@kernel_maps
def test_after_a_restart_and_after_a_reboot(process: Process) -> None:
    """Mounts are there whoever dies; where a reboot took them, Mounts makes them again from the labels."""
    process.start()
    with closing(Calls(process.socket)) as calls:
        top = layers(calls)
        first = calls.prepare("c", top, MAP)
    process.kill()
    process.start()
    with closing(Calls(process.socket)) as calls:
        again = calls.mounts("c")
        assert [list(one.options) for one in again] == [list(one.options) for one in first]
        with mounted(again) as root:
            check_mapped(root)
        for place in process.snapshots.glob("*_*"):
            idmap_mount.unbind(place)
            assert list(place.iterdir()) == []
        with mounted(calls.mounts("c")) as root:
            check_mapped(root)
        calls.update("c", {UIDS: "0:1:1"})
        assert dict(calls.stat("c").labels)[UIDS] == MAP[UIDS]


@pytest.mark.parametrize("labels", [{UIDS: "0:1:1"}, {**MAP, GIDS: "0:1"}, {**MAP, UIDS: "0:1:5,3:9:1"}])
def test_wrong_labels(process: Process, calls: Calls, labels: Mapping[str, str]) -> None:
    """They are INVALID_ARGUMENT, and the key is free afterwards."""
    top = layers(calls)
    assert code_of(lambda: calls.prepare("c", top, labels)) == "INVALID_ARGUMENT"
    assert code_of(lambda: calls.view("c", top, labels)) == "INVALID_ARGUMENT"
    assert calls.prepare("c", top)


def test_a_root_without_layers(process: Process, calls: Calls) -> None:
    """The directory of a container that lies on nothing belongs to the container's root."""
    (bind,) = calls.prepare("c", "", MAP)
    assert owner(Path(bind.source)) == (100_000, 200_000)


def test_an_image_that_containerd_mapped_itself(process: Process, calls: Calls) -> None:
    """It copies the image under ``<x>-remap``, commits it as ``<x>`` and asks with the labels: owners stay as copied."""
    top = layers(calls)
    with mounted(calls.prepare("default/8/B-100000-200000-remap", top)) as root:
        os.chown(root / "of-root", 100_000, 200_000)
    calls.commit("default/9/B-100000-200000", "default/8/B-100000-200000-remap")
    with mounted(calls.prepare("default/10/c", "default/9/B-100000-200000", MAP)) as root:
        assert owner(root / "of-root") == (100_000, 200_000)
        assert owner(root / "tool") == (7, 1004)
    assert [one.name for one in process.snapshots.iterdir() if "_" in one.name] == []


def test_a_copy_is_the_same_to_the_container(process: Process, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses, an overlay of copies shows what one of id-mapped mounts would, whiteouts and all."""
    top = layers(calls)
    (overlay,) = calls.view("look", top)
    lower = dict(option.partition("=")[::2] for option in overlay.options)["lowerdir"].split(":")
    owners = Owners(parse_id_map(MAP[UIDS]), parse_id_map(MAP[GIDS]))
    copies = []
    with refused(monkeypatch):
        for one in lower:
            source = Path(one).parent
            place = process.snapshots / f"{source.name}_99999"
            idmap_local.have_local(source, place, owners, lambda: False)
            copies.append(str(place / "fs"))
    (process.root / "up").mkdir()
    (process.root / "work").mkdir()
    options = [f"lowerdir={':'.join(copies)}", f"upperdir={process.root}/up", f"workdir={process.root}/work"]
    with mounted([SimpleNamespace(type="overlay", source="overlay", options=options)]) as root:
        check_mapped(root)
    size, inodes = idmap_local.copied(process.snapshots / f"{Path(lower[1]).parent.name}_99999") or (0, 0)
    assert (size >= 4 * 4096, inodes) == (True, 7)
    calls.cleanup()
    assert list(process.snapshots.glob("*_99999")) == []
    with mounted([overlay]) as root:
        assert owner(root / "tool") == (7, 1004)


@kernel_maps
def test_nothing_is_deleted_through_a_mount(process: Process, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a mapped layer's mount not go away, the layer stays whole: the mount is read-only, and is looked for."""
    top = layers(calls)
    calls.prepare("c", top, MAP)
    place = next(process.snapshots.glob("*_*"))
    with monkeypatch.context() as patch:
        patch.setattr(idmap_mount, "unbind", lambda _place: None)
        with pytest.raises(SociError, match="still mounted"):
            idmap_local.remove_place(place)
        patch.setattr(idmap_mount, "is_mounted", lambda _place: False)
        with pytest.raises(OSError, match="Read-only"):
            idmap_local.remove_place(place)
    with mounted(calls.view("look", top)) as root:
        assert (root / "of-root").read_text() == "root's"
        assert (root / "upper").read_text() == "u"


@kernel_maps
def test_a_mount_namespace_of_our_own(process: Process) -> None:
    """In a mount namespace from which nothing reaches the machine's, layers are copied: a mount would not be seen."""
    script = (
        "import os, sys; from pathlib import Path; from soci_snapshotter import idmap_mount;"
        "print(idmap_mount.mounts_are_seen(Path(sys.argv[1])))"
    )
    folder = str(process.folder)
    command = [sys.executable, "-c", script, folder]
    seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    apart = ["unshare", "--mount", "--propagation", "slave", *command]
    unseen = subprocess.run(apart, capture_output=True, text=True, check=True, timeout=30).stdout
    assert (seen.strip(), unseen.strip()) == ("True", "False")


def test_programs_with_file_capabilities_keep_them(process: Process, calls: Calls) -> None:
    """A capability of a file is still there with other owners: the kernel rewrites whose it is."""
    value = bytes.fromhex("0100000200040000000000000000000000000000")
    with mounted(calls.prepare("a")) as root:
        (root / "ping").write_text("#")
        os.setxattr(root / "ping", "security.capability", value)
    calls.commit("A", "a")
    with mounted(calls.prepare("c", "A", MAP)) as root:
        assert os.getxattr(root / "ping", "security.capability")
