# SPDX-License-Identifier: Apache-2.0
"""The units in deploy/systemd: what systemd itself says of them, and that they name what there is."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from soci_runtime.config import ACTIVATED, DEFAULT_ADDRESS

CHECKOUT = Path(__file__).parents[2]
UNITS = sorted((CHECKOUT / "deploy/systemd").iterdir())
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
LIMIT = 30.0


def read(unit: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # systemd's keys have their case
    parser.read_string(unit.read_text())
    return parser


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service(unit: Path) -> None:
    """It runs one of our programs, tells when it is ready, finds root's docker config, and comes back."""
    service = read(unit)["Service"]
    program, *words = service["ExecStart"].split()
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(program).name in scripts
    assert (service["Type"], service["Environment"], service["Restart"]) == ("notify", "HOME=/root", "always")
    assert words == (["--address", ACTIVATED] if unit.stem == "soci-snapshotter-grpc" else [])


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_who_mounts_has_no_mounts_of_its_own(unit: Path) -> None:
    """Settings that give a service its own mount namespace would hide from containerd what it mounts."""
    private = re.compile(
        r"^(Private(Tmp|Devices|Mounts|Users)|Protect\w+|\w*Paths|DynamicUser|RootDirectory)=", re.MULTILINE
    )
    if unit.stem in {"soci-mounter", "soci-snapshotter-grpc"}:
        assert not private.search(unit.read_text())


def test_the_socket() -> None:
    """It is where containerd's configuration and ours look for it, and for root and its group alone."""
    socket = read(CHECKOUT / "deploy/systemd/soci-snapshotter-grpc.socket")["Socket"]
    assert (socket["ListenStream"], socket["SocketMode"]) == (DEFAULT_ADDRESS, "0660")
    assert DEFAULT_ADDRESS in (CHECKOUT / "deploy/containerd/config.toml").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_them(tmp_path: Path) -> None:
    """``systemd-analyze verify`` has nothing to say of them, but that our programs are not installed here."""
    for unit in UNITS:
        (tmp_path / unit.name).write_text(re.sub(r"/usr/local/bin/[a-z-]+", "/bin/true", unit.read_text()))
    words = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / UNITS[0].name).write_text("[Service]\nType=notfy\nExecStart=/bin/true\n")
    spoiled = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert "notfy" in spoiled.stderr, "the check would see a slip"
