# SPDX-License-Identifier: Apache-2.0
"""Builds the tests' Go programs, which speak to us, or for us, in containerd's own words.

Compiler and libraries are Debian's packages, unpacked into a temporary folder and never installed: a newer Go that
the machine may have does not build libraries of that age. What is kept, in the cache folder, are the programs.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from soci.errors import NotFound, Unavailable
from soci_dev.folders import CHECKOUT, cache_folder, locked
from soci_dev.tools import need_apt, unpacked, update_lists

PACKAGES: Final = ("golang-go", "golang-github-containerd-containerd-dev")
"""What is asked for; the libraries that these depend on come too."""
SOURCES: Final = CHECKOUT / "tests/contract/suite"
"""One program for each folder in here, named after it."""

_BUILD_TIMEOUT_S: Final = 900
_INSTALLED: Final = re.compile(r"^Inst (golang-\S+) ", re.MULTILINE)


def go_program(name: str, sources: Path = SOURCES) -> Path:
    """The program ``name`` of ``sources``, built when its sources changed, all of them at once.

    Raises `NotFound` without apt-get or without such a program, `Unavailable` where packages cannot be fetched or a
    program does not compile.
    """
    home = cache_folder() / "tools" / f"go-{_digest(sources)[:12]}"
    if not home.is_dir():
        with locked(home.parent / ".lock"):
            if not home.is_dir():  # another process may have built it while we waited
                _build(sources, home)
    program = home / name
    if not program.is_file():
        raise NotFound(f"there is no Go program {name} in {sources}")
    return program


def _digest(sources: Path) -> str:
    digest = hashlib.sha256(repr(PACKAGES).encode())
    for file in sorted(sources.rglob("*.go")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(sources)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _build(sources: Path, home: Path) -> None:
    need_apt("Go")
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".go-") as temporary:
        folder = Path(temporary)
        packages = _with_libraries()
        if not packages:
            update_lists(folder)  # a fresh machine has no package lists at all
            packages = _with_libraries()
        if not packages:
            raise Unavailable(f"apt-get does not know {' and '.join(PACKAGES)}")
        print(f"fetching {len(packages)} of Debian's packages to build Go programs with", file=sys.stderr)
        tree = unpacked(packages, folder)
        built = folder / "built"
        built.mkdir()
        for one in sorted({file.parent for file in sources.rglob("*.go")}):
            _compile(tree, one, built / one.name)
        built.rename(home)


def _with_libraries() -> list[str]:
    # Asked as if nothing were installed: what the machine has may be anything.
    options = ["--simulate", "--no-install-recommends", "-o", "Dir::State::status=/dev/null"]
    done = subprocess.run(
        ["apt-get", "-qq", *options, "install", *PACKAGES],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=_BUILD_TIMEOUT_S,
    )
    return sorted(set(_INSTALLED.findall(done.stdout))) if done.returncode == 0 else []


def _compile(tree: Path, folder: Path, program: Path) -> None:
    found = sorted((tree / "usr/lib").glob("go-*/bin/go"))
    if not found:
        raise Unavailable("Debian's Go has no program go")
    is_test = any(file.name.endswith("_test.go") for file in folder.glob("*.go"))
    environment = os.environ | {
        "GOROOT": str(found[-1].parents[1]),
        "GOPATH": str(tree / "usr/share/gocode"),
        "GOCACHE": str(tree / "cache"),
        "GO111MODULE": "off",  # Debian's libraries are no modules
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
    }
    words = ["test", "-c"] if is_test else ["build"]
    done = subprocess.run(
        [found[-1], *words, "-o", program, "."],
        cwd=folder,
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_BUILD_TIMEOUT_S,
    )
    if done.returncode or not program.is_file():
        raise Unavailable(f"{folder} does not compile:\n{done.stdout}")
