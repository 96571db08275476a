# SPDX-License-Identifier: Apache-2.0
"""``soci index list``, ``info`` and ``remove``: the indexes that were made on this machine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import click

from soci.digest import parse_digest
from soci.errors import InvalidInput
from soci.index import parse_index
from soci.oci import MAX_MANIFEST_BYTES, Platform
from soci_cli.artifact_words import VERSIONS, read_artifact, rfc3339
from soci_cli.border import run_command
from soci_cli.build_flags import parse_platforms
from soci_cli.local import (
    Local,
    all_images,
    artifacts_of,
    find_image,
    forget_with_images,
    manifests_of,
    opened,
    opened_store,
)
from soci_cli.tables import ago, indented, table
from soci_cli.values import Globals
from soci_containerd import Image
from soci_indexing.artifacts import INDEX, Artifact
from soci_indexing.stores import LayoutStore

HEADERS = ("DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED")


async def indexes_of(local: Local, image: Image) -> list[Artifact]:
    """The indexes of an image: made for what its name stands for, or of a manifest in it."""
    found = {one.digest: one for one in local.db.indexes_of_image(image.target.digest)}
    for one in await manifests_of(local.images, image, every=True, missing_is_fine=True):
        found |= {index.digest: index for index in local.db.indexes_of(one.descriptor.digest)}
    return sorted(found.values(), key=lambda one: -one.created_at)


def rows_of(artifacts: Sequence[Artifact], images: Sequence[Image]) -> list[tuple[Artifact, str]]:
    """Each index with each name of its image; with an empty name where there is none any more."""
    names: dict[str, list[str]] = {}
    for image in images:
        names.setdefault(image.target.digest, []).append(image.name)
    return [(one, name) for one in artifacts for name in sorted(names.get(one.image_digest, [])) or [""]]


def cells(artifact: Artifact, name: str, now: int) -> tuple[str, ...]:
    """A row of the table."""
    version = VERSIONS.get(artifact.artifact_type, "")
    age = ago(artifact.created_at, now)
    return (artifact.digest, str(artifact.size), name, artifact.platform, artifact.media_type, version, age)


def as_json(artifact: Artifact, name: str) -> dict[str, Any]:
    """A row for ``--json``."""
    return {
        "digest": artifact.digest,
        "size": artifact.size,
        "image_ref": name,
        "image_digest": artifact.image_digest,
        "manifest_digest": artifact.original_digest,
        "platform": artifact.platform,
        "media_type": artifact.media_type,
        "version": VERSIONS.get(artifact.artifact_type, ""),
        "created_at": rfc3339(artifact.created_at),
    }


def _for_platforms(artifacts: Sequence[Artifact], platforms: Sequence[Platform]) -> list[Artifact]:
    wanted = {str(one) for one in platforms}
    return [one for one in artifacts if not wanted or one.platform in wanted]


@click.command("list")
@click.option("--ref", default="", help="Only the indexes of this image.")
@click.option("--platform", "-p", "platforms", multiple=True, help="Only those for this platform.")
@click.option("--quiet", "-q", is_flag=True, help="Print only digests.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_command(flags: Globals, ref: str, platforms: tuple[str, ...], *, quiet: bool, json_output: bool) -> None:
    """List the indexes made here, newest first."""
    wanted = parse_platforms(platforms)

    async def work() -> list[tuple[Artifact, str]]:
        if not ref:
            return rows_of(_for_platforms(artifacts_of(flags).all(INDEX), wanted), await all_images(flags))
        async with opened(flags) as local:
            image = await find_image(local.client, ref)
            return [(one, image.name) for one in _for_platforms(await indexes_of(local, image), wanted)]

    rows = run_command(work, flags)
    if json_output:
        print(indented([as_json(*row) for row in rows]))
    elif quiet:
        for digest in dict.fromkeys(one.digest for one, _ in rows):
            print(digest)
    else:
        print(table(HEADERS, [cells(one, name, time.time_ns()) for one, name in rows]))


@click.command("info")
@click.argument("digest")
@click.option("--json", "json_output", is_flag=True, help="Print JSON; it is printed anyway.")
@click.pass_obj
def info_command(flags: Globals, digest: str, *, json_output: bool) -> None:
    """Show the index DIGEST as JSON."""
    del json_output

    async def work() -> bytes:
        async with opened_store(flags) as store:
            _, content, _ = await read_artifact(artifacts_of(flags), store, digest, INDEX, MAX_MANIFEST_BYTES)
            return content

    content = run_command(work, flags)
    parse_index(content)  # refuses what is none
    print(indented(json.loads(content)))


@click.command("remove")
@click.argument("digests", nargs=-1)
@click.option("--ref", default="", help="Remove the indexes of this image.")
@click.pass_obj
def remove_command(flags: Globals, digests: tuple[str, ...], ref: str) -> None:
    """Remove the indexes DIGESTS, or those of an image. Their zTOCs stay as long as something needs them."""
    if bool(digests) == bool(ref):
        raise InvalidInput("name the digests of indexes, or an image with --ref; one of the two")

    async def work() -> None:
        if not ref and flags.content_store == "soci":  # containerd has nothing of these
            await _remove_below_root(flags, digests)
            return
        async with opened(flags) as local:
            if ref:
                image = await find_image(local.client, ref)
                doomed = [one.digest for one in local.db.indexes_of_image(image.target.digest)]
            else:
                doomed = list(map(parse_digest, digests))
            await asyncio.to_thread(local.db.remove_indexes, doomed)
            await forget_with_images(local.client, doomed)
            for digest in doomed:
                await local.store.delete(digest)

    run_command(work, flags)


async def _remove_below_root(flags: Globals, digests: Sequence[str]) -> None:
    doomed = list(map(parse_digest, digests))
    await asyncio.to_thread(artifacts_of(flags).remove_indexes, doomed)
    store = LayoutStore(flags.root)
    for digest in doomed:
        await store.delete(digest)
