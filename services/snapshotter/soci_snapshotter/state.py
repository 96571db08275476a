# SPDX-License-Identifier: Apache-2.0
"""Snapshots as values, and what each call may do to them. Pure: rows in, an event or an error out.

The rules are containerd's metadata store's: see docs/snapshots.md for the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound

Kind = Literal["active", "view", "committed"]

NAME_LIMIT = 32_768
"""Bytes of a key, a name or a parent: what the keys of containerd's own store can hold."""
LABEL_LIMIT = 4096
"""Bytes of a label's key and value together (containerd's own limit)."""
LABELS_LIMIT = 1024
"""Labels of one snapshot: with `LABEL_LIMIT`, a snapshot fits in a message of containerd's."""


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
    check_name(key, "key")
    if parent and below is None:
        raise NotFound(f"parent snapshot {parent!r} is not there")
    if below and below.kind != "committed":
        raise InvalidInput(f"parent {parent!r} is {below.kind}, not committed")
    if taken:
        raise AlreadyExists(f"snapshot {key!r} exists already")
    return Change("prepared", 0, key, kind, parent, checked_labels(labels))


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
    check_name(name, "name")
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
    return Change(
        "committed", active.id, name, "committed", active.parent or parent, checked_labels(labels), size, inodes
    )


def decide_remove(key: str, *, found: Snapshot | None, children: int) -> Change:
    """The snapshot goes, if nothing lies on it."""
    if found is None:
        raise NotFound(f"snapshot {key!r} is not there")
    if children:
        raise FailedPrecondition(f"cannot remove snapshot with child: {key!r} has {children}")
    return Change("removed", found.id, found.name, found.kind, found.parent)


def decide_update(
    name: str,
    labels: Mapping[str, str],
    paths: Sequence[str],
    *,
    found: Snapshot | None,
    kept: Collection[str] = (),
) -> Change:
    """New labels: all of them (no paths, or ``labels``), or single ones (``labels.<key>``; no value takes it away).

    Labels named in ``kept`` stay as they are, whatever the call says of all labels; to name one of them is an error.
    """
    if found is None:
        raise NotFound(f"snapshot {name!r} is not there")
    whole = not paths or "labels" in paths
    wanted = {key: value for key, value in labels.items() if key not in kept} if whole else dict(found.labels)
    for path in paths:
        if path == "labels":
            continue
        key = path.removeprefix("labels.")
        if key == path or not key:
            raise InvalidInput(f"field {path[:200]!r} of a snapshot cannot be updated; only labels can")
        if key in kept:
            raise InvalidInput(f"label {key!r} is the snapshotter's own")
        wanted[key] = labels.get(key, "")
    wanted |= {key: value for key, value in found.labels.items() if key in kept}
    wanted = checked_labels(wanted)
    return Change("relabelled", found.id, found.name, found.kind, found.parent, wanted, found.size, found.inodes)


def check_name(text: str, what: str) -> None:
    """`InvalidInput` for what cannot be a key or name."""
    if not text:
        raise InvalidInput(f"a snapshot needs a {what}")
    if len(text.encode()) > NAME_LIMIT:
        raise InvalidInput(f"{what} {text[:80]!r}… of {len(text.encode())} bytes; {NAME_LIMIT} are allowed")


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that are kept of these: those without a value are none, as containerd has it."""
    if len(labels) > LABELS_LIMIT:
        raise InvalidInput(f"{len(labels)} labels; {LABELS_LIMIT} are allowed")
    for key, value in labels.items():
        size = len(key.encode()) + len(value.encode())
        if size > LABEL_LIMIT:
            raise InvalidInput(f"label {key[:80]!r} of {size} bytes with its value; {LABEL_LIMIT} are allowed")
    return {key: value for key, value in labels.items() if key and value}


def fold(before: Snapshot | None, change: Change, at_ns: int) -> Snapshot | None:
    """The snapshot after ``change``; None once it is removed. This alone says what the log means."""
    if change.what == "removed":
        return None
    created_ns = before.created_ns if before and change.what == "relabelled" else at_ns  # a commit begins anew
    return Snapshot(
        change.id,
        change.name,
        change.kind,
        change.parent,
        change.labels,
        created_ns,
        at_ns,
        change.size,
        change.inodes,
    )
