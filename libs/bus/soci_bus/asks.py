# SPDX-License-Identifier: Apache-2.0
"""Every ask our processes can make of one another, and its answer, as plain frozen values.

An ask is request and reply with a deadline, on ``soci.ask.<node>.<verb>``: it fails loudly, with one of
`soci.errors`. Fields are only ever added, with a default, so that old and new processes understand each other.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """The index chosen for an image manifest; ``found_by`` is ``explicit``, ``v2-annotation`` or ``v1-referrer``."""

    index: Digest
    found_by: str
    layers: tuple[IndexedLayer, ...]


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


@dataclass(frozen=True, slots=True)
class SpansFetched:
    """All asked spans are in ``layer.tar`` and their marks are set."""

    requests: int
    compressed_bytes: int  # moved from the registry for this ask; 0 where all were here


@dataclass(frozen=True, slots=True)
class FetchSpans(Ask[SpansFetched]):
    """Fill spans ``first``..``last`` (both included) of a prepared layer. ``why``: ``miss`` or ``read-ahead``."""

    verb: ClassVar[str] = "fetch-spans"
    answer: ClassVar[type] = SpansFetched
    image: str
    layer: Digest
    ztoc: Digest
    first: int
    last: int
    why: str = "miss"


@dataclass(frozen=True, slots=True)
class LayerFetched:
    """The whole compressed blob, its digest checked, as a file on this node."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class FetchLayer(Ask[LayerFetched]):
    """Bring a whole layer blob (for a layer that is not loaded lazily). The asker deletes the file after use."""

    verb: ClassVar[str] = "fetch-layer"
    answer: ClassVar[type] = LayerFetched
    image: str
    layer: Digest


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What the snapshotter needs of an image to unpack a layer itself."""

    layers: tuple[Digest, ...]
    media_types: tuple[str, ...]
    diff_ids: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class ReadImageConfig(Ask[ImageConfig]):
    """The layers of an image manifest with their diff_ids, in order, from manifest and config."""

    verb: ClassVar[str] = "read-image-config"
    answer: ClassVar[type] = ImageConfig
    image: str
    manifest: Digest


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
    """

    verb: ClassVar[str] = "mount-layer"
    answer: ClassVar[type] = LayerMounted
    mount: str
    image: str
    layer: Digest
    ztoc: Digest
    lower: tuple[str, ...] = ()


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
