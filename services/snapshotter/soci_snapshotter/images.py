# SPDX-License-Identifier: Apache-2.0
"""What is known of an image while it is pulled, asked once for all its layers; and work begun before it is called for.

containerd prepares an image's layers one after another, from the bottom. At the first of them we know which follow,
and how each will come: the lazy ones have their zTOCs brought, the whole ones are downloaded and unpacked side by side.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from soci.digest import Digest
from soci.errors import DeadlineExceeded, NoIndex, SociError
from soci.launch import TraceParent
from soci.reference import parse_reference
from soci_bus.asks import Answer, Ask, FindIndex, ImageConfig, IndexFound, PrepareLayer, ReadImageConfig
from soci_cache import LayerStore
from soci_runtime.flights import Flights, join
from soci_runtime.logs import log
from soci_snapshotter.ahead import Ahead, place_of
from soci_snapshotter.away import Asking
from soci_snapshotter.estimate import Link, Need
from soci_snapshotter.history import History
from soci_snapshotter.labels import RemoteLabels
from soci_snapshotter.mode import Defer, Facts, Lazy, Mode, Rules, Whole, choose
from soci_snapshotter.whole import WantedLayer

IMAGES_KEPT = 256
"""Images whose facts are kept; the one unused for longest goes first."""
IMAGE_TTL = 60.0
"""Seconds for which an image's facts are kept after they were asked for: a pull is mostly shorter. That there is no
index is not kept at all here: the fetchers remember it, for as long as ``index_failure_ttl_sec`` says."""
AHEAD_AT_ONCE = 8
"""zTOCs that are asked for ahead at a time."""
ANSWER_GRACE = 1.0
"""Seconds beyond a call's end in which an answer is waited for: a late one mostly says why it is late."""

T = TypeVar("T")


class WholeJobs(Protocol):
    """What is needed here of `soci_snapshotter.whole.WholeLayers`."""

    def begin(
        self,
        image: str,
        manifest: Digest,
        wanted: Sequence[WantedLayer],
        trace: TraceParent | None = None,
        *,
        namespace: str = "",
    ) -> None:
        """Start to bring these layers, in this order."""
        ...


@dataclass(slots=True)
class Image:
    """What is known of an image now."""

    index: IndexFound | None = None
    no_index: str = ""
    config: ImageConfig | None = None
    no_config: str = ""
    link: Link | None = None

    def place(self, layer: Digest) -> int | None:
        """Where the layer is in the image, from the bottom; None where the image does not say."""
        if self.config is None or layer not in self.config.layers:
            return None
        return self.config.layers.index(layer)

    def size(self, layer: Digest) -> int | None:
        """Bytes of the layer's blob, where the manifest was read."""
        place = self.place(layer)
        return (
            self.config.sizes[place] if self.config and place is not None and place < len(self.config.sizes) else None
        )

    def diff_id(self, layer: Digest) -> Digest | None:
        """The digest of the layer's uncompressed bytes, where the config was read."""
        place = self.place(layer)
        if self.config is None or place is None or place >= len(self.config.diff_ids):
            return None
        return self.config.diff_ids[place]

    def wanted(self, layer: Digest) -> WantedLayer | None:
        """The layer as a whole one; None where its diff_id is not known."""
        place = self.place(layer)
        if self.config is None or place is None:
            return None
        if place >= min(len(self.config.media_types), len(self.config.diff_ids)):
            return None
        return WantedLayer(layer, self.size(layer), self.config.media_types[place], self.config.diff_ids[place])


@dataclass(slots=True)
class _Known:
    until: float
    index: asyncio.Future[IndexFound] | None = None
    config: asyncio.Future[ImageConfig] | None = None
    ahead: Ahead = field(default_factory=Ahead)


