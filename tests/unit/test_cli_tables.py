# SPDX-License-Identifier: Apache-2.0
"""Tables, ages, and the rules around local artifacts that need no daemon."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from soci.digest import parse_digest
from soci.errors import InvalidConfig, NotFound
from soci.index import SOCI_INDEX_V1, SOCI_INDEX_V2
from soci.oci import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest, parse_platform
from soci.reference import parse_reference
from soci_cli.__main__ import run
from soci_cli.build_flags import parse_platforms, read_names, wish_of
from soci_cli.local import ImageManifest, is_index_label, make_root
from soci_cli.progress import BuildScreen
from soci_cli.push import credentials_of
from soci_cli.push_index import choose
from soci_cli.tables import ago, table
from soci_indexing.artifacts import INDEX, Artifact
from soci_indexing.build import LayerBegun, LayerDone, LayerRead, Noticed
from soci_registry import DockerConfig, FixedLogin, Login

SECOND = 1_000_000_000
DIGEST = parse_digest("sha256:" + "11" * 32)
LAYER = Descriptor(OCI_LAYER_GZIP, DIGEST, 1234)


def test_tables() -> None:
    """Columns have at least eight characters and four spaces after the widest cell; lines end without spaces."""
    assert table(("A", "LONG HEADER", "Z"), [("1", "2", "3"), ("123456", "", "x")]) == (
        "A         LONG HEADER    Z\n1         2              3\n123456                   x"
    )
    assert table(("A", "B"), []) == "A       B"


@pytest.mark.parametrize(
    ("age", "text"),
    [
        (0, "0s ago"),
        (45.9, "45s ago"),
        (303, "5m3s ago"),
        (3600, "1h0m0s ago"),
        (90_061, "25h1m1s ago"),
        (-5, "0s ago"),
    ],
)
def test_ages(age: float, text: str) -> None:
    """Whole seconds, minutes and hours; a clock that went back is no age."""
    assert ago(1_700_000_000 * SECOND, 1_700_000_000 * SECOND + int(age * SECOND)) == text
    assert ago(0, SECOND) == "n/a"


def test_lines_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """Each layer has the line that scripts look for on stdout; quiet leaves warnings alone."""
    ztoc = parse_digest("sha256:" + "22" * 32)
    for quiet in (False, True):
        with BuildScreen(quiet=quiet) as screen:
            screen.report(LayerBegun(LAYER))
            screen.report(LayerRead(LAYER, 1000))
            screen.report(LayerDone(LAYER, ztoc, 5))
            screen.report(LayerDone(LAYER, ztoc, 5, reused=True))
            screen.report(LayerDone(LAYER, None, skipped="too small"))
            screen.report(Noticed("take care"))
        out, err = capsys.readouterr()
        assert err == "soci: warning: take care\n"
        assert out == (
            ""
            if quiet
            else f"layer {DIGEST} -> ztoc {ztoc}\nlayer {DIGEST} -> ztoc {ztoc} (already exists)\n"
            f"ztoc skipped - layer {DIGEST} (application/vnd.oci.image.layer.v1.tar+gzip): too small\n"
        )


def test_names_of_files_to_prefetch(tmp_path: Path) -> None:
    """A JSON list of strings, trimmed and without blanks, after those named one by one; anything else is refused."""
    path = tmp_path / "names.json"
    path.write_text('["/a ", " ", "", "b/c"]')
    values = {"span_size": 1, "min_layer_size": 0, "optimizations": (), "force": False, "version": 1}
    wish = wish_of(**values, prefetch_files=(" x ", ""), prefetch_files_json=str(path))  # type: ignore[arg-type]
    assert wish.prefetch_files == ("x", "/a", "b/c")
    for wrong in ("", "{}", "[1]", '"a"', "[" * 100_000):
        path.write_text(wrong)
        with pytest.raises(InvalidConfig):
            read_names(path)
    with pytest.raises(InvalidConfig):
        read_names(tmp_path / "none")


def test_platforms_are_not_repeated() -> None:
    """Two names of one platform are one."""
    assert parse_platforms(["linux/arm64", "linux/amd64", "linux/aarch64"]) == (
        parse_platform("linux/arm64"),
        parse_platform("linux/amd64"),
    )


def test_the_newest_version_1_is_pushed(capsys: pytest.CaptureFixture[str]) -> None:
    """A version 2 is passed over with a warning, wherever it stands; without a version 1 the way out is said."""
    one = ImageManifest(
        LAYER, Manifest(OCI_MANIFEST, Descriptor(OCI_CONFIG, DIGEST, 2), ()), parse_platform("linux/amd64")
    )
    second = Artifact(parse_digest("sha256:" + "22" * 32), INDEX, DIGEST, artifact_type=SOCI_INDEX_V2)
    first = Artifact(parse_digest("sha256:" + "33" * 32), INDEX, DIGEST, artifact_type=SOCI_INDEX_V1)
    old = Artifact(parse_digest("sha256:" + "44" * 32), INDEX, DIGEST, artifact_type=SOCI_INDEX_V1)
    assert choose([second, first, old], one, "a:1") == first
    assert second.digest in capsys.readouterr().err
    for found in ([second], []):
        with pytest.raises(NotFound, match="run soci create a:1"):
            choose(found, one, "a:1")


def test_logins_for_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """--user with a password is for that registry alone; without one and without a terminal it is refused."""
    reference = parse_reference("host:5000/a:1")
    assert credentials_of("me:a:b", reference) == FixedLogin(Login("me", "a:b"), "host:5000")
    assert isinstance(credentials_of("", reference), DockerConfig)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(InvalidConfig):
        credentials_of("me", reference)


def test_the_root_folder_is_made_private_and_its_parents_are_not(tmp_path: Path) -> None:
    """Mode 0700; a folder that is there stays as it is."""
    assert make_root(tmp_path / "root").stat().st_mode & 0o777 == 0o700
    (tmp_path / "root").chmod(0o711)
    assert make_root(tmp_path / "root").stat().st_mode & 0o777 == 0o711
    with pytest.raises(Exception, match="--root"):
        make_root(tmp_path / "no" / "root")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("containerd.io/gc.ref.content.soci-index", True),
        ("containerd.io/gc.ref.content.soci-index.12", True),
        ("containerd.io/gc.ref.content.soci-indexes", False),
        ("containerd.io/gc.ref.content.l.0", False),
    ],
)
def test_labels_that_keep_indexes(key: str, *, ours: bool) -> None:
    """Only the label and its numbered kin are touched."""
    assert is_index_label(key) is ours


def test_lists_need_no_containerd_for_the_store_below_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With artifacts below --root every list works without containerd; with containerd's store it says what is missing."""
    flags = ["--address", str(tmp_path / "none"), "--root", str(tmp_path / "root")]
    for words in (
        ["index", "ls"],
        ["ztoc", "ls"],
        ["prefetch", "ls"],
        ["index", "list", "-q"],
        ["ztoc", "list", "--json"],
    ):
        assert run([*flags, "--content-store", "soci", *words]) == 0, words
    capsys.readouterr()
    assert run([*flags, "index", "ls"]) == 1
    assert "is it running?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["rebuild_db", "--help"], ["index", "rm", "--help"], ["ztoc", "ls", "--help"], ["prefetch", "ls", "-h"]]
)
def test_both_spellings(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The verbs answer to either of their names."""
    assert run(words) == 0
    assert "Usage: soci" in capsys.readouterr().out


def test_lists_import_no_network_library(tmp_path: Path) -> None:
    """Listing what is below --root loads neither an HTTP library nor the bus, nor the terminal library."""
    code = "import sys; from soci_cli.__main__ import run; run(sys.argv[1:]); print(sorted(sys.modules))"
    words = ["--root", str(tmp_path), "--content-store", "soci", "--address", "/none", "index", "ls"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=30)
    assert not {"httpx", "aiohttp", "nats", "rich"} & set(re.findall(r"'(\w+)'", done.stdout))
