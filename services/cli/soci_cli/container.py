# SPDX-License-Identifier: Apache-2.0
"""One container from its first snapshot to its last trace."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from soci.errors import AlreadyExists, NotFound, SociError
from soci.launch import TraceParent
from soci_cli.labels import container_labels
from soci_cli.resolve import Resolved
from soci_cli.spec import Wish, encode_spec, make_spec
from soci_cli.stdio import Output, forwarded_output
from soci_containerd import Client, Container, Mount

KILL_AFTER_SIGNALS: Final = 3
"""So many SIGINT or SIGTERM say that the container does not listen: it is killed."""
END_SECONDS: Final = 10.0
"""How long a killed task may take to end before its remains are left to containerd."""
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Run:
    """What to run: ``name`` is the container's id, "" for a random one; ``remove`` leaves nothing behind."""

    image: Resolved
    snapshotter: str
    wish: Wish
    name: str = ""
    remove: bool = True


def container_id(name: str) -> str:
    """The given name, or a random one."""
    return name or f"soci-{secrets.token_hex(6)}"


async def run_container(client: Client, run: Run, trace: TraceParent) -> int:
    """Run to the end; the answer is the exit code. What was made is taken away again, whatever happens."""
    name = container_id(run.name)
    spec = encode_spec(make_spec(run.image.parsed, run.wish, name, client.namespace))
    snapshots = client.snapshots(run.snapshotter)
    async with client.lease("soci-run") as leased:  # until the container record keeps its snapshot
        labels = container_labels(run.image.name, trace)
        try:
            mounts = await leased.snapshots(run.snapshotter).prepare(name, run.image.chains[-1], labels)
        except AlreadyExists as error:
            raise AlreadyExists(f"a container or snapshot {name} exists: choose another --name") from error
        try:
            await leased.containers.create(Container(name, run.image.name, spec, run.snapshotter, name))
        except BaseException:
            await asyncio.shield(_quietly(snapshots.remove(name)))
            raise
    try:
        async with forwarded_output() as output:
            return await _task(client, name, mounts, output)
    finally:
        if run.remove:
            await asyncio.shield(_remove(client, run.snapshotter, name))


async def _task(client: Client, name: str, mounts: tuple[Mount, ...], output: Output) -> int:
    try:
        await client.tasks.create(name, mounts, stdout=output.stdout, stderr=output.stderr)
        async with asyncio.TaskGroup() as group:
            # Waited for before it starts: a short life must not end unseen.
            ended = group.create_task(client.tasks.wait(name))
            with _signals(_forwarder(client, name, group)):
                await client.tasks.start(name)
                status = await ended
        with _signals(lambda _number: output.give_up()):
            await output.drained()
    except BaseException:
        await asyncio.shield(_kill(client, name))
        raise
    await client.tasks.delete(name)
    return status


def _forwarder(client: Client, name: str, group: asyncio.TaskGroup) -> Callable[[signal.Signals], None]:
    """Hands signals to the container; the third of them becomes SIGKILL."""
    count = 0

    def forward(number: signal.Signals) -> None:
        nonlocal count
        count += 1
        sent = signal.SIGKILL if count >= KILL_AFTER_SIGNALS else number
        group.create_task(_quietly(client.tasks.kill(name, sent)))

    return forward


@contextmanager
def _signals(handler: Callable[[signal.Signals], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``handler`` meanwhile, and to nobody afterwards: clean-up has deadlines of its own."""
    loop = asyncio.get_running_loop()
    for number in FORWARDED:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number in FORWARDED:
            loop.add_signal_handler(number, _ignore)


def _ignore() -> None:
    pass


async def _kill(client: Client, name: str) -> None:
    """End a task that must not stay, and delete it."""
    with suppress(SociError, TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            with suppress(NotFound):
                await client.tasks.kill(name, signal.SIGKILL, everything=True)
                await client.tasks.wait(name)
            await client.tasks.delete(name)


async def _remove(client: Client, snapshotter: str, name: str) -> None:
    await _quietly(client.containers.delete(name), "a container is left")
    await _quietly(client.snapshots(snapshotter).remove(name), "a snapshot is left")


async def _quietly(call: Awaitable[object], otherwise: str = "") -> None:
    """Clean-up must not hide what went before: where it fails, ``otherwise`` is said on stderr."""
    try:
        await call
    except SociError as error:
        if otherwise:
            print(f"soci: {otherwise}: {error}", file=sys.stderr)
