# SPDX-License-Identifier: Apache-2.0
"""What containerd expects of a snapshotter, asked of ours and, for comparison, of its own overlayfs.

Ours is a process on its own socket, with no NATS anywhere: local snapshots need none. It is also asked through a
containerd that has it as a plugin. Every mount is made with mount(2).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from soci_dev.stack import Stack
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from support.snapshotter import Calls, Process, code_of, mounted

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

LAYERS = 128
"""Layers of the deepest image: what containerd promises for overlayfs."""


@pytest.fixture(scope="module")
def direct(stack_folder: Callable[[], Path]) -> Iterator[Process]:
    """Ours, on its own socket."""
    process = Process(stack_folder())
    try:
        process.start()
        yield process
        assert process.stop() == 0
    finally:
        process.close()


@pytest.fixture(scope="module")
def containerd(make_stack: Callable[..., Stack]) -> Stack:
    """A containerd with our snapshotter plugged in."""
    return make_stack(registries=0, services=("snapshotter",))


@pytest.fixture(scope="module", params=["sociable", "sociable-in-containerd", "overlayfs-in-containerd"])
def calls(request: pytest.FixtureRequest) -> Iterator[Calls]:
    """The three that are asked."""
    if request.param == "sociable":
        made = Calls(request.getfixturevalue("direct").socket)
    else:
        stack: Stack = request.getfixturevalue("containerd")
        plugin = "sociable" if request.param.startswith("sociable") else "overlayfs"
        made = Calls(stack.containerd_address, plugin, stack.namespace)
    yield made
    made.close()


class Names:
    """Names that no other test has, and the shapes that tests share."""

    def __init__(self, calls: Calls, prefix: str) -> None:
        self.calls = calls
        self.prefix = prefix

    def __call__(self, name: str) -> str:
        return f"{self.prefix}-{name}" if name else ""

    def layer(self, name: str, parent: str, change: Callable[[Path], object]) -> None:
        """A committed snapshot: what ``change`` makes of its parent."""
        key = self(f"key-of-{name}")
        with mounted(self.calls.prepare(key, self(parent))) as top:
            change(top)
        self.calls.commit(self(name), key)

    def looking_at(self, name: str) -> Any:
        """A committed snapshot, mounted through a view."""
        self.views = getattr(self, "views", 0) + 1
        return mounted(self.calls.view(self(f"view-{self.views}"), self(name)))


@pytest.fixture
def names(calls: Calls, request: pytest.FixtureRequest) -> Names:
    return Names(calls, request.node.originalname.removeprefix("test_"))


def touch(*files: str) -> Callable[[Path], None]:
    def change(top: Path) -> None:
        for file in files:
            (top / file).parent.mkdir(parents=True, exist_ok=True)
            (top / file).write_text(file)

    return change


def files_of(top: Path) -> dict[str, str]:
    return {str(path.relative_to(top)): path.read_text() for path in sorted(top.rglob("*")) if path.is_file()}


# --- calls


def test_basic(calls: Calls, names: Names) -> None:
    """Prepare, write, commit, prepare above, change, commit, look: the life of two layers."""
    mounts = calls.prepare(names("a"))
    assert [one.type for one in mounts] == ["bind"]
    with mounted(mounts) as top:
        touch("foo", "d/e/f")(top)
    calls.commit(names("A"), names("a"))
    info = calls.stat(names("A"))
    assert (info.name, info.parent, info.kind) == (names("A"), "", pb.COMMITTED)

    mounts = calls.prepare(names("b"), names("A"))
    assert calls.mounts(names("b")) == mounts
    info = calls.stat(names("b"))
    assert (info.name, info.parent, info.kind) == (names("b"), names("A"), pb.ACTIVE)
    with mounted(mounts) as top:
        assert files_of(top) == {"foo": "foo", "d/e/f": "d/e/f"}
        touch("bar")(top)
        (top / "foo").rename(top / "foo-two")
    calls.commit(names("B"), names("b"))
    with names.looking_at("B") as top:
        assert sorted(files_of(top)) == ["bar", "d/e/f", "foo-two"]
    with names.looking_at("A") as top:
        assert sorted(files_of(top)) == ["d/e/f", "foo"]


@pytest.mark.parametrize("kind", ["active", "view"])
def test_mounts_of_active_and_view(calls: Calls, names: Names, kind: str) -> None:
    """Mounts gives again what Prepare or View gave, with and without parents."""
    make = calls.prepare if kind == "active" else calls.view
    names.layer(f"A-{kind}", "", touch("a"))
    names.layer(f"B-{kind}", f"A-{kind}", touch("b"))
    for number, parent in enumerate(["", f"A-{kind}", f"B-{kind}"]):
        key = names(f"{kind}{number}")
        made = make(key, names(parent))
        assert calls.mounts(key) == made
        assert len(made) == 1
        if made[0].type == "bind":
            assert list(made[0].options) == ["rw" if kind == "active" else "ro", "rbind"]
        else:
            assert made[0].source == "overlay"
            wanted = ["workdir", "upperdir", "lowerdir"] if kind == "active" else ["lowerdir"]
            assert [word.partition("=")[0] for word in made[0].options if word != "index=off"] == wanted


def test_a_committed_snapshot_has_no_mounts(calls: Calls, names: Names) -> None:
    """Mounts of a committed snapshot are refused, of a missing one not found."""
    names.layer("A", "", touch("a"))
    assert code_of(lambda: calls.mounts(names("A"))) == "FAILED_PRECONDITION"
    assert code_of(lambda: calls.mounts(names("none"))) == "NOT_FOUND"


def test_stat(calls: Calls, names: Names) -> None:
    """Stat tells name, parent, kind, labels and times of active snapshots, views and committed ones."""
    names.layer("A", "", touch("a"))
    calls.prepare(names("active"), names("A"), {"containerd.io/snapshot/x": "1"})
    calls.view(names("view"), names("A"))
    for key, kind, parent in (("active", pb.ACTIVE, "A"), ("view", pb.VIEW, "A"), ("A", pb.COMMITTED, "")):
        info = calls.stat(names(key))
        assert (info.name, info.kind, info.parent) == (names(key), kind, names(parent))
        assert info.created_at.seconds > 0
        assert info.updated_at.ToNanoseconds() >= info.created_at.ToNanoseconds()
    assert calls.own(calls.stat(names("active"))) == {"containerd.io/snapshot/x": "1"}
    assert code_of(lambda: calls.stat(names("none"))) == "NOT_FOUND"
    assert code_of(lambda: calls.usage(names("none"))) == "NOT_FOUND"


def test_names_are_taken_once(calls: Calls, names: Names) -> None:
    """A key or name in use is refused by Prepare, View and Commit, whoever has it."""
    names.layer("A", "", touch("a"))
    calls.prepare(names("active"))
    calls.view(names("view"), names("A"))
    for taken in ("A", "active", "view"):
        assert code_of(lambda taken=taken: calls.prepare(names(taken))) == "ALREADY_EXISTS"  # type: ignore[misc]
        assert code_of(lambda taken=taken: calls.view(names(taken), names("A"))) == "ALREADY_EXISTS"  # type: ignore[misc]
        assert code_of(lambda taken=taken: calls.commit(names(taken), names("active"))) == "ALREADY_EXISTS"  # type: ignore[misc]
    assert calls.stat(names("active")).kind == pb.ACTIVE


def test_parents_must_be_committed(calls: Calls, names: Names) -> None:
    """Nothing can be made on an active snapshot, a view, or nothing at all; and what failed left nothing."""
    names.layer("A", "", touch("a"))
    calls.prepare(names("active"))
    calls.view(names("view"), names("A"))
    for make in (calls.prepare, calls.view):
        assert code_of(lambda make=make: make(names("x"), names("active"))) == "INVALID_ARGUMENT"  # type: ignore[misc]
        assert code_of(lambda make=make: make(names("x"), names("view"))) == "INVALID_ARGUMENT"  # type: ignore[misc]
        assert code_of(lambda make=make: make(names("x"), names("none"))) == "NOT_FOUND"  # type: ignore[misc]
    assert code_of(lambda: calls.stat(names("x"))) == "NOT_FOUND"


def test_commit(calls: Calls, names: Names) -> None:
    """The key is gone, the labels are the call's own; a view, a committed snapshot and nothing cannot be committed."""
    calls.prepare(names("key"), "", {"containerd.io/snapshot/old": "1"})
    calls.commit(names("A"), names("key"), {"containerd.io/snapshot/new": "2"})
    assert calls.own(calls.stat(names("A"))) == {"containerd.io/snapshot/new": "2"}
    assert code_of(lambda: calls.stat(names("key"))) == "NOT_FOUND"
    assert code_of(lambda: calls.commit(names("B"), names("key"))) == "NOT_FOUND"
    calls.view(names("view"), names("A"))
    assert code_of(lambda: calls.commit(names("B"), names("view"))) == "FAILED_PRECONDITION"
    assert code_of(lambda: calls.commit(names("B"), names("A"))) == "FAILED_PRECONDITION"
    assert code_of(lambda: calls.stat(names("B"))) == "NOT_FOUND"
    calls.prepare(names("key"))  # free again


