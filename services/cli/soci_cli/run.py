# SPDX-License-Identifier: Apache-2.0
"""``soci run``: pull if need be, and run a command in a fresh container, its exit code ours."""

from __future__ import annotations

import sys
import time
from typing import Final

import click

from soci.errors import NotFound
from soci.launch import TraceParent, new_traceparent
from soci.oci import parse_platform
from soci.reference import parse_reference
from soci_cli.border import run_command
from soci_cli.container import Run, run_container
from soci_cli.pull import PullWish, open_registry, pull, reporter, summary
from soci_cli.resolve import Resolved, from_containerd
from soci_cli.spec import Wish
from soci_cli.unpack import LayerDone
from soci_cli.values import DEFAULT_PLATFORM, DEFAULT_SNAPSHOTTER, Globals
from soci_containerd import Client, connect

POLICIES: Final = ("missing", "always", "never")


async def present(client: Client, wish: PullWish) -> Resolved | None:
    """The image, if containerd has it and its layers stand in the wished snapshotter."""
    try:
        image = await from_containerd(client, str(wish.reference), wish.platform)
        await client.snapshots(wish.snapshotter).stat(image.chains[-1])
    except NotFound:
        return None
    return image


async def obtain(client: Client, wish: PullWish, policy: str, trace: TraceParent, *, quiet: bool) -> Resolved:
    """The image by the pull policy, one of `POLICIES`. Raises `NotFound` with the way out."""
    found = None if policy == "always" else await present(client, wish)
    if found is not None:
        return found
    if policy == "never":
        raise NotFound(f"{wish.reference} is not in {wish.snapshotter}: pull it first, or run with --pull missing")
    done: list[LayerDone] = []
    began = time.monotonic()
    async with open_registry(wish.reference, plain_http=wish.plain_http) as registry:
        image = await pull(client, registry, wish, trace, reporter(done, quiet=quiet))
    if not quiet:
        print(summary(image, done, time.monotonic() - began, trace), file=sys.stderr, flush=True)
    return image


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--snapshotter", default=DEFAULT_SNAPSHOTTER, show_default=True, help="containerd's snapshotter plugin.")
@click.option("--platform", default=DEFAULT_PLATFORM, show_default=True, help="os/architecture[/variant].")
@click.option("--plain-http", is_flag=True, help="Speak HTTP to the image's registry.")
@click.option(
    "--pull", "policy", type=click.Choice(POLICIES), default="missing", show_default=True, help="When to pull."
)
@click.option("--rm/--keep", "remove", default=True, show_default=True, help="Remove the container at its end.")
@click.option("--name", default="", help="The container's id; default: a random one.")
@click.option(
    "--env", "-e", "environment", multiple=True, metavar="NAME=VALUE", help="Set a variable; may be repeated."
)
@click.option("--net-host", is_flag=True, help="Share the host's network.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing of the pull.")
@click.argument("image")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[CMD]...")
@click.pass_obj
def command(  # noqa: PLR0913  one parameter a flag
    flags: Globals,
    image: str,
    words: tuple[str, ...],
    *,
    snapshotter: str,
    platform: str,
    policy: str,
    name: str,
    environment: tuple[str, ...],
    plain_http: bool,
    remove: bool,
    net_host: bool,
    quiet: bool,
) -> int:
    """Run CMD (default: the image's) in a container from IMAGE; the exit code is the container's."""
    pull_wish = PullWish(parse_reference(image), parse_platform(platform), snapshotter, plain_http)
    wish = Wish(words, environment, net_host)
    trace = new_traceparent()

    async def work() -> int:
        async with connect(flags.address, flags.namespace) as client:
            found = await obtain(client, pull_wish, policy, trace, quiet=quiet)
            return await run_container(client, Run(found, snapshotter, wish, name, remove), trace)

    return run_command(work, flags)
