# SPDX-License-Identifier: Apache-2.0
"""``soci launch``: launches as their events tell them."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any, Final

import click

from soci.errors import InvalidInput, NotFound
from soci_bus.events import LaunchStarted
from soci_bus.face import Bus
from soci_bus.launches import LaunchView, fold_launch
from soci_bus.nats import connect
from soci_cli.border import run_command
from soci_cli.values import Globals, human_bytes

CONNECT_SECONDS: Final = 5.0
"""How long the bus may take to answer at first."""
SHOWN: Final = 20
"""Launches that ``ls`` shows unless told otherwise."""
SLOWEST: Final = 10
"""Misses that ``show`` lists unless told otherwise."""


@click.group("launch")
def command() -> None:
    """See how images were launched."""


async def recent(bus: Bus, most: int) -> list[LaunchView]:
    """The newest launches, newest first."""
    started = [e async for e in bus.history("launch", happened="started") if isinstance(e.event, LaunchStarted)]
    ids = list(dict.fromkeys(envelope.event.id for envelope in reversed(started)))[:most]
    views = [fold_launch(launch, [e async for e in bus.history(id=launch)]) for launch in ids]
    return [view for view in views if view]


async def one(bus: Bus, prefix: str) -> LaunchView:
    """The launch whose id begins with ``prefix``; `NotFound` or `InvalidInput` where it is none or several."""
    if not prefix or not all(c in "0123456789abcdef" for c in prefix):
        raise InvalidInput(f"not a launch id, or the beginning of one: {prefix[:64]!r}")
    history = [e async for e in bus.history("launch", happened="started")]
    ids = {e.event.id for e in history if e.event.id.startswith(prefix)}
    if len(ids) > 1:
        raise InvalidInput(f"{len(ids)} launches begin with {prefix!r}: give more of the id")
    if not ids:
        raise NotFound(f"no launch begins with {prefix!r}: `soci launch ls` lists them")
    (launch,) = ids
    view = fold_launch(launch, [e async for e in bus.history(id=launch)])
    if view is None:
        raise NotFound(f"launch {launch} has no events any more")
    return view


@command.command("ls")
@click.option("--number", "-n", default=SHOWN, show_default=True, type=click.IntRange(1, 1000), help="How many.")
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
@click.option("--json", "json_output", is_flag=True, help="Print as JSON.")
@click.pass_obj
def ls_command(flags: Globals, number: int, *, quiet: bool, json_output: bool) -> None:
    """List launches, newest first."""

    async def work() -> list[LaunchView]:
        async with connect(flags.nats_url, node=flags.node, name="soci", wait=CONNECT_SECONDS) as bus:
            return await recent(bus, number)

    views = run_command(work, flags)
    if json_output:
        print(json.dumps([as_json(view, misses=False) for view in views], indent=2))
    elif quiet:
        print("\n".join(view.id for view in views))
    elif not views:
        print("no launch yet: `soci run IMAGE` makes one", file=sys.stderr)
    else:
        _print_list(views)


command.add_command(ls_command, "list")


@command.command("show")
@click.argument("launch")
@click.option("--misses", default=SLOWEST, show_default=True, type=click.IntRange(0), help="Slowest misses to list.")
@click.option("--json", "json_output", is_flag=True, help="Print everything as JSON.")
@click.pass_obj
def show_command(flags: Globals, launch: str, misses: int, *, json_output: bool) -> None:
    """Show one LAUNCH (its id, or the beginning of it): how each layer came and why, and what reads waited for."""

    async def work() -> LaunchView:
        async with connect(flags.nats_url, node=flags.node, name="soci", wait=CONNECT_SECONDS) as bus:
            return await one(bus, launch)

    view = run_command(work, flags)
    if json_output:
        print(json.dumps(as_json(view, misses=True), indent=2))
    else:
        _print_launch(view, misses)


def as_json(view: LaunchView, *, misses: bool) -> dict[str, Any]:
    """The view as plain data."""
    data = asdict(view)
    if not misses:
        del data["misses"]
    return data


def _age(started_ns: int) -> str:
    seconds = int(time.time() - started_ns / 1e9)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{max(seconds, 0)}s ago"


def _layers(view: LaunchView) -> str:
    return ", ".join(f"{view.count(mode)} {mode}" for mode in ("lazy", "whole", "defer") if view.count(mode))


def _table(*columns: str, right: tuple[str, ...] = ()) -> Any:
    from rich.table import Table  # noqa: PLC0415  68 ms that --json and --quiet need not pay

    table = Table(box=None, pad_edge=False, header_style="")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _print(table: Any) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _print_list(views: list[LaunchView]) -> None:
    table = _table("LAUNCH", "IMAGE", "BY", "STARTED", "LAYERS", "FETCHED", "REQUESTS", "MISSES", "WAITED")
    for view in views:
        started, waited = _age(view.started_ns), f"{view.waited:.2f} s"
        moved = (human_bytes(view.fetched_bytes), str(view.requests), str(view.miss_count))
        table.add_row(view.id[:12], view.image, view.by, started, _layers(view), *moved, waited)
    _print(table)


def _print_launch(view: LaunchView, most: int) -> None:
    print(f"launch    {view.id}")
    print(f"image     {view.image}")
    print(f"manifest  {view.manifest}")
    print(f"node      {view.node}, namespace {view.namespace}, begun by a {view.by}, {_age(view.started_ns)}")
    print(f"index     {f'{view.index} ({view.found_by})' if view.index else f'none: {view.no_index}'}")
    container = f"{view.container_at:.2f} s after the start" if view.container_at is not None else "none yet"
    print(f"container {container}")
    print(
        f"fetched   {human_bytes(view.fetched_bytes)} in {view.requests} requests; "
        f"{view.miss_count} reads waited, {view.waited:.2f} s in all, {view.failed_reads} failed"
    )
    if view.rejected_spans:
        print(f"rejected  {view.rejected_spans} spans that did not match their digests")
    for failure in view.failures[:SLOWEST]:
        print(f"failed    {failure}")
    print()
    table = _table("LAYER", "MODE", "SIZE", "FETCHED", "MISSES", "WHY")
    for layer in view.layers:
        size = human_bytes(layer.size) if layer.size is not None else "?"
        table.add_row(
            layer.layer[:19], layer.mode, size, human_bytes(layer.fetched_bytes), str(layer.misses), layer.why
        )
    _print(table)
    slowest = sorted(view.misses, key=lambda miss: miss.seconds, reverse=True)[:most]
    if slowest:
        print(f"\nslowest of {view.miss_count} misses")
        table = _table("AT", "WAITED", "LAYER", "SPANS", "FILE")
        for miss in slowest:
            spans = f"{miss.first}-{miss.last}" if miss.last > miss.first else str(miss.first)
            file = miss.path + (f"  FAILED: {miss.failed}" if miss.failed else "")
            table.add_row(f"{miss.at:.2f} s", f"{miss.seconds * 1000:.0f} ms", miss.layer[:19], spans, file)
        _print(table)
