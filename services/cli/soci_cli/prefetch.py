# SPDX-License-Identifier: Apache-2.0
"""``soci prefetch``: the prefetch lists that were made on this machine."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from soci.digest import Digest
from soci.errors import SociError
from soci_cli.artifact_words import read_artifact, rfc3339
from soci_cli.border import run_command
from soci_cli.groups import AliasedGroup
from soci_cli.local import artifacts_of, opened_store
from soci_cli.tables import ago, indented, table
from soci_cli.values import Globals
from soci_indexing.artifacts import PREFETCH, Artifact
from soci_indexing.prefetch import MAX_PREFETCH_BYTES, SpanRange, parse_prefetch

HEADERS: Final = ("DIGEST", "LAYER DIGEST", "SPANS", "CREATED")

Listed = tuple[Artifact, tuple[SpanRange, ...]]


@click.group("prefetch", cls=AliasedGroup, aliases={"ls": "list"})
def command() -> None:
    """List and show prefetch lists."""


def count_spans(ranges: tuple[SpanRange, ...]) -> int:
    """Spans in all ranges."""
    return sum(one.end - one.start + 1 for one in ranges)


async def _listed(flags: Globals) -> list[Listed]:
    """Every list of the database; one that cannot be read has no ranges."""
    found: list[Listed] = []
    async with opened_store(flags) as store:
        for one in artifacts_of(flags).all(PREFETCH):
            try:
                ranges = parse_prefetch(await store.read(one.digest, limit=MAX_PREFETCH_BYTES))
            except SociError:
                ranges = ()
            found.append((one, ranges))
    return found


@command.command("list")
@click.option("--quiet", "-q", is_flag=True, help="Print only digests.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_command(flags: Globals, *, quiet: bool, json_output: bool) -> None:
    """List the prefetch lists made here, newest first."""
    found = run_command(lambda: _listed(flags), flags)
    if json_output:
        print(indented([as_json(*one) for one in found]))
    elif quiet:
        for digest in dict.fromkeys(one.digest for one, _ in found):
            print(digest)
    else:
        now = time.time_ns()
        rows = [
            (one.digest, one.original_digest, str(count_spans(ranges)) if ranges else "n/a", ago(one.created_at, now))
            for one, ranges in found
        ]
        print(table(HEADERS, rows))


def as_json(one: Artifact, ranges: tuple[SpanRange, ...]) -> dict[str, Any]:
    """A row for ``--json``."""
    return {
        "digest": one.digest,
        "size": one.size,
        "layer_digest": one.original_digest,
        "spans": count_spans(ranges) if ranges else None,
        "created_at": rfc3339(one.created_at),
    }


@command.command("info")
@click.argument("digest")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def info_command(flags: Globals, digest: str, *, json_output: bool) -> None:
    """Show the prefetch list DIGEST."""

    async def work() -> tuple[Digest, bytes, list[Digest]]:
        db = artifacts_of(flags)
        async with opened_store(flags) as store:
            found, content, _ = await read_artifact(db, store, digest, PREFETCH, MAX_PREFETCH_BYTES)
        layers = [one.original_digest for one in db.all(PREFETCH) if one.digest == found]
        return found, content, layers

    found, content, layers = run_command(work, flags)
    ranges = parse_prefetch(content)
    if json_output:
        print(indented(info_json(found, len(content), layers, ranges)))
        return
    print(f"prefetch list  {found}")
    print(f"size           {len(content)} bytes")
    for layer in layers:
        print(f"layer          {layer}")
    for one in ranges:
        urgency = f"  (priority {one.priority})" if one.priority else ""
        print(f"spans          {one.start}-{one.end}{urgency}")
    print(f"total          {count_spans(ranges)} spans in {len(ranges)} ranges")


def info_json(digest: Digest, size: int, layers: list[Digest], ranges: tuple[SpanRange, ...]) -> dict[str, Any]:
    """``soci prefetch info --json``."""
    return {
        "digest": digest,
        "size": size,
        "layer_digests": layers,
        "ranges": [{"start_span": one.start, "end_span": one.end, "priority": one.priority} for one in ranges],
        "total_spans": count_spans(ranges),
    }
