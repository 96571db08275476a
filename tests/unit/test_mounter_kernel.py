# SPDX-License-Identifier: Apache-2.0
"""Reading the kernel's list of mounts."""

from __future__ import annotations

from pathlib import Path

from soci_mounter import kernel

INFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:33 / /srv/a\\040b/mounts ro,relatime shared:7 master:1 - fuse.soci soci ro,user_id=0
41 40 0:34 / /srv/a\\040b/mounts ro - fuse.soci soci ro
42 22 0:35 / /srv/a rw - tmpfs tmpfs rw
odd line
"""


def test_only_mounts_at_the_very_path_count() -> None:
    """Escapes of blanks are undone, optional fields skipped, mounts above and beside the path left out."""
    assert kernel.mounted_at(Path("/srv/a b/mounts"), INFO) == [("0:33", "fuse.soci"), ("0:34", "fuse.soci")]
    assert kernel.mounted_at(Path("/srv"), INFO) == []


def test_a_path_without_mounts_needs_no_clearing(tmp_path: Path) -> None:
    """Nothing is detached where nothing is mounted, and where nothing is at all."""
    assert kernel.clear(tmp_path) == 0
    assert kernel.clear(tmp_path / "absent") == 0
    assert kernel.tune(tmp_path, tmp_path / "scratch") == {}
