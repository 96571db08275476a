# SPDX-License-Identifier: Apache-2.0
"""soci_dev.mirror: which mirror a machine uses, whatever form its apt sources have."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci.errors import NotFound
from soci_dev.mirror import find_mirror, parse_deb822, parse_one_line

ONE_LINE = """\
# a comment
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://mirror.test/debian bookworm main contrib # and more
deb-src http://mirror.test/debian bookworm main
deb http://mirror.test/debian-security bookworm-security main
"""

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://first.test/debian
 http://second.test/debian
Suites: bookworm bookworm-updates
Components: main

Enabled: no
Types: deb
URIs: http://off.test/debian
Suites: bookworm

Types: deb-src
URIs: http://source.test/debian
Suites: bookworm
"""


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOCIABLE_DEBIAN_MIRROR", raising=False)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


def test_one_line_form() -> None:
    """Options, comments and source lines do not hide or fake a URI."""
    assert list(parse_one_line(ONE_LINE)) == [
        ("http://mirror.test/debian", ["bookworm"]),
        ("http://mirror.test/debian-security", ["bookworm-security"]),
    ]


def test_deb822_form() -> None:
    """Continued fields give several URIs; disabled and source-only stanzas give none."""
    suites = ["bookworm", "bookworm-updates"]
    assert list(parse_deb822(DEB822)) == [("http://first.test/debian", suites), ("http://second.test/debian", suites)]


def test_suite_is_matched_exactly(tmp_path: Path) -> None:
    """The security archive of a suite is not taken for the suite."""
    apt = write(tmp_path, "sources.list", "deb http://s.test/debian-security bookworm-security main\n")
    write(tmp_path, "sources.list.d/debian.sources", DEB822)
    assert find_mirror("bookworm", apt) == "http://first.test/debian"


def test_another_release_of_debian_will_do(tmp_path: Path) -> None:
    """A machine of another release has our suite on the same mirror."""
    apt = write(tmp_path, "sources.list", "deb http://m.test/other stable x\ndeb http://m.test/debian/ trixie main\n")
    assert find_mirror("bookworm", apt) == "http://m.test/debian/"


def test_mirror_file(tmp_path: Path) -> None:
    """A ``mirror+file:`` source names the file whose first entry is the mirror."""
    mirrors = tmp_path / "mirrors.list"
    mirrors.write_text("# best first\nhttp://best.test/debian priority:1\nhttp://next.test/debian\n")
    apt = write(tmp_path, "sources.list", f"deb mirror+file:{mirrors} bookworm main\n")
    assert find_mirror("bookworm", apt) == "http://best.test/debian"


def test_override_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a source the error names the variable, and the variable wins."""
    with pytest.raises(NotFound, match="SOCIABLE_DEBIAN_MIRROR"):
        find_mirror("bookworm", tmp_path)
    monkeypatch.setenv("SOCIABLE_DEBIAN_MIRROR", "http://mine.test/debian")
    assert find_mirror("bookworm", tmp_path) == "http://mine.test/debian"