class Images:
    """The images that are being pulled. Bookkeeping is done between two awaits, so it needs no lock."""

    def __init__(  # noqa: PLR0913, PLR0917  its ways out
        self,
        bus: Asking,
        flights: Flights,
        whole: WholeJobs,
        history: History,
        cache: LayerStore,
        rules: Rules,
        *,
        timeout: float,
        ahead_at_once: int = AHEAD_AT_ONCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._flights = flights
        self._whole = whole
        self._history = history
        self._cache = cache
        self._rules = rules
        self._timeout = timeout
        self._clock = clock
        self._known: OrderedDict[tuple[str, Digest, Digest | None, str], _Known] = OrderedDict()
        self._ahead = asyncio.Semaphore(ahead_at_once)

    async def facts(self, labels: RemoteLabels, trace: TraceParent, ends: float, *, below: int) -> tuple[Image, Facts]:
        """What the decision about this layer, over ``below`` others, needs; on the way, work on the layers above it is
        begun.
        """
        known = self._of(labels)
        image = Image()
        # both under way before either is waited for; a failure is not kept here
        config = _good(known.config) or self._ask(ReadImageConfig(labels.image, labels.manifest), trace)
        known.config = config
        if not self._rules.always_whole:
            ask = FindIndex(labels.image, labels.manifest, labels.explicit_index)
            index = _good(known.index) or self._ask(ask, trace)
            known.index = index
            try:
                image.index = await _until(index, ends)
                image.link = await asyncio.to_thread(self._link, labels.image, image.index)
            except NoIndex as error:
                image.no_index = str(error)
            except SociError as error:
                image.no_index = f"no index could be looked for: {error}"
        if image.index or self._rules.always_whole or self._rules.whole_without_index:
            try:
                image.config = await _until(config, ends)
            except SociError as error:
                image.no_config = str(error)
        facts = await asyncio.to_thread(self._facts, image, labels.layer, labels.size)
        if not isinstance(choose(facts, self._rules), Defer):  # else containerd brings all that follow
            await self._look_ahead(known, image, labels, facts, trace, below=below)
        return image, facts

    def saw_need(self, layers: Sequence[tuple[Digest, Digest]]) -> None:
        """Note what launches have needed of lazy layers (layer, zTOC) by now. Returns at once: nobody waits for it."""
        self._flights.start("a note of what was needed", asyncio.to_thread(self._note_need, layers))

    def _note_need(self, layers: Sequence[tuple[Digest, Digest]]) -> None:
        for layer, ztoc in layers:
            here = self._cache.here(layer, ztoc)
            if here and here.present:
                self._history.saw_need(layer, Need(here.share, here.runs))

    async def _look_ahead(  # noqa: PLR0913  what is known of the call
        self, known: _Known, image: Image, labels: RemoteLabels, facts: Facts, trace: TraceParent, *, below: int
    ) -> None:
        """Begin with this layer, of which ``facts`` are known, and those above it: they are called for next."""
        config = image.config
        place = place_of(labels.layer, below, config.layers) if config else None
        if config is None or place is None:
            return
        layers = [config.layers[one] for one in known.ahead.call(place, len(config.layers))]

        def of(layer: Digest) -> Mode:
            return choose(facts if layer == labels.layer else self._facts(image, layer), self._rules)

        modes = await asyncio.to_thread(lambda: [of(layer) for layer in layers])
        whole: list[WantedLayer] = []
        for layer, mode in zip(layers, modes, strict=True):
            wanted = image.wanted(layer) if isinstance(mode, Whole) else None
            if wanted:
                whole.append(wanted)
            elif isinstance(mode, Lazy) and layer != labels.layer:
                size = image.size(layer)
                ztoc, diff_id = mode.ztoc, image.diff_id(layer)
                ask = PrepareLayer(labels.image, layer, size, ztoc.ztoc, ztoc.ztoc_size, diff_id)
                self._flights.start(f"the zTOC of {layer}", self._prepare_ahead(ask, trace))
        if whole:
            self._whole.begin(labels.image, labels.manifest, whole, trace, namespace=labels.namespace)

    async def _prepare_ahead(self, ask: PrepareLayer, trace: TraceParent) -> None:
        try:
            async with self._ahead:
                await self._bus.ask(ask, timeout=self._timeout, trace=trace)
        except SociError as error:  # it is asked for again when the layer's turn comes, and counts then
            log.debug("a zTOC did not come ahead of time", layer=ask.layer, error=error)

    def _facts(self, image: Image, layer: Digest, size: int | None = None) -> Facts:
        """The facts about one layer. Looks at the cache's maps and the history: blocks on the disk."""
        indexed = next((one for one in image.index.layers if one.layer == layer), None) if image.index else None
        here = self._cache.here(layer, indexed.ztoc) if indexed else None
        known = image.size(layer)
        return Facts(
            layer,
            index=image.index,
            no_index=image.no_index,
            size=size if known is None else known,
            here=here.share_here if here else 0.0,
            table=indexed.ztoc_size if indexed and not here else 0,
            link=image.link,
            need=self._history.need(layer) if indexed else None,
        )

    def _link(self, image: str, index: IndexFound) -> Link | None:
        """The link to the image's registry, as a fetcher sees it now, else as one saw it last. Blocks on the disk."""
        registry = parse_reference(image).registry
        if index.bytes_per_second <= 0:
            return self._history.link(registry)
        link = Link(index.bytes_per_second, index.round_trip)
        self._history.saw_link(registry, link)
        return link

    def _ask(self, ask: Ask[Answer], trace: TraceParent) -> asyncio.Future[Answer]:
        """Ask once for all who want to know; the first who asks lends the trace."""
        return self._flights.start(f"the {ask.verb} ask", self._bus.ask(ask, timeout=self._timeout, trace=trace))

    def _of(self, labels: RemoteLabels) -> _Known:
        key = (labels.image, labels.manifest, labels.explicit_index, labels.namespace)
        known = self._known.get(key)
        now = self._clock()
        if known is None or known.until <= now:
            known = self._known[key] = _Known(now + IMAGE_TTL)
        self._known.move_to_end(key)
        while len(self._known) > IMAGES_KEPT:
            self._known.popitem(last=False)
        return known


def _good(answer: asyncio.Future[T] | None) -> asyncio.Future[T] | None:
    """The answer, if it is no failure and may still come."""
    failed = answer is not None and answer.done() and answer.exception() is not None
    return None if failed else answer


async def _until(answer: asyncio.Future[T], ends: float) -> T:
    """Wait for what others wait for too, at most until the loop's time ``ends``."""
    try:
        async with asyncio.timeout_at(ends + ANSWER_GRACE):
            return await join(answer)
    except TimeoutError as error:
        raise DeadlineExceeded("there was no answer within mount_timeout_sec") from error
