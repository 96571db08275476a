# SPDX-License-Identifier: Apache-2.0
"""``soci create``: the SOCI index (version 1) of an image that is in containerd."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import click

from soci.errors import NoZtoc
from soci.oci import Platform
from soci_cli.border import run_command
from soci_cli.build_flags import PlatformCommand, index_flags, parse_platforms, platform_flags, wish_of
from soci_cli.local import ImageManifest, Local, find_image, keep_with_image, manifests_of, opened
from soci_cli.progress import BuildScreen, warn
from soci_cli.values import Globals
from soci_indexing.build import IndexResult, IndexWish, Report, build_index
from soci_indexing.pool import BuildPool

Made = list[tuple[ImageManifest, IndexResult]]


@dataclass(frozen=True, slots=True)
class CreateWish:
    """Which manifests of which image."""

    image: str
    platforms: tuple[Platform, ...] = ()
    every: bool = False


async def create(local: Local, which: CreateWish, wish: IndexWish, report: Report) -> Made:
    """Index each of the image's manifests; containerd keeps each index as long as the image.

    A manifest without any layer to index is passed over, unless it is the only one or all are like that (`NoZtoc`).
    """
    image = await find_image(local.client, which.image)
    made: Made = []
    empty: list[NoZtoc] = []
    async with local.leased("soci-create") as leased, BuildPool() as pool:
        for one in await manifests_of(leased.images, image, which.platforms, every=which.every):
            try:
                result = await build_index(
                    leased.images,
                    leased.store,
                    leased.db,
                    pool,
                    wish,
                    subject=one.descriptor,
                    manifest=one.manifest,
                    image=image.target.digest,
                    platform=one.platform,
                    report=report,
                )
                made.append((one, result))
            except NoZtoc as error:
                empty.append(error)
        if not made:
            raise empty[0]
        if leased.in_containerd:
            await keep_with_image(leased, image.name, [result.descriptor.digest for _, result in made])
    for passed_over in empty:
        warn(str(passed_over))
    return made


def summary(one: ImageManifest, result: IndexResult) -> str:
    """The last line of a platform."""
    counts = f"{len(result.entries)} zTOCs, {len(result.skipped)} layers skipped"
    lists = f", {len(result.prefetch)} prefetch lists" if result.prefetch else ""
    return f"index {result.descriptor.digest} for {one.platform}: {counts}{lists}"


@click.command("create", cls=PlatformCommand)
@click.argument("image")
@platform_flags
@index_flags
@click.option("--quiet", "-q", is_flag=True, help="Print only the digests of the indexes.")
@click.pass_obj
def command(
    flags: Globals, /, image: str, platforms: tuple[str, ...], *, all_platforms: bool, quiet: bool, **wished: Any
) -> None:
    """Make the SOCI index of IMAGE, an image in containerd."""
    wish = wish_of(**wished, version=1)
    which = CreateWish(image, parse_platforms(platforms), all_platforms)

    async def work() -> Made:
        with BuildScreen(quiet=quiet) as screen:
            async with opened(flags) as local:
                return await create(local, which, wish, screen.report)

    for one, result in run_command(work, flags):
        if quiet:
            print(result.descriptor.digest)
        else:
            print(summary(one, result), file=sys.stderr)
