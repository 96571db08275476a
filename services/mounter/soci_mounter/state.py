# SPDX-License-Identifier: Apache-2.0
"""The hidden directory of a layer that is shown by FUSE: how it is shown, how much of it came, and what failed last.

``<layer's root>/.soci-snapshotter/<layer digest>.json``, one line, for root alone. It is found by its name and is in
no listing; an entry of that name in the layer is not seen. Names and keys are the reference's, but for ``mode`` and
``why``.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from soci.digest import Digest
from soci.span import Spans

DIRECTORY: Final = b".soci-snapshotter"
DIRECTORY_MODE: Final = stat.S_IFDIR | 0o500
FILE_MODE: Final = stat.S_IFREG | 0o400


@dataclass(frozen=True, slots=True)
class State:
    """The one file of the directory; ``content`` is made when somebody looks."""

    layer: Digest
    content: Callable[[], bytes]

    @property
    def name(self) -> bytes:
        """Of the file."""
        return f"{self.layer}.json".encode()


def fetched(spans: Spans, present: Callable[[int], bool]) -> tuple[int, float]:
    """How much of the layer's blob is here, in bytes and percent. Pure."""
    size = spans.compressed_size
    here = (spans.compressed(span) for span in range(spans.count) if present(span))
    found = min(sum(end - start for start, end in here), size)  # neighbours share a byte
    return found, round(100 * found / size, 1) if size else 100.0


def line(layer: Digest, spans: Spans, present: Callable[[int], bool], why: str, error: str) -> bytes:
    """The file's content. Pure."""
    size, percent = fetched(spans, present)
    facts: dict[str, object] = {"error": error} if error else {}
    facts |= {"digest": layer, "size": spans.compressed_size, "fetchedSize": size, "fetchedPercent": percent}
    return json.dumps({**facts, "mode": "fuse", "why": why}, ensure_ascii=False).encode(errors="replace") + b"\n"
