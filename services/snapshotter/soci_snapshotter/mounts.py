# SPDX-License-Identifier: Apache-2.0
"""The mounts that containerd is to make for a snapshot. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soci.errors import Unsupported
from soci_snapshotter.labels import REMOTE
from soci_snapshotter.state import Snapshot

OVERLAY_LAYERS = 500
"""Lower directories that the kernel's overlayfs takes."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2), in containerd's words."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Places:
    """Where snapshots live on this node."""

    snapshots: Path
    mounts: Path
    cache: Path | None = None  # the span cache; None: not known, lazy layers then take no room

    def upper(self, snapshot: int) -> Path:
        """The directory with a local snapshot's own files."""
        return self.snapshots / str(snapshot) / "fs"

    def work(self, snapshot: int) -> Path:
        """Overlayfs's work directory of an active snapshot."""
        return self.snapshots / str(snapshot) / "work"

    def contents(self, snapshot: Snapshot) -> Path:
        """What a layer above puts below itself: the lazy mount, or the local directory."""
        return self.mounts / str(snapshot.id) if is_lazy(snapshot) else self.upper(snapshot.id)

    def mapped(self, snapshot: Snapshot, container: Snapshot) -> Path:
        """As `contents`, with the owners of a container's user namespace (`soci_snapshotter.idmap`)."""
        name = f"{snapshot.id}_{container.id}"
        return self.mounts / name if is_lazy(snapshot) else self.snapshots / name / "fs"


def is_lazy(snapshot: Snapshot) -> bool:
    """Is the snapshot shown by the mounter?"""
    return REMOTE in snapshot.labels


def mounts_of(  # noqa: PLR0913  the kernel's choices
    snapshot: Snapshot,
    parents: Sequence[Snapshot],
    places: Places,
    *,
    index_off: bool,
    mapped: bool = False,
    user_xattrs: bool = False,
) -> tuple[Mount, ...]:
    """The mounts of an active snapshot or view over ``parents``, nearest first.

    ``index_off`` adds overlayfs's ``index=off``, where the kernel knows it: lower layers on FUSE have no file handles.
    ``mapped`` takes the layers with the owners of the container's user namespace. ``user_xattrs`` adds ``userxattr``,
    see `soci_snapshotter.userxattr`.
    """
    own = str(places.upper(snapshot.id))
    if not parents:
        return (Mount("bind", own, ("rw" if snapshot.kind == "active" else "ro", "rbind")),)
    lower = [str(places.mapped(one, snapshot) if mapped else places.contents(one)) for one in parents]
    if snapshot.kind == "view" and len(parents) == 1:
        return (Mount("bind", lower[0], ("ro", "rbind")),)
    if len(parents) > OVERLAY_LAYERS:
        raise Unsupported(f"{len(parents)} layers: the kernel's overlayfs takes {OVERLAY_LAYERS}")
    options: tuple[str, ...] = ("index=off",) if index_off else ()
    if snapshot.kind == "active":
        options += (f"workdir={places.work(snapshot.id)}", f"upperdir={own}")
    options += ("lowerdir=" + ":".join(lower),)
    if user_xattrs:
        options += ("userxattr",)
    return (Mount("overlay", "overlay", options),)
