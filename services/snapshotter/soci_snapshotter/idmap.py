# SPDX-License-Identifier: Apache-2.0
"""Layers as a container with a user namespace sees them: the same bytes, other owners.

A container's Prepare or View says by two labels which owners of the host stand for its own. Every layer below it is
then had a second time, under the name ``<layer>_<container>``:

    lazy    shown again by the mounter, which maps owners as it answers; tree, spans and fetches are shared
    local   an id-mapped bind mount, where kernel and file system can do that, else a copy with other owners

What is needed to have them again is in the labels and in the mounter's records. They go with the container's snapshot.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soci.digest import parse_digest
from soci.errors import DeadlineExceeded, FailedPrecondition, InvalidInput, SociError, Unavailable
from soci.idmap import NO_ID, IdMap, parse_id_map
from soci_bus.asks import CheckMounts, MountLayer
from soci_bus.face import Bus
from soci_runtime.flights import in_stoppable_thread
from soci_runtime.turns import Turns
from soci_snapshotter import userxattr
from soci_snapshotter.directories import DIGITS, error_of, mark_shown
from soci_snapshotter.idmap_local import copied, have_local
from soci_snapshotter.labels import MAPPED, OURS, REF, ZTOC, read_remote_labels
from soci_snapshotter.mounts import Places, is_lazy
from soci_snapshotter.state import Snapshot
from soci_snapshotter.usage import disk_usage

UIDS = "containerd.io/snapshot/uidmapping"
GIDS = "containerd.io/snapshot/gidmapping"
FIXED = (*OURS, UIDS, GIDS)
"""Labels that no update changes: with them a snapshot would get other layers than it was made over."""
OVERFLOW = 65534
"""Who owns, in a copy or as root directory, what the map gives to nobody: the kernel's own "nobody"."""
SHOW_TIMEOUT = 30.0
"""Seconds in which all lazy layers of one container must be shown with its owners."""

_NAME = re.compile(rf"([1-9][0-9]{{0,{DIGITS - 1}}})_([1-9][0-9]{{0,{DIGITS - 1}}})")


@dataclass(frozen=True, slots=True)
class Owners:
    """Whose number on the host stands for whose in the container."""

    uids: IdMap
    gids: IdMap

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        """The host's owner and group for the container's, as numbers that a file can have.

        What is nobody's becomes `OVERFLOW`; `InvalidInput` where the map gives that number to somebody.
        """
        return _real(self.uids, uid), _real(self.gids, gid)


def _real(ids: IdMap, inside: int) -> int:
    found = ids.host(inside)
    if found != NO_ID:
        return found
    if ids.has_host(OVERFLOW):
        raise InvalidInput(f"id {inside} is not in the map {ids.text()}, which has host id {OVERFLOW}, nobody's, too")
    return OVERFLOW


# --- what labels and names say


def owners_of(labels: Mapping[str, str], below: Snapshot | None) -> Owners | None:
    """Whom a container's snapshot over ``below`` wants as owners; None where it wants none changed.

    Raises `InvalidInput` that names the label. A client whose containerd does not know that we map copies and maps
    the whole image itself, and sends the labels none the less: what it copied is left as it is.
    """
    if REF in labels or (below is not None and MAPPED in below.labels):
        return None
    texts = {name: labels[name] for name in (UIDS, GIDS) if labels.get(name)}
    if not texts:
        return None
    maps = []
    for name in (UIDS, GIDS):
        if name not in texts:
            raise InvalidInput(f"label {name} is missing: its twin is there")
        try:
            maps.append(parse_id_map(texts[name]))
        except InvalidInput as error:
            raise InvalidInput(f"label {name}: {error}") from error
    return Owners(*maps)


def is_remapped(name: str, key: str) -> bool:
    """Is this commit that of a copy which containerd made of an image to give its files other owners?

    It prepares ``<x>-remap`` and commits it as ``<x>``.
    """
    return client_part(key) == client_part(name) + "-remap"


def client_part(key: str) -> str:
    """A key or name as containerd's client said it: without ``<namespace>/<number>/``."""
    _, _, rest = key.partition("/")
    number, slash, own = rest.partition("/")
    return own if slash and number.isdigit() else key