def test_update(calls: Calls, names: Names) -> None:
    """All labels are replaced, or single ones; without a value a label goes; nothing else can be changed."""
    names.layer("A", "", touch("a"))
    own = {"a": "1", "b": "2"}
    before = calls.stat(names("A"))
    info = calls.update(names("A"), {**calls.labels, **own})
    assert calls.own(info) == own
    assert info.updated_at.ToNanoseconds() > before.updated_at.ToNanoseconds()
    assert info.created_at == before.created_at
    assert calls.own(calls.update(names("A"), {"a": "9", "b": "9"}, "labels.a")) == {"a": "9", "b": "2"}
    assert calls.own(calls.update(names("A"), {}, "labels.a")) == {"b": "2"}
    assert calls.own(calls.update(names("A"), {"x.y/z": "3"}, "labels.x.y/z")) == {"b": "2", "x.y/z": "3"}
    assert calls.own(calls.update(names("A"), {**calls.labels, "c": "4"}, "labels")) == {"c": "4"}
    assert calls.own(calls.stat(names("A"))) == {"c": "4"}
    for path in ("name", "kind", "parent", "created_at"):
        assert code_of(lambda path=path: calls.update(names("A"), {}, path)) == "INVALID_ARGUMENT"  # type: ignore[misc]
    assert code_of(lambda: calls.update(names("none"), {}, "labels")) == "NOT_FOUND"
    calls.prepare(names("active"), names("A"))
    assert calls.own(calls.update(names("active"), {**calls.labels, "d": "5"})) == {"d": "5"}


