# SPDX-License-Identifier: Apache-2.0
"""``soci pull``: an image into containerd, lazily where the snapshotter can."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import click

from soci.launch import TraceParent, new_traceparent
from soci.oci import Platform, parse_platform
from soci.reference import Reference, parse_reference
from soci_cli import labels
from soci_cli.border import run_command
from soci_cli.resolve import Resolved, from_registry
from soci_cli.unpack import DOWNLOADED, LayerDone, Report, Unpacker
from soci_cli.values import DEFAULT_PLATFORM, DEFAULT_SNAPSHOTTER, Globals, human_bytes
from soci_containerd import Client, Image, connect
from soci_registry import DockerConfig, Registry, RegistrySettings


@dataclass(frozen=True, slots=True)
class PullWish:
    """Which image, for what, into which snapshotter."""

    reference: Reference
    platform: Platform
    snapshotter: str
    plain_http: bool = False


@asynccontextmanager
async def open_registry(reference: Reference, *, plain_http: bool) -> AsyncIterator[Registry]:
    """The registries, with the credentials of the Docker config; ``plain_http`` is for this reference's host."""
    hosts = frozenset({reference.registry}) if plain_http else frozenset()
    async with Registry(settings=RegistrySettings(plain_http=hosts), credentials=DockerConfig()) as registry:
        yield registry


async def pull(client: Client, registry: Registry, wish: PullWish, trace: TraceParent, report: Report) -> Resolved:
    """Pull under a lease; at the end the image's name stands for what was pulled, and all of it is kept."""
    await client.ensure_namespace()
    repository = registry.repository(wish.reference)
    image = await from_registry(repository, wish.reference, wish.platform)
    async with client.lease("soci-pull") as leased:
        await _store_documents(leased, image)
        await Unpacker(leased, repository, image, wish.snapshotter, trace).run(report)
        kept = labels.gc_labels_of_config(wish.snapshotter, image.chains[-1])
        await leased.content.update_labels(image.config.descriptor.digest, kept)
        await leased.images.put(Image(image.name, image.target))
    return image


async def _store_documents(client: Client, image: Resolved) -> None:
    """Config, manifest and index into the content store: what is named is stored before what names it."""
    config, manifest = image.config, image.manifest
    await client.content.write(config.descriptor, config.content, {})
    kept = labels.gc_labels_of_manifest(config.descriptor.digest, image.layers)
    await client.content.write(manifest.descriptor, manifest.content, kept)
    if image.index is not None:
        kept = labels.gc_labels_of_index(image.number, manifest.descriptor.digest)
        await client.content.write(image.index.descriptor, image.index.content, kept)


def layer_line(done: LayerDone) -> str:
    """One line of progress."""
    short = done.layer.digest[:19]
    size = human_bytes(done.layer.size)
    return f"layer {done.number + 1}/{done.of}  {short}  {size:>10}  {done.how}  ({done.seconds:.2f} s)"


def summary(image: Resolved, done: list[LayerDone], seconds: float, trace: TraceParent) -> str:
    """The last line: how many layers came how, the bytes that were downloaded of all, and the launch to look up."""
    counts = ", ".join(f"{count} {how}" for how, count in Counter(item.how for item in done).items())
    moved = sum(item.layer.size for item in done if item.how == DOWNLOADED)
    total = sum(layer.size for layer in image.layers)
    sizes = f"{human_bytes(moved)} of {human_bytes(total)} downloaded"
    return f"{image.name}: {counts}; {sizes} in {seconds:.2f} s; launch {trace.launch}"


def reporter(done: list[LayerDone], *, quiet: bool) -> Callable[[LayerDone], None]:
    """Collects into ``done`` and, unless ``quiet``, says each layer on stderr."""

    def report(item: LayerDone) -> None:
        done.append(item)
        if not quiet:
            print(layer_line(item), file=sys.stderr, flush=True)

    return report


@click.command("pull")
@click.argument("image")
@click.option("--snapshotter", default=DEFAULT_SNAPSHOTTER, show_default=True, help="containerd's snapshotter plugin.")
@click.option("--platform", default=DEFAULT_PLATFORM, show_default=True, help="os/architecture[/variant].")
@click.option("--plain-http", is_flag=True, help="Speak HTTP to the image's registry.")
@click.option("--quiet", "-q", is_flag=True, help="Print only the image's name.")
@click.pass_obj
def command(  # noqa: PLR0913  one parameter a flag
    flags: Globals, image: str, snapshotter: str, platform: str, *, plain_http: bool, quiet: bool
) -> None:
    """Pull IMAGE into containerd; layers with an index are left in the registry and read on demand."""
    wish = PullWish(parse_reference(image), parse_platform(platform), snapshotter, plain_http)
    trace = new_traceparent()
    done: list[LayerDone] = []

    async def work() -> Resolved:
        async with (
            connect(flags.address, flags.namespace) as client,
            open_registry(wish.reference, plain_http=wish.plain_http) as registry,
        ):
            return await pull(client, registry, wish, trace, reporter(done, quiet=quiet))

    began = time.monotonic()
    pulled = run_command(work, flags)
    print(pulled.name if quiet else summary(pulled, done, time.monotonic() - began, trace))
