# SPDX-License-Identifier: Apache-2.0
"""Spans from the node of the cluster that owns them, and from the registry where that does not give them soon.

A run is cut at blocks, and each piece asked of its owner, then of who stands in for it, then of the registry. Where a
reader waits (a miss) the registry is asked too after `hedge_seconds`, and who is first wins.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from soci.digest import Digest, hex_of, new_hash
from soci.errors import FailedPrecondition, LimitExceeded, Mismatch, NotFound, Unavailable
from soci_bus.asks import PrepareLayer
from soci_bus.events import NO_LAUNCH, Event, PeerLied
from soci_fetcher.layers import ZtocSource
from soci_fetcher.peers_client import (
    COMING_SECONDS,
    PeerClient,
    PeerFailedError,
    PeerLateError,
    RegistryWantedError,
    Wanted,
)
from soci_fetcher.peers_door import REQUEST_BYTES, path_of, ztoc_path
from soci_fetcher.peers_members import Aside, Member, Members
from soci_fetcher.peers_own import Key, OpenLayer, Owned
from soci_fetcher.peers_ring import ZTOC_BLOCK, blocks, key_of, run_of
from soci_fetcher.source import MISS, Source
from soci_runtime.flights import in_thread
from soci_runtime.logs import log

HEDGE_SECONDS: Final = 2.0
HEDGE_RATE: Final = 4 << 20
"""A miss waits so long for peers, and for its bytes at this rate, before the registry is asked too."""
HEDGE_FACTOR: Final = 8.0
"""While a peer says that it waits for the registry, a miss waits so many times as long as the registry itself seems to
need, by what we saw of it: were each node to ask a slow registry too, it would be slower for all."""
HEDGE_LOOK: Final = 0.1
"""Seconds between two looks at how a peer does."""
GIVEN_MAX: Final = 1024
"""Pieces that are remembered, so that wrong bytes can be laid at somebody's door."""
DOUBTED_MAX: Final = 1024
"""Extents of which wrong bytes came, and for which the registry alone is asked."""


def hedge_seconds(size: int) -> float:
    """How long a miss of so many bytes waits for peers of which nothing is heard, or that give them slowly."""
    return HEDGE_SECONDS + size / HEDGE_RATE


def hedge_coming(size: int, seen: tuple[float, float]) -> float:
    """How long it waits in all while a peer says that it waits for the registry.

    ``seen`` is the registry's bytes a second and seconds of a round trip; zeros where nothing is known.
    """
    speed, trip = seen
    wanted = HEDGE_FACTOR * (trip + size / speed) if speed > 0 else COMING_SECONDS
    return min(max(wanted, hedge_seconds(size)), max(COMING_SECONDS, hedge_seconds(size)))


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one block, of one image's layer."""

    image: str
    key: Key
    block: int
    run: range
    start: int  # compressed bytes
    end: int
    why: str


@dataclass(slots=True)
class _Given:
    piece: Piece
    by: Member


@dataclass(slots=True)
class _Asking:
    """Whom a piece is being asked of now; ``coming``: it says that it waits for the registry; times are of the loop."""

    begun: float
    member: Member | None = None
    coming: bool = False
    since: float = 0.0

    def heard(self, coming: bool) -> None:  # noqa: FBT001  what it says
        """It said so; what it then gives, it has time for from now on."""
        if self.coming and not coming:
            self.since = asyncio.get_running_loop().time()
        self.coming = coming

    def asks(self, member: Member) -> None:
        """Another one is asked."""
        self.member, self.coming = member, False