def test_labels_are_limited(calls: Calls, names: Names) -> None:
    """Key and value have at most 4096 bytes together."""
    key = "containerd.io/snapshot/x"
    calls.prepare(names("ok"), "", {key: "v" * (4096 - len(key))})
    long = {key: "v" * (4097 - len(key))}
    assert code_of(lambda: calls.prepare(names("long"), "", long)) == "INVALID_ARGUMENT"
    assert code_of(lambda: calls.commit(names("A"), names("ok"), long)) == "INVALID_ARGUMENT"
    assert code_of(lambda: calls.update(names("ok"), long, "labels")) == "INVALID_ARGUMENT"


def test_remove(calls: Calls, names: Names) -> None:
    """What has children stays; what has none goes, in any order from the top."""
    names.layer("A", "", touch("a"))
    names.layer("B", "A", touch("b"))
    calls.prepare(names("active"), names("B"))
    calls.view(names("view"), names("B"))
    assert code_of(lambda: calls.remove(names("A"))) == "FAILED_PRECONDITION"
    assert code_of(lambda: calls.remove(names("B"))) == "FAILED_PRECONDITION"
    calls.remove(names("active"))
    assert code_of(lambda: calls.remove(names("B"))) == "FAILED_PRECONDITION"
    for name in ("view", "B", "A"):
        calls.remove(names(name))
        assert code_of(lambda name=name: calls.stat(names(name))) == "NOT_FOUND"  # type: ignore[misc]
        assert code_of(lambda name=name: calls.remove(names(name))) == "NOT_FOUND"  # type: ignore[misc]
    names.layer("A2", "", touch("again"))


def test_a_base_with_several_children(calls: Calls, names: Names) -> None:
    """Two children of one base do not see each other; one goes, the other stays."""
    names.layer("A", "", touch("a"))
    for child in ("B", "C"):
        names.layer(child, "A", touch(child))
    calls.remove(names("B"))
    with names.looking_at("C") as top:
        assert files_of(top) == {"a": "a", "C": "C"}


def test_walk(calls: Calls, names: Names) -> None:
    """List gives every snapshot once, with what Stat says of it, and other calls answer meanwhile."""
    names.layer("A", "", touch("a"))
    made = {names("A")}
    for number in range(120):
        calls.view(names(f"view{number}"), names("A"))
        made.add(names(f"view{number}"))
    seen: list[str] = []
    for batch in calls.batches():
        assert len(batch) <= 100
        for info in batch:
            if info.name in made:
                assert calls.stat(info.name) == info
                seen.append(info.name)
    assert sorted(seen) == sorted(made)


