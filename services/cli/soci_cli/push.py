# SPDX-License-Identifier: Apache-2.0
"""``soci push``: the newest SOCI index (version 1) of an image, beside the image in its registry."""

from __future__ import annotations

import getpass
import sys
from typing import Any, Final

import click

from soci.errors import InvalidConfig
from soci.reference import Reference, parse_reference
from soci_cli.border import run_command
from soci_cli.build_flags import PlatformCommand, parse_platforms, platform_flags
from soci_cli.hosts import CommandHosts
from soci_cli.local import opened
from soci_cli.progress import warn
from soci_cli.push_index import EXISTING, Existing, PushScreen, PushWish, push_indexes
from soci_cli.values import Globals
from soci_registry import Credentials, DockerConfig, FixedLogin, Login, Registry, RegistrySettings

DEFAULT_UPLOADS: Final = 3
MAX_UPLOADS: Final = 64

NO_EFFECT: Final = {
    "refresh": "--refresh",
    "tlscert": "--tlscert",
    "tlskey": "--tlskey",
    "http_dump": "--http-dump",
    "http_trace": "--http-trace",
}
"""Flags that other clients are used to give; here they change nothing, which is said. ``--snapshotter`` is not said:
it has a meaning for them and none for a push."""


def credentials_of(user: str, reference: Reference) -> Credentials:
    """``--user`` as ``name`` or ``name:password``, asked for where it is missing; without it Docker's config."""
    if not user:
        return DockerConfig()
    name, colon, password = user.partition(":")
    if not colon:
        if not sys.stdin.isatty():
            raise InvalidConfig("--user without a password: write user:password")
        password = getpass.getpass(f"Password of {name} at {reference.registry}: ")
    return FixedLogin(Login(name, password), reference.registry)


@click.command("push", cls=PlatformCommand)
@click.argument("image")
@platform_flags
@click.option(
    "--existing-index",
    type=click.Choice(EXISTING),
    default="warn",
    show_default=True,
    help="Where the registry has an index of the image already: warn and push, skip, or push without looking.",
)
@click.option(
    "--max-concurrent-uploads",
    type=click.IntRange(0, MAX_UPLOADS),
    default=DEFAULT_UPLOADS,
    show_default=True,
    help="Blobs pushed at once.",
)
@click.option("--user", "-u", default="", help="user[:password] for the registry.")
@click.option("--plain-http", is_flag=True, help="Speak HTTP to the registry.")
@click.option("--tlscacert", type=click.Path(), help="Certificate authorities to trust (PEM).")
@click.option("--skip-verify", "-k", is_flag=True, help="Take any certificate of the registry's hosts.")
@click.option("--hosts-dir", "hosts_dirs", multiple=True, help="A folder of HOST/hosts.toml, as containerd has them.")
@click.option("--quiet", "-q", is_flag=True, help="Print only the digest of what was pushed.")
@click.option("--refresh", help="Accepted, without effect.")
@click.option("--tlscert", help="Accepted, without effect.")
@click.option("--tlskey", help="Accepted, without effect.")
@click.option("--http-dump", is_flag=True, help="Accepted, without effect.")
@click.option("--http-trace", is_flag=True, help="Accepted, without effect.")
@click.option("--snapshotter", envvar="CONTAINERD_SNAPSHOTTER", help="Accepted, without effect.")
@click.pass_obj
def command(  # noqa: PLR0913, PLR0917  one parameter a flag
    flags: Globals,
    /,
    image: str,
    platforms: tuple[str, ...],
    existing_index: Existing,
    max_concurrent_uploads: int,
    user: str,
    tlscacert: str | None,
    hosts_dirs: tuple[str, ...],
    *,
    all_platforms: bool,
    plain_http: bool,
    skip_verify: bool,
    quiet: bool,
    **without_effect: Any,
) -> None:
    """Push the newest SOCI index of IMAGE beside the image in its registry."""
    for name, flag in NO_EFFECT.items():
        if without_effect[name]:
            warn(f"{flag} has no effect")
    uploads = max_concurrent_uploads or DEFAULT_UPLOADS
    wish = PushWish(image, parse_platforms(platforms), all_platforms, existing_index, uploads)
    reference = parse_reference(image)
    plain = frozenset({reference.registry}) if plain_http else frozenset()
    settings = RegistrySettings(plain_http=plain, ca_file=tlscacert)
    hosts = CommandHosts(hosts_dirs, plain, skip_verify=skip_verify)
    login = credentials_of(user, reference)

    async def work() -> None:
        with PushScreen(quiet=quiet) as screen:
            async with (
                opened(flags) as local,
                Registry(settings=settings, credentials=login, hosts=hosts) as registry,
            ):
                await push_indexes(local, registry, wish, screen)

    run_command(work, flags)
