# SPDX-License-Identifier: Apache-2.0
"""Finds the programs that the private stack runs, and fetches Debian's where the machine has none.

Fetched packages are unpacked below the cache folder and never installed: no unit is enabled, nothing starts by
itself, and a containerd that the machine already runs is not touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from soci.errors import NotFound, Unavailable
from soci_dev.folders import cache_folder, locked

PACKAGES: Final = {
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "docker-registry": "docker-registry",
    "busybox": "busybox-static",
    "fsck.erofs": "erofs-utils",
    "dump.erofs": "erofs-utils",
}
"""Program to Debian package."""

_NEVER_FROM_PATH: Final = frozenset({"busybox"})  # images need a static one; the machine's is most often dynamic
_BIN_FOLDERS: Final = ("usr/bin", "usr/sbin", "bin", "sbin")
_APT_TIMEOUT_S: Final = 300


def find(name: str) -> Path:
    """The path of program ``name``: from PATH, else this venv, else Debian's package fetched into the cache.

    Raises `NotFound` when none of the three has it, `Unavailable` when the package cannot be fetched.
    """
    if name not in _NEVER_FROM_PATH:
        # Our own venv first for nats-server: the machine's may be years older.
        beside = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name, path=_search_path())
        if beside:
            return Path(beside)
    package = PACKAGES.get(name)
    if package is None:
        raise NotFound(f"{name} is neither on PATH nor in {Path(sys.executable).parent}; run ./dev to set up")
    found = _inside(_fetched(package), name)
    if found is None:
        raise NotFound(f"Debian's package {package} has no program {name}")
    return found


def search_path() -> str:
    """A PATH on which everything `find` fetched can be seen, for daemons that look up their helpers themselves."""
    folders = dict.fromkeys(str(find(name).parent) for name in ("containerd", "containerd-shim-runc-v2", "runc", "ctr"))
    return ":".join([*folders, _search_path()])


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def _inside(root: Path, name: str) -> Path | None:
    candidates = (root / folder / name for folder in _BIN_FOLDERS)
    return next((path for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def _fetched(package: str) -> Path:
    tools = cache_folder() / "tools"
    home = tools / package
    if home.is_dir():
        return home
    with locked(tools / ".lock"):
        if not home.is_dir():  # another process may have fetched it while we waited
            _fetch(package, home)
    return home


def _fetch(package: str, home: Path) -> None:
    need_apt(package)
    print(f"fetching Debian's {package} into {home}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{package}-") as temporary:
        unpacked([package], Path(temporary)).rename(home)


def need_apt(what: str) -> None:
    """Raises `NotFound` on a machine that is no Debian."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise NotFound(f"{what} is not installed and there is no apt-get to fetch it with: install it yourself")


def unpacked(packages: Sequence[str], folder: Path) -> Path:
    """A folder below ``folder`` with what these Debian packages hold, one over the other. Raises `Unavailable`."""
    if not _download(packages, folder):
        update_lists(folder)  # a fresh machine has no package lists at all
        if not _download(packages, folder):
            raise Unavailable(f"apt-get cannot download {', '.join(packages)}: see its message above")
    tree = folder / "tree"
    for deb in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True, timeout=_APT_TIMEOUT_S)
        deb.unlink()
    return tree


def update_lists(folder: Path) -> None:
    """Have apt-get fetch its lists of packages; a failure shows when one is asked for."""
    _apt(["apt-get", "update", "-qq"], folder)


def _download(packages: Sequence[str], folder: Path) -> bool:
    # The sandbox user of apt cannot write into our folder; as root it would only warn about that.
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages]
    return _apt(command, folder) and any(folder.glob("*.deb"))


def _apt(command: list[str], folder: Path) -> bool:
    return subprocess.run(command, cwd=folder, check=False, timeout=_APT_TIMEOUT_S, stdout=sys.stderr).returncode == 0
