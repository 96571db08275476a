# SPDX-License-Identifier: Apache-2.0
"""``soci cache``: what this node's span cache holds, whether it is what it was, and freeing what nobody needs.

``ls`` and ``verify`` look at the files below ``--root`` themselves; what is in use is the snapshotter's to say, and
freeing is the fetcher's to do.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import click

from soci.digest import Digest
from soci.errors import NotFound, SociError, Unavailable
from soci_bus.asks import CacheFreed, FreeCache
from soci_bus.in_use import layers_in_use
from soci_bus.nats import connect
from soci_cache.check import Checked, check
from soci_cache.presence import AHEAD, FILLED, NEEDED
from soci_cache.survey import Held, Key, survey
from soci_cli.border import FAILED, run_command
from soci_cli.progress import warn
from soci_cli.tables import ago, indented, table
from soci_cli.values import Globals, human_bytes

CONNECT_SECONDS: Final = 5.0
"""How long the bus may take to answer at first."""
FREE_SECONDS: Final = 120.0
"""How long freeing may take."""
HEADERS: Final = ("LAYER", "ZTOC", "SIZE", "SPANS", "STATE", "IN USE", "LAST USE")
SHORT: Final = len("sha256:") + 12
"""Characters of a digest in a table; ``--json`` and ``--quiet`` have all of it."""


@click.group("cache")
def command() -> None:
    """See, check and free this node's span cache."""


def layers(root: Path) -> list[Held]:
    """The layers that the cache below ``root`` holds. Raises `Unavailable`."""
    try:
        return survey(root / "cache")
    except OSError as error:
        raise Unavailable(f"{root / 'cache'}: {error.strerror}") from error


async def _in_use(flags: Globals) -> frozenset[Key]:
    async with connect(flags.nats_url, node=flags.node, name="soci", wait=CONNECT_SECONDS) as bus:
        return frozenset((one.layer, one.ztoc) for one in await layers_in_use(bus))


def in_use(flags: Globals) -> frozenset[Key] | None:
    """What the snapshotter says is in use; None, and a warning, where it does not answer."""
    try:
        return run_command(lambda: _in_use(flags), flags)
    except SociError as error:
        warn(f"which layers are in use is not known: {error}")
        return None


async def _free(flags: Globals, ask: FreeCache) -> CacheFreed:
    async with connect(flags.nats_url, node=flags.node, name="soci", wait=CONNECT_SECONDS) as bus:
        return await bus.ask(ask, timeout=FREE_SECONDS)


@command.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Print the layers' digests only.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def ls_command(flags: Globals, *, quiet: bool, json_output: bool) -> None:
    """List the layers in the cache below --root: size on the disk, spans here of all, state.

    \b
    lazy       parts of it are here
    filling    it is being filled in the background, or proven
    complete   all of it is here, and is what its image promises
    unproven   all of it is here; no image said what it should be
    rejected   all of it is here, and is something else: it is not served
    unchecked  nobody opened it since the machine's boot
    """  # noqa: D301  click's sign against wrapping
    found = layers(flags.root)
    if quiet:
        for layer in dict.fromkeys(one.layer for one in found):
            print(layer)
        return
    used = in_use(flags)
    if json_output:
        print(indented([as_json(one, used) for one in found]))
    else:
        now = time.time_ns()
        print(table(HEADERS, [_cells(one, used, now) for one in found]))


command.add_command(ls_command, "list")


@command.command("info")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def info_command(flags: Globals, *, json_output: bool) -> None:
    """Show what the cache below --root takes, of which budget, and what could be freed."""
    found, used = layers(flags.root), in_use(flags)
    free: CacheFreed | None = None
    try:
        free = run_command(lambda: _free(flags, FreeCache(at_once=True, dry_run=True)), flags)
    except SociError as error:
        warn(f"no fetcher says what the budget is: {error}")
    facts = totals(flags.root, found, used, free)
    if json_output:
        print(indented(facts))
        return
    spans, states = facts["spans"], facts["states"]
    print(f"cache     {facts['path']}")
    print(f"layers    {facts['layers']}, {'?' if used is None else facts['in_use']} in use")
    print(f"states    {', '.join(f'{count} {state}' for state, count in states.items()) or '-'}")
    print(f"spans     {spans['here']} of {spans['all']}: " + ", ".join(f"{spans[why]} {why}" for why in _WHY.values()))
    print(f"used      {human_bytes(facts['used'])}")
    print(f"budget    {human_bytes(free.budget) if free else '?'}")
    freeable = f"{human_bytes(free.freed)} ({len(free.layers)} layers, {free.spans} spans)" if free else "?"
    print(f"freeable  {freeable}")


