# SPDX-License-Identifier: Apache-2.0
"""Whole layers of an image, all under way at once: each is unpacked while its blob comes, before it is asked for.

containerd asks for one layer after the other, each once the one below it is committed. What it will ask for is known
from the manifest, so all of it is begun at the first call (`WholeLayers.begin`), into directories of our own. When the
call for a layer comes (`WholeLayers.claim`) its directory is renamed to be the snapshot's, and what only now can be
known, what lies below, is settled. Nothing is handed out before the blob's digest and the diff_id have proved right
and all of it is on disk.

What runs: a task a layer, each with a fetch (an ask) and an unpacking (`soci_snapshotter.unpacker`) of its own; one
that tidies up. All belong to this object's task group. No lock is held while anything is waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, Self

from soci.digest import Digest
from soci.errors import DeadlineExceeded, LimitExceeded, NotFound, SociError, Unavailable
from soci.launch import TraceParent
from soci_bus.asks import FetchLayer
from soci_bus.face import Bus
from soci_cache.arriving import FAILED, progress
from soci_runtime.flights import in_thread
from soci_runtime.turns import Turns
from soci_snapshotter.fetching import fetch_blob
from soci_snapshotter.placing import Syncs, blob_in, discard, empty, forget_blob, hand_over, layer_in, make
from soci_snapshotter.unpack_worker import Result, Wish
from soci_snapshotter.unpacker import Unpackers

JOBS: Final = 1024
"""Layers under way or waiting to be claimed, of all images."""
PLANS: Final = 256
"""Images whose layers can be begun again; the one begun first goes first."""
LAYER_SECONDS: Final = 7200.0
"""How long one layer may take."""
UNCLAIMED_SECONDS: Final = 900.0
"""How long an unpacked layer that nobody claims is kept."""
TIDY_SECONDS: Final = 10.0
TOLD_SECONDS: Final = 5.0
"""How long the reason for a blob's failure may take, once its reader has seen that it failed."""
FOLDER: Final = "unpack"
"""What the snapshotter's root calls the scratch folder."""


@dataclass(frozen=True, slots=True)
class WantedLayer:
    """A layer that containerd will ask for. ``size`` is of the blob, None where it is not known."""

    layer: Digest
    size: int | None
    media_type: str
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class Arrived:
    """A blob that is whole, in a file that is gone when the call with it ends."""

    image: str
    manifest: Digest
    namespace: str
    wanted: WantedLayer
    size: int
    path: Path


Keep = Callable[[Arrived], Awaitable[None]]
"""Called for each blob, beside its unpacking, to keep it somewhere; the layer fails where this fails."""


@dataclass(frozen=True, slots=True)
class _Plan:
    image: str
    manifest: Digest
    namespace: str
    trace: TraceParent | None
    wanted: OrderedDict[Digest, WantedLayer]


@dataclass(eq=False, slots=True)
class _Job:
    plan: _Plan
    wanted: WantedLayer
    place: Path
    done: asyncio.Future[Result]
    task: asyncio.Task[None] | None = None
    ended: float | None = None  # time.monotonic
    taken: bool = False
    claims: int = 0  # calls that wait for it


