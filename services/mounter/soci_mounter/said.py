# SPDX-License-Identifier: Apache-2.0
"""What the log says of a read that failed, by the keys that operators of the reference grep for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from soci.span import Spans
from soci_mounter.reader import Miss
from soci_mounter.state import fetched


def failed_read(miss: Miss, spans: Spans, present: Callable[[int], bool]) -> Mapping[str, object]:
    """The read, its layer (``digest``), and how much of the layer's blob is here, in bytes and percent."""
    here, percent = fetched(spans, present)
    return {
        "mount": miss.mount,
        "path": miss.path.decode(errors="backslashreplace"),
        "digest": miss.layer,
        "size": spans.compressed_size,
        "fetchedSize": here,
        "fetchedPercent": percent,
        "seconds": round(miss.seconds, 3),
        "error": miss.failed,
    }
