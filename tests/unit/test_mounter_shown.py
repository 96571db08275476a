# SPDX-License-Identifier: Apache-2.0
"""What is told of a mount, by the mounter and by `soci layers ls`."""

from __future__ import annotations

from pathlib import Path

import pytest

from soci.digest import Digest
from soci_bus.asks import MountLayer
from soci_cache.proof import COMPLETE
from soci_cache.survey import Held
from soci_cli.layers import HEADERS, as_json, cells
from soci_mounter.shown import LONGEST, Mounted, page_of, tell

A, B = Digest("sha256:" + "a" * 64), Digest("sha256:" + "b" * 64)
ASK = MountLayer("7", "registry/image:1", A, B)


def mounted(way: str, ask: MountLayer = ASK) -> Mounted:
    return Mounted(ask, way, "Linux 6.12", Path("/nowhere"))


@pytest.mark.parametrize(
    ("way", "held", "state", "spans"),
    [
        ("fuse", Held(A, B, 10, 0.0, (3, 1, 0, 0)), "lazy", (1, 4)),
        ("erofs", Held(A, B, 10, 0.0, (2, 1, 0, 1)), "filling", (2, 4)),
        ("erofs", Held(A, B, 10, 0.0, (0, 4, 0, 0), COMPLETE), "complete", (4, 4)),
        ("native", Held(A, B, 10, 0.0, (0, 4, 0, 0), COMPLETE), "native", (4, 4)),
        ("erofs", Held(A, B, 10, 0.0, known=False), "unchecked", (0, 0)),
        ("fuse", None, "gone", (0, 0)),
    ],
)
def test_a_mount_in_a_line(way: str, held: Held | None, state: str, spans: tuple[int, int]) -> None:
    """Way and state, spans here of all; a folder that is gone is said, and no error."""
    told = tell(mounted(way), held)
    assert (told.way, told.state, (told.here, told.spans)) == (way, state, spans)
    row = dict(zip(HEADERS, cells(told), strict=True))
    assert row["LAYER"] == "sha256:aaaaaaaaaaaa"
    assert (row["MOUNT"], row["WAY"], row["STATE"], row["IMAGE"]) == ("7", way, state, "registry/image:1")
    assert row["SPANS"] == f"{spans[0]}/{spans[1]}"
    assert as_json(told) | {"why": "Linux 6.12", "ztoc": B} == as_json(told)


def test_a_page_stays_small() -> None:
    """A long name of an image is cut; the page says where the next one begins."""
    page = page_of([mounted("fuse", MountLayer("7", "i" * 9000, A, B))], "7")
    assert (len(page.layers[0].image), page.next) == (LONGEST, "7")