FILTERS = {
    "": "AavX",
    "name": "AavX",
    "kind": "AavX",
    "parent": "AavX",
    "kind==committed": "A",
    "kind==active": "aX",
    "kind==view": "v",
    "kind!=view": "AaX",
    "kind~=^(active|view)$": "avX",
    'labels."containerd.io/snapshot/x"': "a",
    'labels."containerd.io/snapshot/x"==1': "a",
    'labels."containerd.io/snapshot/x"!=1': "AvX",
    'labels."containerd.io/snapshot/x"~="^[0-9]$"': "a",
    "labels.b": "X",
    "labels.b==2,kind==active": "X",
    "labels.b==2,kind==view": "",
    "kind == active , labels.b == 2": "?",
    "nothing": "",
    "nothing!=x": "AavX",
    "nothing==x": "",
    "name~=(": "",
    r'name=="\x41"': "",
    "kind==/active/": "?",
    "kind~=/act/": "aX",
    "kind~=|act|": "aX",
    'kind=="active': "?",
    "kind==": "?",
    "kind=active": "?",
    "kind==active,": "?",
    ",kind==active": "?",
    "kind==active kind==view": "?",
    ".kind": "?",
    "labels.": "?",
    "kind;": "?",
    "==active": "?",
    "k": "",
    "_": "",
    "1a": "",
    '"kind"==active': "aX",
}


def find(calls: Calls, names: Names, text: str) -> str:
    """Which of the snapshots A, a, v and X a filter finds; ``?`` where it is refused."""
    try:
        found = {info.name for info in calls.list(text)}
    except grpc.RpcError as error:
        # containerd's own service forgets to say which kind of error it was
        expected = "UNKNOWN" if calls.snapshotter else "INVALID_ARGUMENT"
        return "?" if error.code().name == expected else str(error)
    return "".join(one for one in "AavX" if names(one) in found)


def test_filters(calls: Calls, names: Names) -> None:
    """Each filter finds what containerd's own finds, or is refused where containerd refuses it."""
    names.layer("A", "", touch("a"))
    calls.prepare(names("a"), names("A"), {"containerd.io/snapshot/x": "1"})
    calls.view(names("v"), names("A"))
    calls.prepare(names("X"), "", {"b": "2"})
    wrong = {text: found for text, expected in FILTERS.items() if (found := find(calls, names, text)) != expected}
    assert wrong == {}
    both = calls.list(f"name=={names('A')}", f"name=={names('v')}")
    assert sorted(info.name for info in both) == sorted([names("A"), names("v")])


def test_usage(calls: Calls, names: Names) -> None:
    """An active snapshot is measured as it grows, a committed one keeps what it had; hard links count once."""
    megabyte = 1 << 20
    mounts = calls.prepare(names("key"))
    size, inodes = calls.usage(names("key"))
    with mounted(mounts) as top:
        (top / "file").write_bytes(b"x" * megabyte)
        os.link(top / "file", top / "twin")
        os.sync()
        grown = calls.usage(names("key"))
    assert grown[0] - size >= megabyte
    assert grown[0] - size < 2 * megabyte
    assert grown[1] - inodes == 1
    calls.commit(names("A"), names("key"))
    assert calls.usage(names("A")) == grown
    names.layer("B", "A", touch("small"))
    assert calls.usage(names("B"))[0] < megabyte
    calls.view(names("view"), names("A"))
    assert calls.usage(names("view"))[0] < megabyte


# --- what shows


def test_views_are_read_only(calls: Calls, names: Names) -> None:
    """Nothing can be written to a view, with none, one or two parents."""
    names.layer("A", "", touch("a"))
    names.layer("B", "A", touch("b"))
    for number, parent in enumerate(["", "A", "B"]):
        with mounted(calls.view(names(f"view{number}"), names(parent))) as top, pytest.raises(OSError):
            (top / "new").touch()


def test_the_root_of_a_snapshot(calls: Calls, names: Names) -> None:
    """It is 0755, in an empty snapshot and in one over a parent, active or view."""
    names.layer("A", "", touch("a"))
    for parent in ("", "A"):
        for number, make in enumerate((calls.prepare, calls.view)):
            with mounted(make(names(f"{parent}{number}"), names(parent))) as top:
                assert stat.S_IMODE(top.stat().st_mode) == 0o755


