# SPDX-License-Identifier: Apache-2.0
"""Everything that our processes say has happened, as plain frozen values.

An event goes to ``soci.evt.<node>.<noun>.<id>.<happened>`` and stays in the JetStream stream ``SOCI_EVENTS``. Names are
in the past tense, each noun has one writer, and fields are only ever added, with a default. Events never fail the
work that they tell of: they wait in a bounded queue while the bus is away.

    noun      writer       id
    launch    snapshotter  launch id
    snapshot  snapshotter  snapshot number
    mount     mounter      launch id
    miss      mounter      launch id
    fetch     fetcher      launch id
    cache     fetcher      `NO_LAUNCH`
    index     indexer      job id
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from soci.digest import Digest

NO_LAUNCH = "0" * 32
"""The id under which work is filed that belongs to no launch."""


class Event:
    """Base of all events. ``id`` is the subject's id token."""

    noun: ClassVar[str]
    happened: ClassVar[str]
    __slots__ = ()
    id: str


# --- snapshotter ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaunchStarted(Event):
    """The first sign of a launch: a Prepare for an image. ``by`` is ``pull`` or ``container``."""

    noun: ClassVar[str] = "launch"
    happened: ClassVar[str] = "started"
    id: str
    image: str
    manifest: str
    namespace: str
    by: str


@dataclass(frozen=True, slots=True)
class IndexChosen(Event):
    """Which SOCI index the launch uses, or None, and why."""

    noun: ClassVar[str] = "launch"
    happened: ClassVar[str] = "index-chosen"
    id: str
    index: Digest | None
    found_by: str
    why: str


@dataclass(frozen=True, slots=True)
class ModeChosen(Event):
    """How a layer comes (``lazy``, ``whole``, ``defer``), and why. ``size`` is the blob's, where known."""

    noun: ClassVar[str] = "launch"
    happened: ClassVar[str] = "mode-chosen"
    id: str
    layer: Digest
    mode: str
    why: str
    size: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class ContainerPrepared(Event):
    """A writable snapshot over the image's layers was made: a container is about to start."""

    noun: ClassVar[str] = "launch"
    happened: ClassVar[str] = "container-prepared"
    id: str
    key: str
    layers: int
    lazy: int


@dataclass(frozen=True, slots=True)
class SnapshotChanged(Event):
    """One line of the node's snapshot log, published from its outbox. ``what`` is ``prepared``, ``committed``, …"""

    noun: ClassVar[str] = "snapshot"
    happened: ClassVar[str] = "changed"
    id: str
    sequence: int
    what: str
    name: str
    parent: str


# --- mounter ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerShown(Event):
    """A lazy layer is visible as a directory."""

    noun: ClassVar[str] = "mount"
    happened: ClassVar[str] = "shown"
    id: str
    mount: str
    layer: Digest
    entries: int
    spans: int
    present: int
    seconds: float
    way: str = "fuse"  # or "erofs", "native"
    why: str = ""  # this way


@dataclass(frozen=True, slots=True)
class Missed(Event):
    """A read had to wait for bytes. ``path`` is the file inside the layer; ``failed`` is empty on success."""

    noun: ClassVar[str] = "miss"
    happened: ClassVar[str] = "ended"
    id: str
    mount: str
    layer: Digest
    path: str
    first: int
    last: int
    seconds: float
    failed: str = ""


# --- fetcher ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpansArrived(Event):
    """Spans came over the wire, were checked and put into ``layer.tar``."""

    noun: ClassVar[str] = "fetch"
    happened: ClassVar[str] = "arrived"
    id: str
    layer: Digest
    first: int
    last: int
    why: str
    compressed_bytes: int
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SpanRejected(Event):
    """Bytes of a span did not match what its zTOC promises; they were thrown away."""

    noun: ClassVar[str] = "fetch"
    happened: ClassVar[str] = "rejected"
    id: str
    layer: Digest
    span: int
    why: str