class WholeLayers:
    """An async context manager, one a process.

    ``scratch`` is on the file system of the snapshots, and emptied at the start. ``max_unpacks`` and
    ``max_unpacks_per_image`` are how many layers are unpacked at a time; negative or 0: as many as there are cores.
    """

    def __init__(  # noqa: PLR0913  its ways out, and the limits
        self,
        bus: Bus,
        scratch: Path,
        *,
        max_unpacks: int = -1,
        max_unpacks_per_image: int = -1,
        unclaimed: float = UNCLAIMED_SECONDS,
        keep: Keep | None = None,
    ) -> None:
        self._bus = bus
        self._scratch = scratch
        self._unpackers = Unpackers(max_unpacks)
        self._unclaimed = unclaimed
        self._keep = keep
        self._group = asyncio.TaskGroup()
        self._disk = ThreadPoolExecutor(1, "unpack")  # one: directories are made in the order of the layers
        self._plans: OrderedDict[Digest, _Plan] = OrderedDict()
        self._jobs: dict[tuple[Digest, Digest], _Job] = {}
        self._rooms = Turns(max_unpacks_per_image if max_unpacks_per_image > 0 else self._unpackers.workers)
        self._numbers = count(1)
        self._syncs = Syncs(scratch)
        self._tidying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await in_thread(empty, self._scratch)
        await self._unpackers.__aenter__()
        await self._group.__aenter__()
        self._tidying = self._group.create_task(self._tidy())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._tidying:
            self._tidying.cancel()
        for key in list(self._jobs):
            self._end(key)
        await self._group.__aexit__(None, None, None)
        await self._unpackers.__aexit__(None, None, None)
        self._disk.shutdown()
        await in_thread(empty, self._scratch)

    # --- the calls

    def begin(
        self,
        image: str,
        manifest: Digest,
        wanted: Sequence[WantedLayer],
        trace: TraceParent | None = None,
        *,
        namespace: str = "",
    ) -> None:
        """Start on the layers that are still to come, the lowest first; those under way are left alone.

        Returns at once. Layers beyond `JOBS` are only begun once they are claimed.
        """
        plan = self._plans.pop(manifest, None)
        known = plan.wanted if plan else OrderedDict[Digest, WantedLayer]()
        known.update((one.layer, one) for one in wanted)
        plan = self._plans[manifest] = _Plan(image, manifest, namespace, trace, known)
        while len(self._plans) > PLANS:
            self._plans.popitem(last=False)
        for one in wanted:
            if (manifest, one.layer) not in self._jobs and len(self._jobs) < JOBS:
                self._start(manifest, plan, one)

    async def claim(self, manifest: Digest, layer: Digest, upper: Path, lower: Sequence[Path]) -> tuple[int, int]:
        """Wait for a layer, have it in the directory ``upper`` (absent or empty; its owner and mode are kept where the
        layer does not list its root) over ``lower``, nearest first, all on disk; bytes and inodes that it takes.

        Begun where it is not under way. Raises the job's error, after which the next claim begins it anew; ``upper``
        is then as it was.
        """
        key = (manifest, layer)
        while True:
            job = self._jobs.get(key) or self._again(manifest, layer)
            job.claims += 1
            try:
                result = await asyncio.shield(job.done)
            except SociError:
                if self._jobs.get(key) is job:
                    del self._jobs[key]
                raise
            finally:
                job.claims -= 1
            if not job.taken:
                break
        job.taken = True
        if self._jobs.get(key) is job:
            del self._jobs[key]
        try:
            await in_thread(hand_over, job.place, upper, lower, result)
        finally:
            await in_thread(discard, job.place)
        return result.size, result.inodes

    async def drop(self, manifest: Digest) -> None:
        """Give up all layers of an image: nobody will claim them. Calls that wait for one get `Unavailable`."""
        self._plans.pop(manifest, None)
        tasks = [self._end(key) for key in list(self._jobs) if key[0] == manifest]
        running = [task for task in tasks if task and not task.done()]
        if running:
            await asyncio.wait(running)

    # --- jobs

    def _again(self, manifest: Digest, layer: Digest) -> _Job:
        plan = self._plans.get(manifest)
        if plan is None or layer not in plan.wanted:
            raise NotFound(f"layer {layer} of {manifest} was not begun here")
        if len(self._jobs) >= JOBS:
            raise LimitExceeded(f"{JOBS} whole layers are under way (JOBS)")
        return self._start(manifest, plan, plan.wanted[layer])

    def _start(self, manifest: Digest, plan: _Plan, wanted: WantedLayer) -> _Job:
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = _Job(plan, wanted, self._scratch / str(next(self._numbers)), done)
        self._jobs[manifest, wanted.layer] = job
        job.task = self._group.create_task(self._run(job))
        job.task.add_done_callback(lambda _: _given_up(job))  # it may have been cancelled before it began
        return job

    def _end(self, key: tuple[Digest, Digest]) -> asyncio.Task[None] | None:
        """Forget a job, and cancel it where it is under way; what is left of it is deleted by its task."""
        job = self._jobs.pop(key)
        if job.task is None:
            return None
        if job.task.done():
            if not job.taken:
                job.taken = True
                job.task = self._group.create_task(_thrown_away(job.place))
        else:
            job.task.cancel()
        return job.task

    async def _run(self, job: _Job) -> None:
        """One job to its end; whatever that is, it is told through ``done``."""
        try:
            async with asyncio.timeout(LAYER_SECONDS):
                result = await self._bring(job)
            job.done.set_result(result)
        except TimeoutError:
            _fail(job, DeadlineExceeded(f"layer {job.wanted.layer} took longer than {LAYER_SECONDS:g} s"))
        except SociError as error:
            _fail(job, error)
        except Exception as error:  # noqa: BLE001  it is raised to who claims the layer
            _fail(job, SociError(f"{job.wanted.layer}: internal error {type(error).__name__}: {error}"))
        finally:
            job.ended = time.monotonic()
            if not job.done.done() or job.done.exception():
                await in_thread(discard, job.place)

    async def _bring(self, job: _Job) -> Result:
        await self._make(job.place)
        try:
            async with asyncio.TaskGroup() as tasks:
                fetching = tasks.create_task(self._fetch(job))
                unpacking = tasks.create_task(self._unpack(job, fetching))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            await in_thread(forget_blob, job.place)  # before the disk has to take it, too
        await self._syncs.sync()
        return unpacking.result()

    async def _make(self, place: Path) -> None:
        work = asyncio.get_running_loop().run_in_executor(self._disk, make, place)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # else it would make what was just deleted
            work.exception()
            raise

    async def _unpack(self, job: _Job, fetching: asyncio.Task[None]) -> Result:
        wanted = job.wanted
        wish = Wish(str(blob_in(job.place)), str(layer_in(job.place)), wanted.media_type, wanted.diff_id)
        async with self._rooms.hold(job.plan.image):
            try:
                return await self._unpackers.unpack(wish)
            except SociError:
                if progress(blob_in(job.place))[1] == FAILED:  # its fetcher says why, and ends this with it
                    await asyncio.wait([fetching], timeout=TOLD_SECONDS)
                raise

    async def _fetch(self, job: _Job) -> None:
        ask = FetchLayer(job.plan.image, job.wanted.layer, job.wanted.size, str(blob_in(job.place)))
        size = await fetch_blob(self._bus, ask, job.plan.trace)
        if self._keep:
            plan = job.plan
            await self._keep(Arrived(plan.image, plan.manifest, plan.namespace, job.wanted, size, blob_in(job.place)))

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(min(TIDY_SECONDS, self._unclaimed))
            old = time.monotonic() - self._unclaimed
            for key, job in list(self._jobs.items()):
                if job.ended is not None and job.ended <= old and not job.claims:
                    self._end(key)
            await self._unpackers.tend()


def _fail(job: _Job, error: SociError) -> None:
    job.done.set_exception(error)
    job.done.exception()  # seen, even where nobody claims the layer


def _given_up(job: _Job) -> None:
    if not job.done.done():
        _fail(job, Unavailable(f"layer {job.wanted.layer} was given up"))


async def _thrown_away(place: Path) -> None:
    await in_thread(discard, place)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group: the others are of the same cause, or of being cancelled for it."""
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    return errors