def test_the_owner_of_the_root(calls: Calls, names: Names) -> None:
    """A child's root directory belongs to whom the parent's did."""
    names.layer("A", "", lambda top: os.chown(top, 1000, 1001))
    with mounted(calls.prepare(names("b"), names("A"))) as top:
        assert (top.stat().st_uid, top.stat().st_gid) == (1000, 1001)


def test_owners_and_modes_of_directories(calls: Calls, names: Names) -> None:
    """Owners, modes and setgid bits of directories are the same after a commit and in a child."""

    def change(top: Path) -> None:
        for number, mode in enumerate((0o700, 0o755, 0o1777, 0o2711)):
            (top / f"d{number}").mkdir()
            os.chown(top / f"d{number}", number, number + 1)
            (top / f"d{number}").chmod(mode)

    names.layer("A", "", change)
    names.layer("B", "A", touch("d0/new", "other"))
    with names.looking_at("B") as top:
        for number, mode in enumerate((0o700, 0o755, 0o1777, 0o2711)):
            found = (top / f"d{number}").stat()
            assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, number, number + 1)


def test_a_lower_file_changes(calls: Calls, names: Names) -> None:
    """A file of a lower layer written, given another owner, mode, and name: above it shows, below it does not."""
    names.layer("A", "", touch("written", "owned", "moved", "d/moved"))

    def change(top: Path) -> None:
        (top / "written").write_text("new")
        os.chown(top / "owned", 5, 6)
        (top / "owned").chmod(0o4711)
        (top / "moved").rename(top / "d/here")
        (top / "d/moved").rename(top / "there")

    names.layer("B", "A", change)
    with names.looking_at("B") as top:
        assert files_of(top) == {"written": "new", "owned": "owned", "d/here": "moved", "there": "d/moved"}
        found = (top / "owned").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (5, 6, 0o4711)
    with names.looking_at("A") as top:
        assert files_of(top) == {name: name for name in ("written", "owned", "moved", "d/moved")}
        assert (top / "owned").stat().st_uid == 0


def test_lower_files_and_directories_go(calls: Calls, names: Names) -> None:
    """What is deleted above is gone above; made again, it is new; a directory made again is empty."""
    names.layer("A", "", touch("file", "again", "d/x", "d/y", "empty/x"))

    def change(top: Path) -> None:
        (top / "file").unlink()
        (top / "again").unlink()
        (top / "again").mkdir()
        shutil.rmtree(top / "d")
        (top / "d").mkdir()
        touch("d/z")(top)
        shutil.rmtree(top / "empty")

    names.layer("B", "A", change)
    names.layer("C", "B", touch("file"))
    for name, expected in (("B", ["d/z"]), ("C", ["d/z", "file"])):
        with names.looking_at(name) as top:
            assert sorted(files_of(top)) == expected
            assert (top / "again").is_dir()
            assert not (top / "empty").exists()


def test_what_is_mounted_when_it_is_committed(calls: Calls, names: Names) -> None:
    """A snapshot may be committed while it is mounted: what was written until then is in it."""
    with mounted(calls.prepare(names("key"))) as top:
        touch("a")(top)
        os.sync()
        calls.commit(names("A"), names("key"))
    with names.looking_at("A") as top:
        assert files_of(top) == {"a": "a"}


def test_many_layers(calls: Calls, names: Names) -> None:
    """An image of `LAYERS` layers mounts, and each layer's file is there."""
    parent = ""
    for number in range(LAYERS):
        key = names(f"key{number}")
        mounts = calls.prepare(key, parent)
        upper = next((one for one in mounts[0].options if one.startswith("upperdir=")), "upperdir=" + mounts[0].source)
        touch(f"f{number}", "same")(Path(upper.removeprefix("upperdir=")))
        parent = names(f"layer{number}")
        calls.commit(parent, key)
    with mounted(calls.prepare(names("top"), parent)) as top:
        assert len(files_of(top)) == LAYERS + 1
        touch("written")(top)
    assert len(calls.mounts(names("top"))) == 1
    for number in reversed(range(LAYERS)):
        if number == LAYERS - 1:
            calls.remove(names("top"))
        calls.remove(names(f"layer{number}"))


# --- what only our own socket shows