@command.command("verify")
@click.argument("digests", nargs=-1, metavar="[LAYER]...")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def verify_command(flags: Globals, digests: Sequence[str], *, json_output: bool) -> int:
    """Digest every span that is here, of all layers or of each LAYER (a digest, or the beginning of one).

    Spans that are not what was filled are taken away, to be fetched again, and named; the exit status is 1 then.
    Services may run meanwhile.
    """
    found = chosen(layers(flags.root), digests)
    lines: list[dict[str, Any]] = []
    for one in found:
        outcome = _checked(flags, one.key)
        lines.append(outcome)
        if not json_output and (outcome["wrong"] or outcome["error"]):
            print(_verdict(outcome))
    wrong = sum(len(line["wrong"]) for line in lines)
    failed = sum(bool(line["error"]) for line in lines)
    if json_output:
        print(indented(lines))
    else:
        looked = sum(line["spans"] for line in lines)
        said = f"{wrong} were damaged and are taken away" if wrong else "all as they were filled"
        print(f"{len(lines)} layers, {looked} spans: {said}", file=sys.stderr)
    return FAILED if wrong or failed else 0


@command.command("gc")
@click.option("--all", "at_once", is_flag=True, help="Free unused layers at once, however new they are.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be freed.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def gc_command(flags: Globals, *, at_once: bool, dry_run: bool, json_output: bool) -> int:
    """Have a fetcher free what no snapshot uses, and what is above the budget."""
    done = run_command(lambda: _free(flags, FreeCache(at_once=at_once, dry_run=dry_run)), flags)
    if json_output:
        gone = [{"layer": layer, "ztoc": ztoc} for layer, ztoc in done.layers]
        facts = {"layers": gone, "spans": done.spans, "freed": done.freed, "used": done.used, "budget": done.budget}
        print(indented({**facts, "dry_run": dry_run, "incomplete": done.incomplete}))
    else:
        for layer, _ in done.layers:
            print(layer)
        verb = "would be freed" if dry_run else "freed"
        said = f"{human_bytes(done.freed)} {verb}: {len(done.layers)} layers, and {done.spans} spans of others"
        print(f"{said}; {human_bytes(done.used)} of {human_bytes(done.budget)} are used", file=sys.stderr)
    if done.incomplete:
        warn(f"not everything was freed: {done.incomplete}")
        return FAILED
    return 0


_WHY: Final = {NEEDED: "needed", AHEAD: "ahead", FILLED: "filled"}


def as_json(one: Held, used: Collection[Key] | None) -> dict[str, Any]:
    """A layer as plain data."""
    return {
        "layer": one.layer,
        "ztoc": one.ztoc,
        "size": one.size,
        "spans": one.spans if one.known else None,
        "here": one.here if one.known else None,
        **{why: one.counts[mark] for mark, why in _WHY.items()},
        "state": one.state,
        "in_use": None if used is None else one.key in used,
        "used_at": int(one.used_at * 1e9),
    }


def totals(root: Path, found: Sequence[Held], used: Collection[Key] | None, free: CacheFreed | None) -> dict[str, Any]:
    """The sums of all layers as plain data."""
    states: dict[str, int] = {}
    for one in found:
        states[one.state] = states.get(one.state, 0) + 1
    spans = {"all": sum(one.spans for one in found), "here": sum(one.here for one in found)}
    spans |= {why: sum(one.counts[mark] for one in found) for mark, why in _WHY.items()}
    return {
        "path": str(root / "cache"),
        "layers": len(found),
        "in_use": None if used is None else sum(one.key in used for one in found),
        "states": states,
        "spans": spans,
        "used": sum(one.size for one in found),
        "budget": free.budget if free else None,
        "freeable": free.freed if free else None,
    }


def chosen(found: Sequence[Held], wanted: Sequence[str]) -> list[Held]:
    """The layers whose digests begin so; all where nothing is wanted. `NotFound` names what none begins with."""
    if not wanted:
        return list(found)
    for text in wanted:
        if not text or not any(_begins(one.layer, text) for one in found):
            raise NotFound(f"no layer in the cache begins with {text[:100]!r}: `soci cache ls` lists them")
    return [one for one in found if any(_begins(one.layer, text) for text in wanted)]


def _begins(layer: Digest, text: str) -> bool:
    return layer.startswith(text) or layer.partition(":")[2].startswith(text)


def _checked(flags: Globals, key: Key) -> dict[str, Any]:
    """What a check of one layer came to; it ends with ``--timeout``, and is stopped by signals."""
    stop = False

    async def work() -> Checked:
        nonlocal stop
        try:
            return await asyncio.to_thread(check, flags.root / "cache", key, lambda: stop)
        finally:
            stop = True

    line: dict[str, Any] = {"layer": key[0], "ztoc": key[1], "spans": 0, "wrong": [], "error": ""}
    try:
        done = run_command(work, flags)
    except NotFound:  # it was freed meanwhile
        return line
    except SociError as error:
        return {**line, "error": str(error)}
    return {**line, "spans": done.spans, "wrong": list(done.wrong)}


def _verdict(line: dict[str, Any]) -> str:
    if line["error"]:
        return f"{line['layer']} cannot be checked: {line['error']}"
    return f"{line['layer']} zTOC {line['ztoc']}: damaged spans {', '.join(map(str, line['wrong']))}"


def _cells(one: Held, used: Collection[Key] | None, now: int) -> tuple[str, ...]:
    spans = f"{one.here}/{one.spans}" if one.known else "?"
    use = "?" if used is None else "yes" if one.key in used else "no"
    age = ago(int(one.used_at * 1e9), now)
    return one.layer[:SHORT], one.ztoc[:SHORT], human_bytes(one.size), spans, one.state, use, age
