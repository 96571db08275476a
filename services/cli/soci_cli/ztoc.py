# SPDX-License-Identifier: Apache-2.0
"""``soci ztoc``: the zTOCs that were made on this machine, and files read by them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from soci.digest import Digest, parse_digest
from soci.errors import FailedPrecondition, NotFound, NoZtoc
from soci.ztoc import MAX_ZTOC_BYTES, TocEntry, Ztoc, parse_ztoc
from soci_cli.artifact_words import read_artifact, rfc3339
from soci_cli.border import run_command
from soci_cli.containerd_store import ContainerdStore
from soci_cli.groups import AliasedGroup
from soci_cli.local import artifacts_of, find_image, manifests_of, opened, opened_store
from soci_cli.tables import indented, table
from soci_cli.values import Globals
from soci_cli.ztoc_files import extract, facts_of, find_file
from soci_indexing.artifacts import ZTOC, Artifact

HEADERS: Final = ("DIGEST", "SIZE", "LAYER DIGEST")


@click.group("ztoc", cls=AliasedGroup, aliases={"ls": "list"})
def command() -> None:
    """List and show zTOCs, and read files by them."""


async def _listed(flags: Globals, digest: str, image: str) -> list[Artifact]:
    wanted = parse_digest(digest) if digest else None
    found = artifacts_of(flags).all(ZTOC)
    if image:
        async with opened(flags) as local:
            record = await find_image(local.client, image)
            manifests = await manifests_of(local.images, record, every=True, missing_is_fine=True)
        layers = {layer.digest for one in manifests for layer in one.manifest.layers}
        found = [one for one in found if one.original_digest in layers]
    return [one for one in found if wanted in (None, one.digest)]


@command.command("list")
@click.option("--ztoc-digest", default="", help="Only the zTOC with this digest.")
@click.option("--image-ref", default="", help="Only the zTOCs of this image's layers.")
@click.option("--quiet", "-q", is_flag=True, help="Print only digests.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_command(flags: Globals, ztoc_digest: str, image_ref: str, *, quiet: bool, json_output: bool) -> None:
    """List the zTOCs made here, newest first."""
    found = run_command(lambda: _listed(flags, ztoc_digest, image_ref), flags)
    if json_output:
        print(indented([as_json(one) for one in found]))
    elif quiet:
        for digest in dict.fromkeys(one.digest for one in found):
            print(digest)
    else:
        print(table(HEADERS, [(one.digest, str(one.size), one.original_digest) for one in found]))


def as_json(one: Artifact) -> dict[str, Any]:
    """A row for ``--json``."""
    return {
        "digest": one.digest,
        "size": one.size,
        "layer_digest": one.original_digest,
        "span_size": one.span_size,
        "created_at": rfc3339(one.created_at),
    }


@command.command("info")
@click.argument("digest")
@click.option("--json", "json_output", is_flag=True, help="Print JSON; it is printed anyway.")
@click.pass_obj
def info_command(flags: Globals, digest: str, *, json_output: bool) -> None:
    """Show the zTOC DIGEST as JSON."""
    del json_output

    async def work() -> dict[str, Any]:
        _, content, _ = await _read(flags, digest)
        return facts_of(parse_ztoc(content), len(content))

    print(indented(run_command(work, flags)))


async def _read(flags: Globals, text: str) -> tuple[Digest, bytes, Artifact | None]:
    async with opened_store(flags) as store:
        return await read_artifact(artifacts_of(flags), store, text, ZTOC, MAX_ZTOC_BYTES)


@command.command("get-file")
@click.argument("digest")
@click.argument("file")
@click.option("--output", "-o", type=click.Path(), help="Write to this file instead of stdout.")
@click.pass_obj
def get_command(flags: Globals, digest: str, file: str, output: str | None) -> None:
    """Print FILE of the layer that the zTOC DIGEST describes, and a line feed."""

    async def work() -> None:
        named, content, known = await _read(flags, digest)
        ztoc = parse_ztoc(content)
        entry = find_file(ztoc, file)
        if known is None:
            raise NoZtoc(f"nothing here says which layer {named} is of: run soci rebuild-db")
        async with opened(flags) as local:
            if await local.images.info(known.original_digest) is None:
                raise NotFound(f"layer {known.original_digest} is not in containerd: pull the image whole")
            if output is not None:
                await _to_file(Path(output), local.images, known.original_digest, ztoc, entry)
                return
            await extract(local.images, known.original_digest, ztoc, entry, sys.stdout.buffer.write)
            sys.stdout.buffer.write(b"\n")
            sys.stdout.buffer.flush()

    run_command(work, flags)


async def _to_file(path: Path, content: ContainerdStore, layer: Digest, ztoc: Ztoc, entry: TocEntry) -> None:
    """Write the file; where that fails, no piece of it stays."""
    whole = False
    try:
        with path.open("wb") as file:
            await extract(content, layer, ztoc, entry, file.write)
        whole = True
    except OSError as error:
        raise FailedPrecondition(f"cannot write {path}: {error.strerror}") from error
    finally:
        if not whole and path.is_file():  # never a device
            path.unlink(missing_ok=True)
