# SPDX-License-Identifier: Apache-2.0
"""The demo's judgement and what it reads, the proxy's faults, containerd's configuration, the venv's links."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from soci_dev import demo_image
from soci_dev.containerd_config import ContainerdConfig
from soci_dev.demo import judge
from soci_dev.faults import Drop, Seen, always, first
from soci_dev.launching import Launch, LayerMode, parse_launches, parse_modes
from soci_dev.link import PTH, link
from soci_dev.proxy import Counts

BLOB = "/v2/demo/blobs/sha256:" + "0" * 64


def launch(moved: int, output: str = "x") -> Launch:
    return Launch(1.0, 2.0, moved, Counts(body_bytes=moved), output)


@pytest.mark.parametrize(
    ("moved", "output", "passed"),
    [(499, "x", True), (500, "x", False), (10, "y", False)],
    ids=["ok", "half", "differs"],
)
def test_judge(*, moved: int, output: str, passed: bool) -> None:
    """Half of the image is too much, and different output is never all right."""
    verdicts = judge(launch(1000), launch(moved, output), 1000)
    assert all(good for good, _ in verdicts) is passed


def test_launches_of_one_image() -> None:
    """Of launches listed newest first, the first one of our image is taken."""
    rows = [{"id": "c", "image": "other"}, {"id": "b", "image": "r/demo:latest"}, {"id": "a", "image": "r/demo:latest"}]
    assert parse_launches(json.dumps(rows), "r/demo:latest") == "b"
    assert parse_launches(json.dumps(rows), "none") is None


def test_modes() -> None:
    """Layers come with their mode and reason."""
    text = json.dumps({"id": "a", "layers": [{"layer": "sha256:1", "mode": "lazy", "why": "has a zTOC"}]})
    assert parse_modes(text) == [LayerMode("sha256:1", "lazy", "has a zTOC")]


def test_hooks() -> None:
    """`first` counts blob reads only; `always` never tires; uploads and manifests pass."""
    blob, manifest = Seen(1, "GET", BLOB, {}), Seen(2, "GET", "/v2/demo/manifests/latest", {})
    upload = Seen(3, "PUT", BLOB, {})
    hook = first(1, Drop())
    assert [hook(manifest), hook(upload), hook(blob), hook(blob)] == [None, None, Drop(), None]
    assert [always(Drop())(seen) for seen in (blob, manifest)] == [Drop(), None]


@pytest.mark.parametrize("cri", [True, False])
def test_containerd_config(tmp_path: Path, *, cri: bool) -> None:
    """The file is TOML, keeps to its folder, plugs our snapshotter in and says what CRI needs to pull lazily."""
    config = ContainerdConfig(tmp_path / 'a"b', tmp_path / "c.sock", tmp_path / "s.sock", cri)
    read = tomllib.loads(config.toml())
    assert read["root"].startswith(str(tmp_path / 'a"b'))
    assert read["proxy_plugins"]["sociable"] == {"type": "snapshot", "address": str(tmp_path / "s.sock")}
    assert ("io.containerd.grpc.v1.cri" in read["disabled_plugins"]) is not cri
    if cri:
        section = read["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
        assert section["snapshotter"] == "sociable"
        assert section["disable_snapshot_annotations"] is False


def test_link(tmp_path: Path) -> None:
    """Every source root is on the path, and each console script starts its function."""
    (tmp_path / "pyproject.toml").write_text(
        '[project.scripts]\nhello = "m.n:main"\n[tool.setuptools.packages.find]\nwhere = ["libs/a", "tools"]\n'
    )
    assert link(tmp_path, tmp_path, tmp_path) == ["hello"]
    assert (tmp_path / PTH).read_text() == f"{tmp_path}/libs/a\n{tmp_path}/tools\n"
    assert "from m.n import main" in (tmp_path / "hello").read_text()
    assert (tmp_path / "hello").stat().st_mode & 0o111


def test_wheels_are_pinned() -> None:
    """Every wheel of the demo's image names one version."""
    assert all(wheel.count("==") == 1 for wheel in demo_image.WHEELS)
