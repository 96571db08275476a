# SPDX-License-Identifier: Apache-2.0
"""Snapshotter and mounter in a user namespace, as rootless installations run them: real processes, FUSE, overlayfs.

What happens inside is done by this file as a program; the test looks at what it tells.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from soci.digest import hex_of, sha256_digest
from soci.oci import OCI_LAYER_GZIP
from soci_mounter import kernel
from soci_snapshotter import userxattr
from soci_snapshotter.idmap import GIDS, UIDS
from soci_snapshotter.unpack import unpack
from support.mounter_layers import item, make
from support.mounter_process import Server
from support.snapshotter import Calls, Process, mounted

pytestmark = pytest.mark.root

IDS = 1_000_000
"""Numbers that the user namespace has, all as outside: more than a container's map needs."""
INSIDE_SECONDS = 50.0
# Runs a command in a user namespace with a mount namespace of its own.
APART = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
here, there = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    if libc.unshare(0x10000000 | 0x20000) != 0:
        os._exit(99)
    os.write(here[1], b"x")
    os.read(there[0], 1)
    os.execv(sys.argv[1], sys.argv[1:])
os.close(here[1])
if os.read(here[0], 1):
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{{child}}/{{name}}", "w") as file:
            file.write("0 0 {IDS}")
    os.write(there[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def snapshots_inside(folder: Path, told: dict[str, Any]) -> None:
    """Two local layers, of which the upper hides a directory's files; a plain container and one with other owners."""
    process = Process(folder)
    process.start()
    try:
        with closing(Calls(process.socket)) as calls:
            with mounted(calls.prepare("a")) as root:
                (root / "box").mkdir()
                (root / "box/hidden").touch()
                (root / "file").write_text("file")
                os.chown(root / "file", 7, 8)
            calls.commit("A", "a")
            (overlay,) = calls.prepare("b", "A")
            told["options"] = list(overlay.options)
            with mounted([overlay]) as root:
                (root / "box/hidden").unlink()
                (root / "box").rmdir()
                (root / "box").mkdir()
                (root / "box/new").touch()
            upper = Path(next(one for one in overlay.options if one.startswith("upperdir=")).removeprefix("upperdir="))
            told["mark"] = [name for name in os.listxattr(upper / "box") if name.endswith("opaque")]
            calls.commit("B", "b")
            with mounted(calls.prepare("c", "B", {UIDS: "0:100000:1000", GIDS: "0:200000:1000"})) as root:
                told["box"] = sorted(one.name for one in (root / "box").iterdir())
                told["owner"] = [(root / "file").stat().st_uid, (root / "file").stat().st_gid]
    finally:
        process.stop()
        told["copies"] = len(list(process.snapshots.glob("*_*/copied")))


def unpacked_inside(folder: Path, told: dict[str, Any]) -> None:
    """A whole layer with an opaque directory, and with attributes that would steer overlayfs."""
    steering = {"SCHILY.xattr.user.overlay.metacopy": "x", "SCHILY.xattr.user.kept": "y"}
    made = make([item("box/.wh..wh..opq"), item("box/new", b"n"), item("steers", b"s", pax_headers=steering)])
    blob, target = folder / "blob", folder / "target"
    blob.write_bytes(made.blob)
    target.mkdir()
    unpack(blob, target, media_type=OCI_LAYER_GZIP, diff_id=sha256_digest(made.tar), lower=[])
    told["unpacked"] = os.listxattr(target / "box")
    told["steers"] = os.listxattr(target / "steers")


def lazily_inside(folder: Path, told: dict[str, Any]) -> None:
    """A lazy layer over a local one, merged by overlayfs as the snapshotter would ask for it."""
    root, blobs = folder / "root", folder / "blobs"
    root.mkdir()
    blobs.mkdir()
    made = make([item("box/.wh..wh..opq"), item("box/new", b"new"), item(".wh.gone")])
    made.put(root / "cache")
    (blobs / hex_of(made.layer)).write_bytes(made.blob)
    lower = folder / "lower"
    (lower / "box").mkdir(parents=True)
    (lower / "box/hidden").touch()
    (lower / "gone").touch()
    server = Server(root, blobs)
    try:
        fields = {"image": "registry/image", "layer": made.layer, "ztoc": made.ztoc_digest, "lower": (str(lower),)}
        path = server.ask("mount", mount="m1", user_xattrs=True, **fields)
        options = [f"lowerdir={path}:{lower}", "userxattr"]
        with mounted([type("Overlay", (), {"type": "overlay", "source": "overlay", "options": options})]) as merged:
            told["lazy"] = sorted(str(one.relative_to(merged)) for one in merged.rglob("*"))
            told["bytes"] = (merged / "box/new").read_text()
    finally:
        kernel.clear(root / "mounts")
        server.end()


def main(folder: Path) -> None:
    told: dict[str, Any] = {"needed": userxattr.needed()}
    for name, step in (("s", snapshots_inside), ("u", unpacked_inside), ("l", lazily_inside)):
        (folder / name).mkdir()
        step(folder / name, told)
    sys.stdout.write(json.dumps(told) + "\n")


def test_everything_in_a_user_namespace(tmp_path: Path) -> None:
    """Overlays are asked for with ``userxattr``, opaque directories have the mark that goes with it and no other, in
    local, unpacked and lazy layers; other owners are had by a copy, for the kernel maps none of this file system."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    command = [sys.executable, "-c", APART, sys.executable, __file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSIDE_SECONDS, env=environment)
    if done.returncode == 99:
        pytest.skip("this kernel makes no user namespaces")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["needed"] is True
    assert told["options"][-1] == "userxattr"
    assert told["mark"] == ["user.overlay.opaque"]
    assert told["box"] == ["new"]
    assert told["owner"] == [100_007, 200_008]
    assert told["copies"] == 2
    assert told["unpacked"] == ["user.overlay.opaque"]
    assert told["steers"] == ["user.kept"]
    assert told["lazy"] == ["box", "box/new"]
    assert told["bytes"] == "new"
    assert userxattr.needed() is False, "here is no user namespace"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
