# SPDX-License-Identifier: Apache-2.0
"""``soci-snapshotter-grpc``: wires containerd's socket, the database, and the bus."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from soci.errors import BusUnavailable, FailedPrecondition, SociError
from soci_bus.nats import NatsBus, connect
from soci_cache import LayerStore
from soci_runtime.config import UNLIMITED, Config
from soci_runtime.flights import Flights
from soci_runtime.logs import log
from soci_runtime.serve import Process, service_command, trouble
from soci_snapshotter import userxattr
from soci_snapshotter.away import Remembering
from soci_snapshotter.cri import keychain
from soci_snapshotter.directories import numbers
from soci_snapshotter.grpc_door import claim_socket, listening, place_of
from soci_snapshotter.history import History
from soci_snapshotter.idmap import mapped_places
from soci_snapshotter.images import AHEAD_AT_ONCE, Images
from soci_snapshotter.in_use import InUse
from soci_snapshotter.keeping import ContentKeeper
from soci_snapshotter.layers import Layers
from soci_snapshotter.mode import Rules
from soci_snapshotter.mounts import Places, is_lazy
from soci_snapshotter.outbox import publish_log
from soci_snapshotter.snapshots import Snapshots
from soci_snapshotter.store import SnapshotStore
from soci_snapshotter.whole import FOLDER as UNPACKING
from soci_snapshotter.whole import Keep, WholeLayers

RESTORE_TRIES = 5
RESTORE_WAIT = 2.0
"""Tries to show lazy layers again after a start, and seconds between them; later each call that needs one tries."""


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two snapshotters on one root would undo each other's work: the second ends at once and says so."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FailedPrecondition(f"{folder / 'lock'}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FailedPrecondition(f"another snapshotter runs on {folder}") from error
    try:
        yield
    finally:
        os.close(descriptor)


async def restore(store: SnapshotStore, layers: Layers, thread: ThreadPoolExecutor, bus: NatsBus) -> None:
    """After a start: show the lazy layers that are gone. Failures are logged; nothing that works waits for this."""
    loop = asyncio.get_running_loop()
    await bus.up.wait()
    for attempt in range(RESTORE_TRIES):
        missing = 0
        for one in await loop.run_in_executor(thread, store.all):  # the oldest first: the lowest
            if not is_lazy(one):
                continue
            try:
                await layers.check([(one, await loop.run_in_executor(thread, store.parents, one))])
            except SociError as error:
                missing += 1
                log.warning("a lazy layer is not shown yet", snapshot=one.name, attempt=attempt + 1, error=error)
                if isinstance(error.__cause__, BusUnavailable):
                    break  # so are all others
        if not missing:
            return
        await asyncio.sleep(RESTORE_WAIT)


def make_folders(folder: Path, places: Places) -> None:
    """Our folders, for root alone: programs in images are setuid. Raises `FailedPrecondition`."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one in (folder, places.snapshots):
            one.mkdir(mode=0o700, exist_ok=True)
            one.chmod(0o700)
    except OSError as error:
        raise FailedPrecondition(f"{error.filename or folder}: {error.strerror}") from error


def rules_of(config: Config) -> Rules:
    """What the settings say of how layers come."""
    fallback = {"always": True, "never": False}.get(config.whole_fallback, config.parallel_pull_fallback)
    return Rules(
        min_layer_size=config.min_layer_size,
        always_whole=config.parallel_pull,
        whole_without_index=fallback,
        no_regret=config.no_regret,
    )


def keep_of(config: Config) -> Keep | None:
    """What becomes of blobs of whole layers: None where they are deleted once they are unpacked."""
    if config.content_store != "containerd" or config.discard_unpacked_layers:
        return None
    return ContentKeeper(config.containerd_address).keep


def ahead_of(config: Config) -> int:
    """How many zTOCs are brought ahead of their layers at a time."""
    return AHEAD_AT_ONCE if config.max_concurrency == UNLIMITED else min(config.max_concurrency, AHEAD_AT_ONCE)


@asynccontextmanager
async def _history(path: Path) -> AsyncIterator[History]:
    history = await asyncio.to_thread(History, path)
    try:
        yield history
    finally:
        await asyncio.to_thread(history.close)


async def run(config: Config, process: Process) -> None:
    """Serve until told to stop."""
    folder = config.root / "snapshotter"
    places = Places(folder / "snapshots", config.mounts, config.cache)
    make_folders(folder, places)
    if userxattr.needed():
        log.info("in a user namespace: overlays are mounted with userxattr")
    with only_one(folder), ThreadPoolExecutor(1, "database") as thread:
        loop = asyncio.get_running_loop()
        store = await loop.run_in_executor(thread, SnapshotStore, folder / "metadata.db")
        # directories of calls that a crash cut short, or of a database that was moved away: not to be used again
        on_disk = numbers(places.snapshots) | mapped_places(places.snapshots).keys()
        await loop.run_in_executor(thread, store.reserve, on_disk)
        address, outside = place_of(config.address, folder)
        await claim_socket(address)
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(
                connect(config.nats_url, node=config.node, name="soci-snapshotter", trouble=trouble)
            )
            history = await stack.enter_async_context(_history(folder / "history.db"))
            flights = await stack.enter_async_context(Flights())
            whole = await stack.enter_async_context(
                WholeLayers(
                    bus,
                    folder / UNPACKING,
                    max_unpacks=config.max_unpacks,
                    max_unpacks_per_image=config.max_unpacks_per_image,
                    keep=keep_of(config),
                )
            )
            rules = rules_of(config)
            cache = LayerStore(config.cache)
            asking = Remembering(bus, bus.up.is_set)
            timeout, ahead = config.mount_timeout, ahead_of(config)
            images = Images(asking, flights, whole, history, cache, rules, timeout=timeout, ahead_at_once=ahead)
            layers = Layers(asking, places, images, whole, rules, mount_timeout=timeout)
            in_use = InUse(folder / "metadata.db", bus, flights)
            await in_use.serve()
            snapshots = Snapshots(store, layers, places, bus, thread, freed=in_use.freed)
            proxy = None
            if config.cri_keychain:
                proxy = await stack.enter_async_context(keychain(config.cri_image_service, bus))
            async with listening(address, snapshots, proxy=proxy, outside=outside), asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(publish_log(store, bus, thread))
                restoring = tasks.create_task(restore(store, layers, thread, bus))
                process.ready(address=address, root=str(config.root), node=config.node)
                await process.stopping.wait()
                publishing.cancel()
                restoring.cancel()
        await loop.run_in_executor(thread, store.close)


main = service_command("soci-snapshotter-grpc", run, address=True)

if __name__ == "__main__":
    main()