@dataclass(frozen=True, slots=True)
class LayerArrived(Event):
    """A whole layer blob came over the wire and matched its digest."""

    noun: ClassVar[str] = "fetch"
    happened: ClassVar[str] = "layer-arrived"
    id: str
    layer: Digest
    compressed_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FetchFailed(Event):
    """The registry could not give what was asked. ``what`` names it, ``why`` is the error's text."""

    noun: ClassVar[str] = "fetch"
    happened: ClassVar[str] = "failed"
    id: str
    layer: Digest
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class PeerLied(Event):
    """Another node's fetcher gave bytes that are not what the zTOC promises; it is left aside for a while."""

    noun: ClassVar[str] = "fetch"
    happened: ClassVar[str] = "peer-lied"
    id: str
    layer: Digest
    node: str
    url: str
    first: int  # spans that it was asked for; -1: the zTOC
    last: int


# --- keeper of the span cache, in the fetcher ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerCompleted(Event):
    """All of a layer is here. ``proven``: it is what its diff_id promises; not, where no diff_id is known."""

    noun: ClassVar[str] = "cache"
    happened: ClassVar[str] = "layer-completed"
    id: str
    layer: Digest
    ztoc: Digest
    proven: bool
    size: int  # bytes, uncompressed


@dataclass(frozen=True, slots=True)
class LayerRefused(Event):
    """All of a layer is here, and is not what its diff_id promises: no byte of it is served any more."""

    noun: ClassVar[str] = "cache"
    happened: ClassVar[str] = "layer-refused"
    id: str
    layer: Digest
    ztoc: Digest
    why: str


@dataclass(frozen=True, slots=True)
class SpaceFreed(Event):
    """Room was made. ``why``: ``unused``, ``budget``, ``disk-full`` or ``asked``. ``over``: bytes still too many."""

    noun: ClassVar[str] = "cache"
    happened: ClassVar[str] = "freed"
    id: str
    why: str
    layers: int
    spans: int
    freed: int
    used: int
    budget: int
    over: int = 0


# --- indexer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexBegun(Event):
    """An indexer took the job."""

    noun: ClassVar[str] = "index"
    happened: ClassVar[str] = "begun"
    id: str
    image: str


@dataclass(frozen=True, slots=True)
class LayerIndexed(Event):
    """One layer of the job's image has its zTOC, or was skipped for the reason in ``skipped``."""

    noun: ClassVar[str] = "index"
    happened: ClassVar[str] = "layer-indexed"
    id: str
    layer: Digest
    ztoc: Digest | None
    ztoc_size: int
    layer_size: int
    skipped: str
    seconds: float


@dataclass(frozen=True, slots=True)
class IndexMade(Event):
    """The job is done: the SOCI index is in the registry. ``discovery`` is ``referrers`` or ``tag``."""

    noun: ClassVar[str] = "index"
    happened: ClassVar[str] = "made"
    id: str
    image: str
    index: Digest
    manifest: Digest
    discovery: str


@dataclass(frozen=True, slots=True)
class IndexFailed(Event):
    """The job ended without an index; ``code`` and ``why`` are the error's."""

    noun: ClassVar[str] = "index"
    happened: ClassVar[str] = "failed"
    id: str
    image: str
    code: str
    why: str


ALL: tuple[type[Event], ...] = (
    LaunchStarted,
    IndexChosen,
    ModeChosen,
    ContainerPrepared,
    SnapshotChanged,
    LayerShown,
    Missed,
    SpansArrived,
    SpanRejected,
    LayerArrived,
    FetchFailed,
    PeerLied,
    LayerCompleted,
    LayerRefused,
    SpaceFreed,
    IndexBegun,
    LayerIndexed,
    IndexMade,
    IndexFailed,
)
BY_NAME: dict[tuple[str, str], type[Event]] = {(cls.noun, cls.happened): cls for cls in ALL}
