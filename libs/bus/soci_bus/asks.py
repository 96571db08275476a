# SPDX-License-Identifier: Apache-2.0
"""Every ask our processes can make of one another, and its answer, as plain frozen values.

An ask is request and reply with a deadline, on ``soci.ask.<node>.<verb>``: it fails loudly, with one of
`soci.errors`. Fields are only ever added, with a default, so that old and new processes understand each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from soci.digest import Digest
from soci.launch import LaunchId

Answer = TypeVar("Answer")


class Ask(Generic[Answer]):
    """Base of all asks. ``verb`` ends the subject; ``answer`` is the class of the reply."""

    verb: ClassVar[str]
    answer: ClassVar[type]
    __slots__ = ()


# --- fetcher: the registry's door -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexedLayer:
    """One zTOC of an index: for which layer, which blob, how many bytes."""

    layer: Digest
    ztoc: Digest
    ztoc_size: int


@dataclass(frozen=True, slots=True)
class IndexFound:
    """The index chosen for an image manifest; ``found_by`` is ``explicit``, ``v2-annotation`` or ``v1-referrer``.

    With it comes what was seen of the way to its registry: bytes a second, and seconds of a round trip. 0: nothing yet.
    """

    index: Digest
    found_by: str
    layers: tuple[IndexedLayer, ...]
    bytes_per_second: float = 0.0
    round_trip: float = 0.0


@dataclass(frozen=True, slots=True)
class FindIndex(Ask[IndexFound]):
    """Which SOCI index belongs to this image manifest? Raises `NoIndex` with the reason."""

    verb: ClassVar[str] = "find-index"
    answer: ClassVar[type] = IndexFound
    image: str
    manifest: Digest
    explicit: Digest | None = None


@dataclass(frozen=True, slots=True)
class LayerPrepared:
    """The layer's directory in the span cache holds its zTOC, checked; reads may begin."""

    directory: str
    spans: int
    present: int  # spans already here


@dataclass(frozen=True, slots=True)
class PrepareLayer(Ask[LayerPrepared]):
    """Bring the layer's zTOC into the span cache and check that it can be mounted (spec/ztoc.md §8)."""

    verb: ClassVar[str] = "prepare-layer"
    answer: ClassVar[type] = LayerPrepared
    image: str
    layer: Digest
    layer_size: int | None  # bytes of the blob, where the client told
    ztoc: Digest
    ztoc_size: int
    diff_id: Digest | None = None  # of the whole uncompressed layer, where the image says it


@dataclass(frozen=True, slots=True)
class SpansFetched:
    """All asked spans are in ``layer.tar`` and their marks are set."""

    requests: int
    compressed_bytes: int  # moved from the registry for this ask; 0 where all were here


@dataclass(frozen=True, slots=True)
class FetchSpans(Ask[SpansFetched]):
    """Fill spans ``first``..``last`` (both included) of a prepared layer.

    ``why``: ``miss``, ``read-ahead``, ``load-order`` or ``fill``, the most urgent first. The ``ahead`` spans behind
    ``last`` are brought as read-ahead, and not waited for.
    """

    verb: ClassVar[str] = "fetch-spans"
    answer: ClassVar[type] = SpansFetched
    image: str
    layer: Digest
    ztoc: Digest
    first: int
    last: int
    why: str = "miss"
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class LayerFetched:
    """The whole compressed blob, its digest checked, as a file on this node."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class FetchLayer(Ask[LayerFetched]):
    """Bring a whole layer blob into a file of this node, which the asker deletes after use.

    ``size`` is that of the blob, where it is known. ``path`` is a file that the asker has announced
    (`soci_cache.arriving`), and may read from while it is filled; empty: the answer names a file.
    The same ask again while the first one is under way is answered with it.
    """

    verb: ClassVar[str] = "fetch-layer"
    answer: ClassVar[type] = LayerFetched
    image: str
    layer: Digest
    size: int | None = None
    path: str = ""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What the snapshotter needs of an image to unpack a layer itself."""

    layers: tuple[Digest, ...]
    media_types: tuple[str, ...]
    diff_ids: tuple[Digest, ...]
    sizes: tuple[int, ...] = ()  # bytes of the blobs, as the manifest has them


@dataclass(frozen=True, slots=True)
class ReadImageConfig(Ask[ImageConfig]):
    """The layers of an image manifest with their diff_ids, in order, from manifest and config."""

    verb: ClassVar[str] = "read-image-config"
    answer: ClassVar[type] = ImageConfig
    image: str
    manifest: Digest


@dataclass(frozen=True, slots=True)
class CacheFreed:
    """What the keeper of the span cache did, or would do: folders that went, spans that went from others, bytes."""

    layers: tuple[tuple[Digest, Digest], ...] = ()  # layer, zTOC
    spans: int = 0
    freed: int = 0  # bytes
    used: int = 0  # bytes, afterwards
    budget: int = 0  # bytes
    incomplete: str = ""  # why less was freed than could have been


@dataclass(frozen=True, slots=True)
class FreeCache(Ask[CacheFreed]):
    """Free what no snapshot uses, and what is above the budget.

    ``at_once`` leaves out the grace of layers that were used a moment ago, ``dry_run`` only tells. With ``wait`` false
    it is done a little later, and the answer is empty: for who must not wait.
    """

    verb: ClassVar[str] = "free-cache"
    answer: ClassVar[type] = CacheFreed
    at_once: bool = False
    dry_run: bool = False
    wait: bool = True


