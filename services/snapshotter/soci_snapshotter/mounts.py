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

    def upper(self, snapshot: int) -> Path:
        """The directory with a local snapshot's own files."""
        return self.snapshots / str(snapshot) / "fs"

    def work(self, snapshot: int) -> Path:
        """Overlayfs's work directory of an active snapshot."""
        return self.snapshots / str(snapshot) / "work"

    def contents(self, snapshot: Snapshot) -> Path:
        """What a layer above puts below itself: the lazy mount, or the local directory."""
        return self.mounts / str(snapshot.id) if is_lazy(snapshot) else self.upper(snapshot.id)


def is_lazy(snapshot: Snapshot) -> bool:
    """Is the snapshot shown by the mounter?"""
    return REMOTE in snapshot.labels


def mounts_of(snapshot: Snapshot, parents: Sequence[Snapshot], places: Places, *, index_off: bool) -> tuple[Mount, ...]:
    """The mounts of an active snapshot or view over ``parents``, nearest first.

    ``index_off`` adds overlayfs's ``index=off``, where the kernel knows it: lower layers on FUSE have no file handles.
    """
    own = str(places.upper(snapshot.id))
    if not parents:
        return (Mount("bind", own, ("rw" if snapshot.kind == "active" else "ro", "rbind")),)
    if snapshot.kind == "view" and len(parents) == 1:
        return (Mount("bind", str(places.contents(parents[0])), ("ro", "rbind")),)
    if len(parents) > OVERLAY_LAYERS:
        raise Unsupported(f"{len(parents)} layers: the kernel's overlayfs takes {OVERLAY_LAYERS}")
    lower = "lowerdir=" + ":".join(str(places.contents(parent)) for parent in parents)
    options: tuple[str, ...] = ("index=off",) if index_off else ()
    if snapshot.kind == "active":
        options += (f"workdir={places.work(snapshot.id)}", f"upperdir={own}")
    return (Mount("overlay", "overlay", (*options, lower)),)