@pytest.fixture
def ours(direct: Process) -> Iterator[Calls]:
    made = Calls(direct.socket)
    yield made
    made.close()


def test_commit_with_a_parent(ours: Calls) -> None:
    """A snapshot without parent gets the one that Commit names, if that is committed; another one is refused."""
    for name in ("base", "other"):
        ours.prepare(f"rebase-{name}-key")
        ours.commit(f"rebase-{name}", f"rebase-{name}-key")
    ours.prepare("rebase-a")
    assert code_of(lambda: ours.commit("rebase-A", "rebase-a", parent="rebase-none")) == "NOT_FOUND"
    assert code_of(lambda: ours.commit("rebase-A", "rebase-a", parent="rebase-a")) == "FAILED_PRECONDITION"
    ours.commit("rebase-A", "rebase-a", parent="rebase-base")
    assert ours.stat("rebase-A").parent == "rebase-base"
    ours.prepare("rebase-b", "rebase-base")
    assert code_of(lambda: ours.commit("rebase-B", "rebase-b", parent="rebase-other")) == "INVALID_ARGUMENT"
    ours.commit("rebase-B", "rebase-b", parent="rebase-base")
    assert code_of(lambda: ours.remove("rebase-base")) == "FAILED_PRECONDITION"


def test_cleanup(ours: Calls, direct: Process) -> None:
    """Removing leaves the directory, Cleanup frees it; what exists and what is not ours stays."""
    mounts = ours.prepare("cleanup-gone")
    kept = ours.prepare("cleanup-kept")
    stray = direct.snapshots / "new-stray"
    stray.mkdir()
    ours.remove("cleanup-gone")
    assert Path(mounts[0].source).is_dir()
    ours.cleanup()
    assert not Path(mounts[0].source).parent.exists()
    assert Path(kept[0].source).is_dir()
    assert stray.is_dir()
    stray.rmdir()
    ours.cleanup()


def test_a_remote_prepare_without_a_bus(ours: Calls) -> None:
    """Where NATS is away, mounts come back, so that containerd brings the layer itself."""
    digest = "sha256:" + "a" * 64
    labels = {
        "containerd.io/snapshot.ref": digest,
        "containerd.io/snapshot/cri.image-ref": "docker.io/library/redis:7",
        "containerd.io/snapshot/cri.manifest-digest": digest,
        "containerd.io/snapshot/cri.layer-digest": digest,
    }
    mounts = ours.prepare("default/1/remote", "", labels)
    assert [one.type for one in mounts] == ["bind"]
    with mounted(mounts) as top:
        touch("a")(top)
    ours.commit("default/2/" + digest, "default/1/remote", labels)
    assert ours.own(ours.stat("default/2/" + digest)) == labels


def test_hostile_requests(ours: Calls) -> None:
    """Empty, enormous and odd words end in a status, and the service goes on."""
    odd = "../../etc/passwd\n\t\0é" + "x" * 2000
    assert code_of(lambda: ours.prepare("")) == "INVALID_ARGUMENT"
    assert code_of(lambda: ours.prepare("x" * (1 << 20))) == "INVALID_ARGUMENT"
    assert code_of(lambda: ours.prepare(odd)) == "OK"
    assert ours.stat(odd).name == odd
    assert code_of(lambda: ours.prepare(odd)) == "ALREADY_EXISTS"
    assert code_of(lambda: ours.stat("é" * 100_000)) == "NOT_FOUND"
    assert code_of(lambda: ours.commit("", odd)) == "INVALID_ARGUMENT"
    assert code_of(lambda: ours.list("name~=(a+)+$")) == "OK"
    assert code_of(lambda: ours.list(*["name"] * 10_000)) == "INVALID_ARGUMENT"
    assert code_of(lambda: ours.prepare("many-labels", "", {str(n): "v" for n in range(5000)})) == "INVALID_ARGUMENT"
    ours.remove(odd)


def test_large_labels_come_back(ours: Calls) -> None:
    """Snapshots whose labels together are larger than a message are listed, in several messages."""
    labels = {f"key{number}": "v" * 4000 for number in range(900)}
    for number in range(6):
        ours.prepare(f"large-{number}", "", labels)
    found = [info for info in ours.list() if info.name.startswith("large-")]
    assert len(found) == 6
    assert all(dict(info.labels) == labels for info in found)
    for number in range(6):
        with suppress(grpc.RpcError):
            ours.remove(f"large-{number}")