class PeerSource:
    """See `soci_fetcher.source.Source`. ``registry`` is the source behind, ``ztocs`` its zTOCs, ``owned`` our share.

    ``seen`` says of an image's registry what its requests show: bytes a second, seconds of a round trip.
    """

    def __init__(  # noqa: PLR0913  its ways out
        self,
        registry: Source,
        *,
        owned: Owned,
        members: Members,
        client: PeerClient,
        ztocs: ZtocSource,
        seen: Callable[[str], tuple[float, float]],
        publish: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._owned = owned
        self._members = members
        self._client = client
        self._ztocs = ztocs
        self._seen = seen
        self._publish = publish
        self._clock = clock
        self.aside = Aside()
        self._given: deque[_Given] = deque(maxlen=GIVEN_MAX)
        self._doubted: deque[tuple[Digest, int, int]] = deque(maxlen=DOUBTED_MAX)

    async def read(self, image: str, layer: Digest, ztoc: Digest, start: int, end: int, why: str) -> bytes:  # noqa: PLR0913, PLR0917  see Source
        """See `Source`."""
        pieces: list[Piece] = []
        alone = len(self._members.nodes) == 1
        if not alone and not self._is_doubted(layer, start, end):
            with suppress(NotFound, LimitExceeded):  # our folder is gone, or has no room for what we keep for others
                async with self._owned.opened((layer, ztoc)) as found:
                    pieces = _pieces(found, image, (layer, ztoc), (start, end), why)
        if not pieces:
            return await self._registry.read(image, layer, ztoc, start, end, why)
        return _joined(pieces, await _all([self._piece(piece, found.ztoc_size) for piece in pieces]))

    def distrust(self, layer: Digest, start: int, end: int) -> None:
        """See `Source`: a peer that gave of these bytes is left aside for long, and the registry asked."""
        for given in [one for one in self._given if _touches(one.piece, layer, start, end)]:
            self._given.remove(given)
            self._lied(given.by, layer, given.piece.run.start, given.piece.run[-1])
        self._doubted.append((layer, start, end))
        self._registry.distrust(layer, start, end)

    def _lied(self, member: Member, layer: Digest, first: int, last: int) -> None:
        if self.aside.allows(member, self._clock()):  # told once of what it gave at once
            log.warning("a peer gave wrong bytes", node=member.node, url=member.url, layer=layer)
            self._publish(PeerLied(NO_LAUNCH, layer, member.node, member.url, first, last))
        self.aside.lied(member, self._clock())

    def _is_doubted(self, layer: Digest, start: int, end: int) -> bool:
        return any(of == layer and first < end and start < last for of, first, last in self._doubted)

    async def _from_registry(self, piece: Piece) -> bytes:
        return await self._registry.read(piece.image, *piece.key, piece.start, piece.end, piece.why)

    async def _piece(self, piece: Piece, ztoc_size: int) -> bytes:
        asking = _asking()
        cluster = self._from_cluster(piece, ztoc_size, asking)
        if piece.why != MISS:
            try:
                return await cluster
            except RegistryWantedError:
                return await self._from_registry(piece)
        waits = self._waits(key_of(*piece.key, piece.block), piece.end - piece.start, piece.image)
        return await self._hedged(cluster, partial(self._from_registry, piece), asking, waits)

    def _waits(self, key: int, size: int, image: str) -> tuple[float, float]:
        """How long to wait for a silent peer, and for one that is at it."""
        if self._members.choose(key, 1) == [self._members.mine]:
            return math.inf, math.inf  # it is the registry that is waited for
        return hedge_seconds(size), hedge_coming(size, self._seen(image))

    async def _hedged(
        self,
        cluster: Coroutine[Any, Any, T],
        registry: Callable[[], Coroutine[Any, Any, T]],
        asking: _Asking,
        waits: tuple[float, float],
    ) -> T:
        """The cluster's answer, or the registry's where that comes first once one of ``waits`` is over."""
        tasks = [asyncio.create_task(cluster)]
        try:
            answered = await _patiently(tasks[0], asking, *waits)
            if answered and not isinstance(tasks[0].exception(), RegistryWantedError):
                return tasks[0].result()
            tasks.append(asyncio.create_task(registry()))
            pending = {task for task in tasks if not task.done()}
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is None:
                        if not tasks[0].done():
                            self._outrun(asking)
                        return task.result()
            return tasks[1].result()  # raises: the registry's word is the last
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _outrun(self, asking: _Asking) -> None:
        """The registry was quicker than the peer that is being asked."""
        if asking.member is None:
            return
        if asking.coming:
            self._late(asking.member)
        else:
            self._failed(asking.member, "slower than the registry")

    def _late(self, member: Member) -> None:
        if self.aside.late(member, self._clock()):
            log.warning("a peer is always late", node=member.node, url=member.url)

    # --- zTOCs

    async def ztoc(self, ask: PrepareLayer) -> bytes | None:
        """A layer's zTOC, of its digest; None where it is in our own cache now. See `soci_fetcher.layers`."""
        if not 0 < ask.ztoc_size <= REQUEST_BYTES:
            return await self._ztocs(ask)
        asking = _asking()
        waits = self._waits(key_of(ask.layer, ask.ztoc, ZTOC_BLOCK), ask.ztoc_size, ask.image)
        return await self._hedged(self._cluster_ztoc(ask, asking), partial(self._registry_ztoc, ask), asking, waits)

    async def _registry_ztoc(self, ask: PrepareLayer) -> bytes | None:
        return await self._ztocs(ask)

    async def _cluster_ztoc(self, ask: PrepareLayer, asking: _Asking) -> bytes | None:
        key = (ask.layer, ask.ztoc)
        wanted = Wanted(ztoc_path(key), ask.image, ask.ztoc_size, ask.ztoc_size, MISS)
        for member in self._members.choose(key_of(*key, ZTOC_BLOCK)):
            if member == self._members.mine:
                await self._owned.prepare(ask.image, key, ask.ztoc_size)
                return None
            content = await self._ask(member, wanted, asking)
            if content is None:
                continue
            if await in_thread(_has, content, ask.ztoc):
                return content
            self._lied(member, ask.layer, ZTOC_BLOCK, ZTOC_BLOCK)
        asking.member = None
        raise RegistryWantedError("no peer has the zTOC")

    # --- peers

    async def _from_cluster(self, piece: Piece, ztoc_size: int, asking: _Asking) -> bytes:
        """From the owner or its stand-in; `RegistryWantedError` where neither gives it."""
        wanted = Wanted(path_of(piece.key, piece.run), piece.image, ztoc_size, piece.end - piece.start, piece.why)
        for member in self._members.choose(key_of(*piece.key, piece.block)):
            if member == self._members.mine:
                asking.member = None
                return await self._our_own(piece)
            content = await self._ask(member, wanted, asking)
            if content is not None:
                self._given.append(_Given(piece, member))
                return content
        asking.member = None
        raise RegistryWantedError("no peer has it")

    async def _ask(self, member: Member, wanted: Wanted, asking: _Asking) -> bytes | None:
        """What a peer gives; None where it failed, or is left aside."""
        if not self.aside.allows(member, self._clock()):
            return None
        asking.asks(member)
        try:
            content = await self._client.get(member, wanted, asking.heard)
        except PeerLateError:
            self._late(member)
            raise
        except PeerFailedError as error:
            if error.fault:
                self._failed(member, str(error))
            return None
        self.aside.well(member)
        return content

    async def _our_own(self, piece: Piece) -> bytes:
        try:
            return await self._owned.bring(piece.image, piece.key, piece.run, piece.why)
        except (Mismatch, LimitExceeded, FailedPrecondition) as error:
            # Wrong bytes are told by who checks them for the cache; what cannot be kept can still be used.
            raise RegistryWantedError(f"not kept for others: {error}") from error

    def _failed(self, member: Member, why: str) -> None:
        seconds = self.aside.failed(member, self._clock())
        log.warning("a peer is left aside", node=member.node, url=member.url, seconds=seconds, why=why[:300])


def _asking() -> _Asking:
    return _Asking(asyncio.get_running_loop().time())


async def _patiently(task: asyncio.Task[T], asking: _Asking, silent: float, coming: float) -> bool:
    """Wait for a peer's answer as long as one that is ``silent``, or says that bytes are ``coming``, is waited for;
    whether it is there.
    """
    loop = asyncio.get_running_loop()
    while not task.done():
        since = asking.since or asking.begun
        left = (asking.begun + coming if asking.coming else since + silent) - loop.time()
        if left <= 0:
            return False
        await asyncio.wait([task], timeout=min(left, HEDGE_LOOK))
    return True


def _has(content: bytes, digest: Digest) -> bool:
    state = new_hash(digest)
    state.update(content)
    return state.hexdigest() == hex_of(digest)


def _touches(piece: Piece, layer: Digest, start: int, end: int) -> bool:
    return piece.key[0] == layer and piece.start < end and start < piece.end


def _pieces(layer: OpenLayer, image: str, key: Key, extent: tuple[int, int], why: str) -> list[Piece]:
    """The run cut at blocks; empty where the bytes are no whole spans, or more than a peer may be asked for."""
    spans = layer.compressed.spans
    run = run_of(spans, *extent)
    if run is None:
        return []
    pieces = []
    for block, part in blocks(spans, run):
        first, last = spans.compressed(part.start)[0], spans.compressed(part[-1])[1]
        pieces.append(Piece(image, key, block, part, first, last, why))
    return pieces if all(piece.end - piece.start <= REQUEST_BYTES for piece in pieces) else []


async def _all(parts: list[Coroutine[Any, Any, bytes]]) -> list[bytes]:
    """All of them at once; the first error is raised once all have ended."""
    if len(parts) == 1:
        return [await parts[0]]
    results = await asyncio.gather(*parts, return_exceptions=True)
    found = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found


def _joined(pieces: list[Piece], contents: list[bytes]) -> bytes:
    """The run's bytes; neighbouring pieces may share one."""
    if len(pieces) == 1:
        return contents[0]
    whole = bytearray(pieces[-1].end - pieces[0].start)
    for piece, content in zip(pieces, contents, strict=True):
        if len(content) != piece.end - piece.start:
            raise Unavailable(f"{len(content)} bytes for {piece.end - piece.start}")
        whole[piece.start - pieces[0].start : piece.end - pieces[0].start] = content
    return bytes(whole)
