# SPDX-License-Identifier: Apache-2.0
"""Snapshots as values, and what each call may do to them. Pure: rows in, an event or an error out.

The rules are containerd's metadata store's: see docs/snapshots.md for the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound

Kind = Literal["active", "view", "committed"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. ``name`` is the key of an active one or a view, the name of a committed one."""

    id: int
    name: str
    kind: Kind
    parent: str
    labels: Mapping[str, str]
    created_ns: int
    updated_ns: int
    size: int = 0
    inodes: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the log. ``what`` is prepared, committed, removed or relabelled; ``id`` 0 is given by the store."""

    what: Literal["prepared", "committed", "removed", "relabelled"]
    id: int
    name: str
    kind: Kind = "active"
    parent: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    inodes: int = 0


def decide_prepare(  # noqa: PLR0913  the call's own fields
    key: str, parent: str, kind: Kind, labels: Mapping[str, str], *, taken: Snapshot | None, below: Snapshot | None
) -> Change:
    """A new active snapshot or view. ``taken``: who has the key; ``below``: who is called ``parent``."""
    if not key:
        raise InvalidInput("a snapshot needs a key")
    if taken:
        raise AlreadyExists(f"snapshot {key!r} exists already")
    if parent and below is None:
        raise NotFound(f"parent snapshot {parent!r} is not there")
    if below and below.kind != "committed":
        raise InvalidInput(f"parent {parent!r} is {below.kind}, not committed")
    return Change("prepared", 0, key, kind, parent, dict(labels))


def decide_commit(  # noqa: PLR0913  these are the call's own fields
    name: str,
    key: str,
    labels: Mapping[str, str],
    *,
    active: Snapshot | None,
    taken: Snapshot | None,
    parent: str = "",
    below: Snapshot | None = None,
    size: int = 0,
    inodes: int = 0,
) -> Change:
    """The active snapshot ``key`` becomes ``name``. A ``parent`` given only now rebases one that has none."""
    if not name:
        raise InvalidInput("a committed snapshot needs a name")
    if taken:
        raise AlreadyExists(f"snapshot {name!r} exists already")
    if active is None:
        raise NotFound(f"snapshot {key!r} is not there")
    if active.kind != "active":
        raise FailedPrecondition(f"snapshot {key!r} is {active.kind}, not active")
    if parent and active.parent and parent != active.parent:
        raise InvalidInput(f"snapshot {key!r} lies on {active.parent!r}, not on {parent!r}")
    if parent and not active.parent:
        if below is None:
            raise NotFound(f"parent snapshot {parent!r} is not there")
        if below.kind != "committed":
            raise FailedPrecondition(f"parent {parent!r} is {below.kind}, not committed")
    return Change("committed", active.id, name, "committed", active.parent or parent, dict(labels), size, inodes)


def decide_remove(key: str, *, found: Snapshot | None, children: int) -> Change:
    """The snapshot goes, if nothing lies on it."""
    if found is None:
        raise NotFound(f"snapshot {key!r} is not there")
    if children:
        raise FailedPrecondition(f"cannot remove snapshot with child: {key!r} has {children}")
    return Change("removed", found.id, found.name, found.kind, found.parent)


def decide_update(name: str, labels: Mapping[str, str], paths: Sequence[str], *, found: Snapshot | None) -> Change:
    """New labels: all of them (no paths, or ``labels``), or single ones (``labels.<key>``)."""
    if found is None:
        raise NotFound(f"snapshot {name!r} is not there")
    wanted = dict(labels if not paths or "labels" in paths else found.labels)
    for path in paths:
        if path == "labels":
            continue
        key = path.removeprefix("labels.")
        if key == path or not key:
            raise InvalidInput(f"field {path!r} of a snapshot cannot be updated; only labels can")
        wanted[key] = labels.get(key, "")
    return Change("relabelled", found.id, found.name, found.kind, found.parent, wanted, found.size, found.inodes)


def fold(before: Snapshot | None, change: Change, at_ns: int) -> Snapshot | None:
    """The snapshot after ``change``; None once it is removed. This alone says what the log means."""
    match change.what:
        case "prepared":
            return Snapshot(change.id, change.name, change.kind, change.parent, change.labels, at_ns, at_ns)
        case "committed":
            return Snapshot(
                change.id,
                change.name,
                "committed",
                change.parent,
                change.labels,
                at_ns,
                at_ns,
                change.size,
                change.inodes,
            )
        case "relabelled":
            created = before.created_ns if before else at_ns
            return Snapshot(
                change.id,
                change.name,
                change.kind,
                change.parent,
                change.labels,
                created,
                at_ns,
                change.size,
                change.inodes,
            )
        case "removed":
            return None
