# SPDX-License-Identifier: Apache-2.0
"""``soci snapshots``: what this node's snapshotter holds, and the log that it is folded from.

The database is the snapshotter's own, and so is the program that reads it: it is run, not imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, Final

import click

from soci.errors import DeadlineExceeded, SociError
from soci_cli.artifact_words import rfc3339
from soci_cli.tables import ago, indented, table
from soci_cli.values import Globals, human_bytes

PROGRAM: Final = "soci_snapshotter.records"
HEADERS: Final = ("ID", "KIND", "MODE", "SIZE", "CREATED", "NAME", "PARENT")
LOG_HEADERS: Final = ("EVENT", "TIME", "ID", "WHAT", "NAME", "PARENT")
NAME_WIDTH: Final = 72
"""Characters of a name in a table; ``--json`` has all of it."""
SHOWN: Final = 50
"""Events that ``log`` shows unless told otherwise."""


@click.group("snapshots")
def command() -> None:
    """See this node's snapshots, and rebuild their table from the log."""


def records(flags: Globals, *words: str) -> list[dict[str, Any]]:
    """The lines of `soci_snapshotter.records` for these words. Raises `SociError` with what it says on failure."""
    command = [sys.executable, "-m", PROGRAM, "--root", str(flags.root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=flags.timeout or None)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"not done within --timeout {flags.timeout:g} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise SociError(said[-1] if said else f"{PROGRAM} ended with status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


@command.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Print names only.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def ls_command(flags: Globals, *, quiet: bool, json_output: bool) -> None:
    """List the snapshots below --root, oldest first: how each committed one came, and its size, which is what the span
    cache holds now where it is lazy, and as it was at the commit otherwise.
    """
    found = records(flags, "ls")
    if json_output:
        print(indented(found))
    elif quiet:
        for one in found:
            print(one["name"])
    else:
        now = time.time_ns()
        print(table(HEADERS, [_cells(one, now) for one in found]))


command.add_command(ls_command, "list")


@command.command("log")
@click.argument("name", default="")
@click.option("--number", "-n", default=SHOWN, show_default=True, type=click.IntRange(1), help="The last so many.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def log_command(flags: Globals, name: str, number: int, *, json_output: bool) -> None:
    """Show what happened, oldest first; with NAME, to the snapshots that have or had that name or key."""
    events = records(flags, "log", "--last", str(number), "--name", name)
    if json_output:
        print(indented(events))
    else:
        print(table(LOG_HEADERS, [_event_cells(one) for one in events]))


@command.command("rebuild")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def rebuild_command(flags: Globals, *, json_output: bool) -> None:
    """Fold the log anew into the table of snapshots, and tell what was wrong in it. The service may run meanwhile."""
    *wrong, total = records(flags, "rebuild")
    if json_output:
        print(indented({"events": total["events"], "wrong": wrong}))
        return
    for one in wrong:
        print(_mended(one["was"], one["now"]))
    state = "the table was right" if not wrong else f"{len(wrong)} rows of the table were wrong, and are mended"
    print(f"{total['events']} events folded: {state}", file=sys.stderr)


def _cells(one: dict[str, Any], now: int) -> tuple[str, ...]:
    mode, size = one["mode"] or "-", human_bytes(one["size"]) if one["kind"] == "committed" else "-"
    age, name, parent = ago(one["created_ns"], now), _short(one["name"]), _short(one["parent"])
    return (str(one["id"]), one["kind"], mode, size, age, name, parent)


def _event_cells(one: dict[str, Any]) -> tuple[str, ...]:
    at = rfc3339(one["at_ns"]) or "-"
    return (str(one["seq"]), at, str(one["id"]), one["what"], _short(one["name"]), _short(one["parent"]))


def _mended(was: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    if was is None or now is None:
        one, what = (now, "was missing") if was is None else (was, "should not have been there")
        return f"snapshot {one['id'] if one else 0} {_short(one['name'] if one else '')}: {what}"
    columns = ", ".join(f"{key} {was[key]!r} is now {now[key]!r}" for key in now if was[key] != now[key])
    return f"snapshot {now['id']} {_short(now['name'])}: {columns}"


def _short(text: str) -> str:
    """One line, no control characters, and short enough for a table."""
    line = "".join(char if char.isprintable() else "?" for char in text)
    return line if len(line) <= NAME_WIDTH else line[: NAME_WIDTH - 1] + "…"
