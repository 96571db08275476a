# SPDX-License-Identifier: Apache-2.0
"""A launch as its events tell it: a pure fold, the same for the command line and for any page.

Events of different writers arrive in any order, and a launch that lost some is still shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from soci.digest import Digest
from soci_bus import events
from soci_bus.wire import Envelope

MISSES_SHOWN = 10_000
"""Misses of one launch that are kept as a list; all are counted."""
FAILURES_SHOWN = 1_000
"""Failures of one launch that are kept as texts."""
LAYERS_SHOWN = 1_000
"""Layers of one launch that are told apart: many times what an image may have. The rest is counted together."""
OTHER_LAYERS = Digest("")


@dataclass(slots=True)
class LayerView:
    """How one layer came."""

    layer: Digest
    mode: str
    why: str
    size: int | None = None  # bytes of the blob, where the client told
    seconds: float = 0.0  # the Prepare took
    fetched_bytes: int = 0
    requests: int = 0
    misses: int = 0


@dataclass(slots=True)
class MissView:
    """A read that had to wait. Times in seconds, from the launch's start."""

    at: float
    seconds: float
    layer: Digest
    path: str
    first: int
    last: int
    failed: str


@dataclass(slots=True)
class LaunchView:
    """One launch. Times in seconds, from its start."""

    id: str
    image: str = ""
    manifest: str = ""
    namespace: str = ""
    node: str = ""
    by: str = ""
    started_ns: int = 0
    index: str | None = None
    found_by: str = ""
    no_index: str = ""
    container_at: float | None = None
    last_event_at: float = 0.0
    layers: list[LayerView] = field(default_factory=list)
    misses: list[MissView] = field(default_factory=list)
    miss_count: int = 0
    waited: float = 0.0  # seconds that reads waited, added up (they overlap)
    failed_reads: int = 0
    fetched_bytes: int = 0
    requests: int = 0
    rejected_spans: int = 0
    failures: list[str] = field(default_factory=list)

    def layer(self, digest: Digest) -> LayerView:
        """The layer's view; one that a launch only reads was shown by an earlier one."""
        if len(self.layers) >= LAYERS_SHOWN and all(view.layer != digest for view in self.layers):
            digest = OTHER_LAYERS
        for view in self.layers:
            if view.layer == digest:
                return view
        view = LayerView(digest, "lazy", "shown by an earlier launch" if digest else "all further layers")
        self.layers.append(view)
        return view

    def count(self, mode: str) -> int:
        """How many layers came that way."""
        return sum(view.mode == mode for view in self.layers)


def fold_launch(launch: str, history: Iterable[Envelope]) -> LaunchView | None:
    """The view of one launch from its events; None where there are none."""
    ordered = sorted(history, key=lambda envelope: (envelope.at_ns, envelope.sequence))
    if not ordered:
        return None
    view = LaunchView(launch, started_ns=ordered[0].at_ns, node=ordered[0].node)
    starts = [envelope for envelope in ordered if isinstance(envelope.event, events.LaunchStarted)]
    if starts:
        view.started_ns = starts[0].at_ns
    for envelope in ordered:  # layers stand as they were prepared, though the bytes of an upper one may come before
        if isinstance(envelope.event, events.ModeChosen):
            view.layer(envelope.event.layer)
    for envelope in ordered:
        at = (envelope.at_ns - view.started_ns) / 1e9
        view.last_event_at = max(view.last_event_at, at)
        _apply(view, envelope, at)
    return view


def _apply(view: LaunchView, envelope: Envelope, at: float) -> None:  # noqa: C901, PLR0912  one case an event
    match envelope.event:
        case events.LaunchStarted() as event:
            if not view.image:
                view.image, view.manifest, view.namespace = event.image, event.manifest, event.namespace
                view.by, view.node = event.by, envelope.node
        case events.IndexChosen() as event:
            view.index, view.found_by, view.no_index = event.index, event.found_by, event.why
        case events.ModeChosen() as event:
            layer = view.layer(event.layer)
            layer.mode, layer.why, layer.size, layer.seconds = event.mode, event.why, event.size, event.seconds
        case events.ContainerPrepared():
            view.container_at = at if view.container_at is None else view.container_at
        case events.Missed() as event:
            view.miss_count += 1
            view.waited += event.seconds
            view.layer(event.layer).misses += 1
            if event.failed:
                view.failed_reads += 1
            if len(view.misses) < MISSES_SHOWN:
                span = (event.first, event.last, event.failed)
                view.misses.append(MissView(at - event.seconds, event.seconds, event.layer, event.path, *span))
        case events.SpansArrived() as event:
            _fetched(view, event.layer, event.compressed_bytes, event.requests)
        case events.LayerArrived() as event:
            _fetched(view, event.layer, event.compressed_bytes, 1)
        case events.SpanRejected():
            view.rejected_spans += 1
        case events.FetchFailed() as event:
            if len(view.failures) < FAILURES_SHOWN:
                view.failures.append(f"{event.what} of {event.layer}: {event.why}")
        case _:
            pass


def _fetched(view: LaunchView, digest: Digest, size: int, requests: int) -> None:
    layer = view.layer(digest)
    layer.fetched_bytes += size
    layer.requests += requests
    view.fetched_bytes += size
    view.requests += requests
