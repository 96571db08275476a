# SPDX-License-Identifier: Apache-2.0
"""What a zTOC says of its layer, and a file read from the layer by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from soci.digest import Digest, hex_of, new_hash
from soci.errors import InvalidInput, Mismatch, NotFound
from soci.inflate import inflate_span
from soci.span import Spans
from soci.zinfo import parse_tar_zinfo, parse_zinfo
from soci.zstd import parse_zstd_points
from soci.ztoc import TocEntry, Ztoc
from soci_cli.containerd_store import ContainerdStore
from soci_indexing.prefetch import MAX_LINKS, clean


class _WithSpanSize(Protocol):
    @property
    def span_size(self) -> int: ...


_CHECKPOINTS: Final[Mapping[str, Callable[[bytes], _WithSpanSize]]] = {
    "gzip": parse_zinfo,
    "uncompressed": parse_tar_zinfo,
    "zstd": parse_zstd_points,
}


def facts_of(ztoc: Ztoc, size: int) -> dict[str, Any]:
    """What ``soci ztoc info`` prints. ``size`` is that of the zTOC itself, in bytes.

    A file's last span is that of the byte after it. Raises `InvalidZtoc` where the layer cannot be loaded by it.
    """
    spans = Spans.of(ztoc)
    files = [_file(spans, entry) for entry in ztoc.entries]
    return {
        "version": ztoc.version,
        "build_tool": ztoc.build_tool,
        "size": size,
        "span_size": _CHECKPOINTS[ztoc.algorithm](ztoc.checkpoints).span_size,
        "num_spans": spans.count,
        "num_files": len(files),
        "num_multi_span_files": sum(one["start_span"] != one["end_span"] for one in files),
        "files": files,
    }


def _file(spans: Spans, entry: TocEntry) -> dict[str, Any]:
    # A layer of no bytes has no spans; its files, all empty, are said to be in the first one.
    first, last = ((spans.covering(at, 1) or range(1)).start for at in (entry.offset, entry.offset + entry.size))
    return {
        "filename": entry.name.decode("utf-8", "replace"),
        "offset": entry.offset,
        "size": entry.size,
        "type": entry.type,
        "start_span": first,
        "end_span": last,
    }


def find_file(ztoc: Ztoc, name: str) -> TocEntry:
    """The regular file ``name`` of the layer, through hard links. Raises `NotFound`, `InvalidInput`.

    A member of exactly this name goes before one whose clean name is the same; of several the last counts.
    """
    raw = name.encode("utf-8", "surrogateescape")
    exact = {entry.name: entry for entry in ztoc.entries}
    cleaned = {clean(entry.name): entry for entry in ztoc.entries}
    entry = exact.get(raw) or cleaned.get(clean(raw))
    for _ in range(MAX_LINKS):
        if entry is None:
            raise NotFound(f"the zTOC has no file {name!r}")
        if entry.type != "hardlink":
            break
        entry = cleaned.get(clean(entry.linkname))
    if entry is None or entry.type != "reg":
        raise InvalidInput(f"{name!r} is no regular file" + (f" but {entry.type}" if entry else ""))
    return entry


async def extract(
    content: ContainerdStore, layer: Digest, ztoc: Ztoc, entry: TocEntry, write: Callable[[bytes], object]
) -> None:
    """Read a file's spans from the layer and hand its bytes to ``write``, checked, a span at a time.

    Raises `NotFound` where the layer is not here, `Mismatch` where its bytes are others than the zTOC's.
    """
    spans = Spans.of(ztoc)
    at, end = entry.offset, entry.offset + entry.size
    for number in spans.covering(entry.offset, entry.size):
        compressed = await content.read_range(layer, *spans.compressed(number))
        state = new_hash(spans.digest(number))
        state.update(compressed)
        if state.hexdigest() != hex_of(spans.digest(number)):
            raise Mismatch(f"layer {layer}: span {number} holds other bytes than the zTOC says")
        first, last = spans.uncompressed(number)
        write(inflate_span(ztoc, spans, number, compressed)[at - first : end - first])
        at = min(end, last)
    if at != end:
        raise Mismatch(f"layer {layer} ends {end - at} bytes before the file does")
