# SPDX-License-Identifier: Apache-2.0
"""Whether a complete layer may be handed to the kernel: do all headers of its tar say what its table of contents says?

While a layer is read through us, a file's header is compared before its first byte is served (`soci_mounter.headers`).
The kernel compares nothing. So before it gets ``layer.tar`` itself, all headers are walked over, once; what came of it
stands in the layer's folder, as ``headers``:

    agree             or
    differ: <what>
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from soci.digest import Digest
from soci.entries import Entries, Slices
from soci.errors import Mismatch, SociError
from soci.tar import TarWalker
from soci.times_bulk import parse_times
from soci_cache import LayerStore, locks
from soci_cache.files import disk, replace
from soci_mounter.headers import XATTR_RECORD

FILE: Final = "headers"
AGREE: Final = "agree"
DIFFER: Final = "differ: "
MOST_SAID: Final = 1000
"""Characters of the file."""
PIECE: Final = 1 << 18
"""Bytes of the tar that are read at a time; data of files that lies behind them is passed over."""


def found_before(place: Path) -> str | None:
    """What came of the proof of the layer in this folder: `AGREE`, or what differs; None where there was none yet."""
    try:
        with (place / FILE).open("rb") as file:
            said = file.read(MOST_SAID).decode(errors="replace")
    except OSError:
        return None
    return said if said == AGREE or said.startswith(DIFFER) else None


def prove(store: LayerStore, layer: Digest, ztoc: Digest, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """Walk over the headers of a layer, if it is complete, and note what came of it; None where nothing did.

    Blocks for about as long as the layer's zTOC takes to read. Raises `SociError` where the layer cannot be read.
    """
    with store.read(layer, ztoc) as reader, disk(reader.directory):
        evictions = reader.evictions
        try:
            found = walk(reader.fileno(), reader.spans.uncompressed_size, stopped)
            if found is None:
                return None
            compare(Entries.of(reader.ztoc.entries), found)
            said = AGREE
        except SociError as error:
            said = f"{DIFFER}{error}"[: MOST_SAID // 4]
        with locks.folder(reader.directory):
            if not reader.complete() or reader.evictions != evictions:  # what was walked over may have been holes
                return None
            replace(reader.directory, FILE, said.encode(errors="replace"))
            return said


def walk(tar: int, size: int, stopped: Callable[[], bool] = lambda: False) -> Entries | None:
    """The members of an open tar, from its headers alone; None where it was ``stopped``.

    Raises `SociError` for a tar that no builder of zTOCs takes, OSError where the disk fails.
    """
    walker, at = TarWalker(compat=True), 0
    while at < size and not walker.ended:
        piece = os.pread(tar, min(PIECE, size - at), at)
        if not piece:
            raise Mismatch(f"the layer's tar is cut short: {at} bytes of {size}")
        if stopped():
            return None
        walker.feed(piece)
        at += len(piece) + walker.skip()
    walker.finish()
    return walker.entries


def compare(promised: Entries, found: Entries) -> None:
    """Raises `Mismatch`, with the first member that differs, where two tables do not say the same of one tar. Pure."""
    if len(promised) != len(found):
        raise Mismatch(f"the tar has {len(found)} members, its table of contents {len(promised)}")
    ours, theirs = _facts(promised), _facts(found)
    for name, column in ours.items():
        if column != theirs[name]:
            at = next(at for at, (one, other) in enumerate(zip(column, theirs[name], strict=True)) if one != other)
            raise Mismatch(f"the tar header of {promised.names[at][:200]!r} has another {name}")


def _facts(entries: Entries) -> dict[str, list[Any]]:
    """As `soci_mounter.headers` compares them. Type bits inside the mode field mean nothing."""
    seconds, fractions = parse_times(Slices.of(entries.times))
    return {
        "name": list(entries.names),
        "type": list(entries.types),
        "place": list(entries.offsets),
        "size": list(entries.sizes),
        "link target": list(entries.links),
        "mode": [mode & 0o7777 for mode in entries.modes],
        "owner": list(zip(entries.uids, entries.gids, strict=True)),
        "device": list(zip(entries.majors, entries.minors, strict=True)),
        "mtime": list(zip(seconds.tolist(), fractions.tolist(), strict=True)),
        "xattrs": _xattrs(entries),
    }


def _xattrs(entries: Entries) -> list[Any]:
    found: list[Any] = [None] * len(entries)
    for at, records in entries.pax.items():
        found[at] = {key: value for key, value in records.items() if key.startswith(XATTR_RECORD)} or None
    return found