def mapped_places(snapshots: Path) -> dict[int, list[str]]:
    """The number of a container's snapshot → the names of the mapped layers that are kept for it."""
    found: dict[int, list[str]] = {}
    try:
        with os.scandir(snapshots) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    found.setdefault(int(match[2]), []).append(entry.name)
    except OSError as error:
        raise error_of(error, str(snapshots)) from error
    return found


def active_usage(container: Snapshot, layers: Sequence[Snapshot], places: Places) -> tuple[int, int]:
    """Bytes and inodes of an active snapshot: its own files, and the copies of ``layers`` made for it alone."""
    found = [disk_usage(places.upper(container.id))]
    found += filter(None, (copied(places.snapshots / name_of(layer, container)) for layer in layers))
    return sum(size for size, _ in found), sum(inodes for _, inodes in found)


# --- having them


class MappedLayers:
    """Has layers with other owners. Used from one event loop."""

    def __init__(self, bus: Bus, places: Places) -> None:
        self._bus = bus
        self._places = places
        self._alone = Turns()

    async def have(self, snapshot: Snapshot, parents: Sequence[Snapshot]) -> bool:
        """Have every layer of ``parents`` (nearest first, all here) as the container of ``snapshot`` is to see it.

        False where it wants no owners changed. Raises `InvalidInput` for labels that are wrong, `Unavailable` where
        the mounter is away, `LimitExceeded` where the disk is full.
        """
        owners = owners_of(snapshot.labels, parents[0] if parents else None)
        if owners is None:
            return False
        async with self._alone.hold(snapshot.id):
            try:
                async with asyncio.timeout(SHOW_TIMEOUT):
                    await self._lazy(snapshot, parents, owners)
            except TimeoutError as error:
                raise DeadlineExceeded(f"layers were not shown with other owners in {SHOW_TIMEOUT:.0f} s") from error
            for parent in parents:
                if not is_lazy(parent):
                    await self._local(snapshot, parent, owners)
        return True

    async def _lazy(self, snapshot: Snapshot, parents: Sequence[Snapshot], owners: Owners) -> None:
        names = {name_of(parent, snapshot): place for place, parent in enumerate(parents) if is_lazy(parent)}
        if not names:
            return
        try:
            answer = await self._bus.ask(CheckMounts(tuple(names)), timeout=SHOW_TIMEOUT)
            for name, place in names.items():
                if name not in answer.alive:
                    await self._show(name, parents[place], parents[place + 1 :], owners)
        except SociError as error:
            raise Unavailable(f"lazy layers cannot be shown with other owners: {error}") from error

    async def _show(self, name: str, layer: Snapshot, below: Sequence[Snapshot], owners: Owners) -> None:
        labels = read_remote_labels(layer.labels)
        ask = MountLayer(
            name,
            labels.image,
            labels.layer,
            parse_digest(layer.labels.get(ZTOC, "")),
            tuple(str(self._places.contents(one)) for one in below),
            owners.uids.extents,
            owners.gids.extents,
            user_xattrs=userxattr.needed(),
        )
        place = self._places.snapshots / name
        await asyncio.to_thread(_mark, place)  # on disk before it is shown: whoever cleans up looks here
        shown = await self._bus.ask(ask, timeout=SHOW_TIMEOUT)
        if Path(shown.path) != self._places.mounts / name:
            raise FailedPrecondition(f"the mounter shows {shown.path}, not {self._places.mounts / name}")

    async def _local(self, snapshot: Snapshot, layer: Snapshot, owners: Owners) -> None:
        source = self._places.snapshots / str(layer.id)
        place = self._places.snapshots / name_of(layer, snapshot)
        await in_stoppable_thread(lambda stopped: have_local(source, place, owners, stopped))


def name_of(layer: Snapshot, container: Snapshot) -> str:
    """How the layer is called, as that container sees it."""
    return f"{layer.id}_{container.id}"


def _mark(place: Path) -> None:
    try:
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise error_of(error, f"snapshot directory {place}") from error
    mark_shown(place)
