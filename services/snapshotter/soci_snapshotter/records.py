# SPDX-License-Identifier: Apache-2.0
"""``python -m soci_snapshotter.records``: a node's snapshots as lines of JSON, for people's tools such as ``soci``.

It works on the database itself, whether or not the service runs beside it.

    ls       a line a snapshot
    log      a line an event, the oldest first
    rebuild  a line a row that was wrong, and a last line that tells how many events were folded
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from soci.errors import NotFound, SociError
from soci_runtime.config import Config
from soci_snapshotter.labels import HAS_INDEX, REMOTE
from soci_snapshotter.state import Change, Snapshot
from soci_snapshotter.store import Row, SnapshotStore
from soci_snapshotter.usage import lazy_usage

DATABASE = "snapshotter/metadata.db"
"""Below the service's root."""
BATCH = 1000
"""Events read at a time."""


def mode_of(snapshot: Snapshot) -> str:
    """How a committed snapshot came: ``lazy`` and ``whole`` by us, ``local`` by a client; empty for the others."""
    if snapshot.kind != "committed":
        return ""
    if REMOTE in snapshot.labels:
        return "lazy"
    return "whole" if HAS_INDEX in snapshot.labels else "local"


def listed(store: SnapshotStore, cache: Path) -> Iterator[dict[str, Any]]:
    """Every snapshot, the oldest first; of a lazy one the size is what the span cache holds of it now."""
    for snapshot in store.all():
        line = {**asdict(snapshot), "mode": mode_of(snapshot)}
        if line["mode"] == "lazy":
            line["size"], line["inodes"] = lazy_usage(cache, snapshot.labels)
        yield line


def logged(store: SnapshotStore, name: str, last: int | None) -> Iterable[dict[str, Any]]:
    """The ``last`` events (None: all), of the snapshots that have, or had, that name or key (empty: of all)."""
    ids = {change.id for _, _, change in _events(store) if change.name == name} if name else set()
    lines = (
        {"seq": seq, "at_ns": at_ns, **asdict(change)}
        for seq, at_ns, change in _events(store)
        if not name or change.id in ids
    )
    return lines if last is None else deque(lines, last)


def _events(store: SnapshotStore) -> Iterator[tuple[int, int, Change]]:
    after = 0
    while batch := store.events(after, BATCH):
        yield from batch
        after = batch[-1][0]


def rebuilt(store: SnapshotStore) -> Iterator[dict[str, Any]]:
    """Rebuild the table; what was wrong in it, and the sum."""
    done = store.rebuild()
    for was, now in done.wrong:
        yield {"was": _columns(was), "now": _columns(now)}
    yield {"events": done.events, "wrong": len(done.wrong)}


def _columns(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    names = ("id", "name", "kind", "parent", "labels", "created_ns", "updated_ns", "size", "inodes")
    return dict(zip(names, row, strict=True))


@click.group()
@click.option("--root", required=True, type=click.Path(path_type=Path), help="folder of all state")
@click.pass_context
def main(context: click.Context, root: Path) -> None:
    """Print what the database of a node's snapshots holds, a JSON value a line."""
    context.obj = root


@main.command("ls")
@click.pass_obj
def ls_command(root: Path) -> None:
    """Print the snapshots."""
    _print(root, lambda store: listed(store, Config(root=root).cache))


@main.command("log")
@click.option("--name", default="", help="only of snapshots that have or had this name or key")
@click.option("--last", type=click.IntRange(1), help="only the last so many events")
@click.pass_obj
def log_command(root: Path, name: str, last: int | None) -> None:
    """Print what happened."""
    _print(root, lambda store: logged(store, name, last))


@main.command("rebuild")
@click.pass_obj
def rebuild_command(root: Path) -> None:
    """Fold the log anew into the table."""
    _print(root, rebuilt, read_only=False)


def _print(root: Path, lines: Callable[[SnapshotStore], Iterable[dict[str, Any]]], *, read_only: bool = True) -> None:
    path = root / DATABASE
    try:
        if not path.exists():
            raise NotFound(f"there are no snapshots: {path} is not there")
        with closing(SnapshotStore(path, read_only=read_only)) as store:
            for line in lines(store):
                click.echo(json.dumps(line))
    except (SociError, OSError) as error:
        click.echo(str(error), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
