# SPDX-License-Identifier: Apache-2.0
"""``soci convert``: an image made anew so that it carries its SOCI indexes, in containerd or from file to file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from soci.errors import InvalidReference
from soci.oci import parse_platform
from soci.reference import Reference, parse_reference
from soci_cli.border import run_command
from soci_cli.build_flags import index_flags, parse_platforms, platform_flags, wish_of
from soci_cli.progress import BuildScreen
from soci_cli.values import DEFAULT_PLATFORM, Globals
from soci_indexing.build import IndexWish, Report
from soci_indexing.convert import Converted, ConvertWish, convert, index_builder
from soci_indexing.pool import BuildPool
from soci_indexing.standalone import FORMATS, Files, convert_files


def parse_destination(text: str) -> Reference:
    """The name of the new image, which needs a tag of its own: what it stands for is only known at the end.

    Raises `InvalidReference`.
    """
    reference = parse_reference(text)
    tagged = ":" in text.rpartition("/")[2]  # a tag that is only understood does not count
    if reference.digest or not tagged:
        raise InvalidReference(f"the destination image must be a tagged ref without a digest, unlike {text!r}")
    return reference


async def convert_in_containerd(  # noqa: PLR0913  each is another wish
    flags: Globals, source: str, destination: Reference, wish: ConvertWish, *, index: IndexWish, report: Report
) -> Converted:
    """Convert image ``source``; at the end ``destination`` stands for the result, which containerd keeps whole.

    With artifacts below ``--root``, they are stored there too. Raises what `convert` raises, and `NotFound` for an
    image that is not in containerd.
    """
    # gRPC is not needed to convert files.
    from soci_cli.local import find_image, opened  # noqa: PLC0415
    from soci_containerd import Image  # noqa: PLC0415

    async with opened(flags) as local:
        image = await find_image(local.client, source)
        target = replace(image.target, annotations={})  # they tell where the image came from
        async with local.leased("soci-convert") as leased, BuildPool() as pool:
            build = index_builder(
                leased.images, leased.store, leased.db, pool=pool, wish=index, image=target.digest, report=report
            )
            made = await convert(leased.images, target, wish, build=build, db=leased.db, report=report)
            await leased.client.images.put(Image(str(destination), made.target))
    return made


def summary(name: str, made: Converted) -> str:
    """The last line."""
    platforms = ", ".join(str(index.platform) for index in made.indexes)
    return f"{name}: {made.target.digest}, with SOCI indexes for {platforms}"


@click.command("convert")
@click.argument("source")
@click.argument("destination")
@platform_flags
@index_flags
@click.option("--standalone", is_flag=True, help="SOURCE and DESTINATION are files, and containerd is not needed.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="What --standalone writes.  [default: oci-archive]")
@click.option("--quiet", "-q", is_flag=True, help="Print only the digest of the new image.")
@click.pass_obj
def command(  # noqa: PLR0913  one parameter a flag
    flags: Globals,
    /,
    source: str,
    destination: str,
    platforms: tuple[str, ...],
    *,
    all_platforms: bool,
    standalone: bool,
    form: Any,
    quiet: bool,
    **wished: Any,
) -> None:
    """Make image DESTINATION of image SOURCE: the same layers, and SOCI indexes that travel with it.

    With --standalone, both are paths of OCI image layouts; the source is a directory or a tar.
    """
    if form and not standalone:
        raise click.UsageError("--format is for --standalone: containerd's images have none")
    index = wish_of(**wished, version=2)
    wish = ConvertWish(parse_platform(DEFAULT_PLATFORM), parse_platforms(platforms), all_platforms)
    reference = None if standalone else parse_destination(destination)

    async def work() -> Converted:
        with BuildScreen(quiet=quiet) as screen:
            if reference is not None:
                return await convert_in_containerd(flags, source, reference, wish, index=index, report=screen.report)
            async with BuildPool() as pool:
                files = Files(Path(source), Path(destination), form or FORMATS[0])
                return await convert_files(files, wish, index, pool, screen.report)

    made = run_command(work, flags)
    if quiet:
        print(made.target.digest)
    else:
        print(summary(str(reference or destination), made), file=sys.stderr)
