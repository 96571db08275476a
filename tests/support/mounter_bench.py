# SPDX-License-Identifier: Apache-2.0
"""A mounter on a root folder of its own, by either way to show layers, and what a program can see of a tree."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from soci.digest import hex_of
from soci_cache import LayerStore
from soci_mounter import kernel
from soci_mounter.native import Machine, choose
from support.mounter_layers import Made
from support.mounter_process import Holder, Server

WAYS_TO_SHOW = ["fuse", "erofs"]
NEEDS_EROFS = pytest.mark.skipif(
    choose(Machine("auto", tuple(map(int, os.uname().release.split(".")[:2])),  # type: ignore[arg-type]
                   kernel.has_file_system("erofs"), held=True))[0] != "erofs",
    reason="needs a kernel that mounts EROFS from files",
)  # fmt: skip


class Bench:
    """A root folder, its blobs, and the servers that were started on it."""

    def __init__(self, folder: Path, mode: str = "fuse") -> None:
        self.folder = folder
        self.mode = mode
        self.root = folder / "root"
        self.blobs = folder / "blobs"
        self.root.mkdir()
        self.blobs.mkdir()
        self.servers: list[Server] = []
        self.mounted: list[Path] = []
        self.holder = Holder(self.root) if mode == "erofs" else None

    def start(self, **settings: Any) -> Server:
        server = Server(self.root, self.blobs, mode=self.mode, **settings)
        self.servers.append(server)
        return server

    def layer(self, made: Made) -> dict[str, object]:
        """Prepare a layer and give the fields of its ask."""
        made.put(self.root / "cache")
        (self.blobs / hex_of(made.layer)).write_bytes(made.blob)
        return {"image": "registry/image", "layer": made.layer, "ztoc": made.ztoc_digest}

    def mount(self, server: Server, name: str, made: Made, lower: tuple[str, ...] = (), **manner: Any) -> Path:
        return Path(server.ask("mount", mount=name, lower=lower, **manner, **self.layer(made)))

    def present(self, made: Made) -> int:
        with LayerStore(self.root / "cache").read(made.layer, made.ztoc_digest) as reader:
            return reader.present_count()

    def close(self) -> None:
        below = self.root.glob("mounts/*") if self.mode == "erofs" else ()  # by FUSE it may be broken on purpose
        for path in [*reversed(self.mounted), *below, self.root / "mounts"]:
            kernel.clear(path)
        for server in self.servers:
            server.end(signal.SIGKILL)
        if self.holder:
            self.holder.end()
        for name in ("fuse", "data"):
            kernel.clear(self.root / "mounter" / name)


def described(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a program can see of a tree: path → type, mode, owner, size, time, target, attributes, bytes."""
    found: dict[str, tuple[Any, ...]] = {}
    inodes: dict[int, str] = {}
    for folder, folders, names in os.walk(root):
        for name in sorted(folders) + sorted(names):
            path = Path(folder) / name
            seen = path.lstat()
            key = str(path.relative_to(root))
            regular, link = stat.S_ISREG(seen.st_mode), path.is_symlink()
            device = stat.S_ISCHR(seen.st_mode) or stat.S_ISBLK(seen.st_mode)
            first = inodes.setdefault(seen.st_ino, key)
            found[key] = (
                stat.filemode(seen.st_mode),
                seen.st_uid,
                seen.st_gid,
                None if path.is_dir() and not link else seen.st_size,
                None if path.is_dir() and not link else seen.st_nlink,
                seen.st_rdev if device else 0,
                seen.st_mtime_ns,
                str(path.readlink()) if link else "",
                {attribute: os.getxattr(path, attribute, follow_symlinks=False) for attribute in attributes_of(path)},
                hashlib.sha256(path.read_bytes()).hexdigest() if regular else "",
                first,
            )
    return found


def attributes_of(path: Path) -> list[str]:
    return sorted(name for name in os.listxattr(path, follow_symlinks=False) if name != "security.selinux")
