# SPDX-License-Identifier: Apache-2.0
"""Writing a zTOC by the stock FlatBuffers builder, object by object: slow, and the truth about the bytes.

FlatBuffers are written from the end to the front, so the order in which objects are made is the order of the bytes.
It is the format's own order here: two builders of one layer must come to the same digest.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import flatbuffers
from flatbuffers.builder import BuilderSizeError

from soci.errors import InvalidZtoc, LimitExceeded
from soci.toc import MAX_ENTRIES, MAX_ZTOC_BYTES, TocEntry, Ztoc

_ALGORITHMS: Final = {"gzip": 1, "uncompressed": 2, "zstd": 3}
_GZIP: Final = 1  # the schema's default, hence not written


def encode_ztoc(ztoc: Ztoc) -> bytes:
    """The zTOC's bytes; the same for equal values, always.

    Entries are written in the order given, PAX records in ascending order of their keys. Raises `InvalidZtoc` for a
    number that its field cannot hold, `LimitExceeded` beyond `MAX_ENTRIES` or `MAX_ZTOC_BYTES`.
    """
    if len(ztoc.entries) > MAX_ENTRIES:
        raise LimitExceeded(f"{len(ztoc.entries)} members; a zTOC has at most {MAX_ENTRIES} (MAX_ENTRIES)")
    builder = flatbuffers.Builder(0)
    try:
        content = _encode(builder, ztoc)
    except (struct.error, TypeError, OverflowError) as error:
        raise InvalidZtoc(f"a number that a zTOC cannot hold: {error}") from error
    except BuilderSizeError as error:
        raise LimitExceeded(f"zTOC of more than {MAX_ZTOC_BYTES} bytes (MAX_ZTOC_BYTES)") from error
    if len(content) > MAX_ZTOC_BYTES:
        raise LimitExceeded(f"zTOC of {len(content)} bytes; at most {MAX_ZTOC_BYTES} are allowed (MAX_ZTOC_BYTES)")
    return content


def _encode(builder: flatbuffers.Builder, ztoc: Ztoc) -> bytes:
    version = builder.CreateString(_raw(ztoc.version))
    tool = builder.CreateString(_raw(ztoc.build_tool))
    members = [_entry(builder, entry) for entry in reversed(ztoc.entries)]
    metadata = _offsets(builder, members[::-1])
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, metadata, 0)
    toc = builder.EndObject()

    checkpoints = builder.CreateByteVector(ztoc.checkpoints)
    digests = _offsets(builder, [builder.CreateString(_raw(digest)) for digest in ztoc.span_digests])
    builder.StartObject(4)
    builder.PrependInt32Slot(1, ztoc.max_span_id, 0)
    builder.PrependUOffsetTRelativeSlot(2, digests, 0)
    builder.PrependUOffsetTRelativeSlot(3, checkpoints, 0)
    builder.PrependInt8Slot(0, _ALGORITHMS[ztoc.algorithm], _GZIP)
    compression = builder.EndObject()

    builder.StartObject(6)
    builder.PrependUOffsetTRelativeSlot(0, version, 0)
    builder.PrependUOffsetTRelativeSlot(1, tool, 0)
    builder.PrependUOffsetTRelativeSlot(4, toc, 0)
    builder.PrependInt64Slot(2, ztoc.compressed_size, 0)
    builder.PrependInt64Slot(3, ztoc.uncompressed_size, 0)
    builder.PrependUOffsetTRelativeSlot(5, compression, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def _entry(builder: flatbuffers.Builder, entry: TocEntry) -> int:
    texts = (entry.name, _raw(entry.type), entry.linkname, entry.uname, entry.gname, _raw(entry.mod_time))
    name, kind, linkname, uname, gname, mod_time = map(builder.CreateString, texts)
    pax = _offsets(builder, [_record(builder, key, entry.pax[key]) for key in sorted(entry.pax)])
    builder.StartObject(14)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependUOffsetTRelativeSlot(1, kind, 0)
    builder.PrependInt64Slot(2, entry.offset, 0)
    builder.PrependInt64Slot(3, entry.size, 0)
    builder.PrependUOffsetTRelativeSlot(4, linkname, 0)
    builder.PrependInt64Slot(5, entry.mode, 0)
    builder.PrependUint32Slot(6, entry.uid, 0)
    builder.PrependUint32Slot(7, entry.gid, 0)
    builder.PrependUOffsetTRelativeSlot(8, uname, 0)
    builder.PrependUOffsetTRelativeSlot(9, gname, 0)
    builder.PrependUOffsetTRelativeSlot(10, mod_time, 0)
    builder.PrependInt64Slot(11, entry.devmajor, 0)
    builder.PrependInt64Slot(12, entry.devminor, 0)
    builder.PrependUOffsetTRelativeSlot(13, pax, 0)
    return int(builder.EndObject())


def _record(builder: flatbuffers.Builder, key: bytes, value: bytes) -> int:
    key_at = builder.CreateString(key)
    value_at = builder.CreateString(value)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, key_at, 0)
    builder.PrependUOffsetTRelativeSlot(1, value_at, 0)
    return int(builder.EndObject())


def _offsets(builder: flatbuffers.Builder, objects: Sequence[int]) -> int:
    """A vector of offsets to ``objects``, in their order."""
    builder.StartVector(4, len(objects), 4)
    for at in reversed(objects):
        builder.PrependUOffsetTRelative(at)
    return int(builder.EndVector())


def _raw(text: str) -> bytes:
    # `parse_ztoc` decodes the same way: a text that is not UTF-8 comes back as it was.
    return text.encode("utf-8", "surrogateescape")