# --- snapshotter: containerd's door -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoginFound:
    """What a client of the image service handed over for an image. No ``username``: an identity token.

    The secret stays out of logs, events and traces: this class never shows it.
    """

    username: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class FindLogin(Ask[LoginFound]):
    """Which login did the image service (CRI's ``PullImage``) bring for this repository? `NotFound` where none.

    ``registry`` is the host that asks for the login, as images name it (``docker.io``, ``host:port``).
    """

    verb: ClassVar[str] = "find-login"
    answer: ClassVar[type] = LoginFound
    registry: str
    repository: str


@dataclass(frozen=True, slots=True)
class UsedLayer:
    """A lazy layer that snapshots use, with an image that it may be fetched from."""

    image: str
    layer: Digest
    ztoc: Digest
    ztoc_size: int


@dataclass(frozen=True, slots=True)
class LayersUsed:
    """One page of `LayersInUse`. ``next`` is the ``after`` of the page behind it; empty: this is the last.

    Pages are one answer only where their ``generation`` is the same: it differs once other layers are in use.
    """

    layers: tuple[UsedLayer, ...]
    generation: str
    next: str = ""


@dataclass(frozen=True, slots=True)
class LayersInUse(Ask[LayersUsed]):
    """Which lazy layers do the snapshots of this node use? Each once, in pages; the first has ``after`` empty."""

    verb: ClassVar[str] = "layers-in-use"
    answer: ClassVar[type] = LayersUsed
    after: str = ""


# --- mounter: the kernel's door ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerMounted:
    """The directory that shows the layer."""

    path: str


@dataclass(frozen=True, slots=True)
class MountLayer(Ask[LayerMounted]):
    """Show a prepared layer as a directory. Repeating it with the same values gives the same answer.

    ``mount`` names the directory (one path component, chosen by the snapshotter). ``lower`` are the directories
    of the layers below, nearest first: directories that the layer implies but does not list take their
    attributes from there, as an unpacked layer would.

    ``uid_map`` and ``gid_map`` (both or neither) show owners as a user namespace has them: extents of
    ``(container id, host id, length)``, see `soci.idmap`. ``user_xattrs`` marks opaque directories by
    ``user.overlay.opaque``, for an overlayfs that was mounted with ``userxattr``.
    """

    verb: ClassVar[str] = "mount-layer"
    answer: ClassVar[type] = LayerMounted
    mount: str
    image: str
    layer: Digest
    ztoc: Digest
    lower: tuple[str, ...] = ()
    uid_map: tuple[tuple[int, int, int], ...] = ()
    gid_map: tuple[tuple[int, int, int], ...] = ()
    user_xattrs: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """The answer of asks that have nothing to tell but success."""


@dataclass(frozen=True, slots=True)
class UnmountLayer(Ask[Done]):
    """Take the directory away. A mount that is not there is success."""

    verb: ClassVar[str] = "unmount-layer"
    answer: ClassVar[type] = Done
    mount: str


@dataclass(frozen=True, slots=True)
class MountsShown:
    """Which of the asked mounts are alive."""

    alive: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckMounts(Ask[MountsShown]):
    """Are these mounts alive?"""

    verb: ClassVar[str] = "check-mounts"
    answer: ClassVar[type] = MountsShown
    mounts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShownLayer:
    """One mount. ``way``: ``fuse``, ``erofs`` or ``native``, and why; ``state`` is that of the layer in the cache."""

    mount: str
    image: str
    layer: Digest
    ztoc: Digest
    way: str
    why: str
    state: str  # as `soci cache ls` says it; ``native`` where the kernel reads the layer's file itself
    here: int  # spans
    spans: int
    size: int  # bytes that the layer's files take of the disk


@dataclass(frozen=True, slots=True)
class LayersShown:
    """One page of `ShownLayers`, in the order of mounts. ``next`` is the ``after`` of the page behind it, if any."""

    layers: tuple[ShownLayer, ...]
    next: str = ""


@dataclass(frozen=True, slots=True)
class ShownLayers(Ask[LayersShown]):
    """Which layers are mounted, and how? In pages; the first has ``after`` empty."""

    verb: ClassVar[str] = "shown-layers"
    answer: ClassVar[type] = LayersShown
    after: str = ""


@dataclass(frozen=True, slots=True)
class AttachLaunch(Ask[Done]):
    """From now on, misses of these mounts belong to this launch (the trace of this ask)."""

    verb: ClassVar[str] = "attach-launch"
    answer: ClassVar[type] = Done
    launch: LaunchId
    mounts: tuple[str, ...]


# --- indexer: the builder's door --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexBuilt:
    """The SOCI index that was built and pushed."""

    index: Digest
    manifest: Digest
    indexed: tuple[IndexedLayer, ...]
    skipped: tuple[tuple[Digest, str], ...]  # layer, reason
    discovery: str  # "referrers" or "tag"


@dataclass(frozen=True, slots=True)
class BuildIndex(Ask[IndexBuilt]):
    """Index an image straight from its registry and push the index beside it.

    Sent as a job (``soci.job.build-index.<id>``): it may take minutes, and survives the indexer's restart.
    """

    verb: ClassVar[str] = "build-index"
    answer: ClassVar[type] = IndexBuilt
    image: str
    platform: str = "linux/amd64"
    span_size: int = 1 << 22
    min_layer_size: int = 10 << 20
    by: str = "user"  # or "webhook": nobody waits, and what needs no index is passed over in silence
