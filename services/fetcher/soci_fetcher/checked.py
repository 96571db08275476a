# SPDX-License-Identifier: Apache-2.0
"""From compressed bytes that are to be checked to filled spans: digest, inflate, write. Runs in threads."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from typing import Final

from soci.digest import hex_of, new_hash
from soci_cache import LayerWriter
from soci_cache.presence import AHEAD, FILLED, NEEDED
from soci_fetcher.large import decompressed
from soci_fetcher.runs import cut
from soci_fetcher.schedule import CLASSES
from soci_fetcher.source import FILL, MISS

THREADS: Final = max(2, os.cpu_count() or 1)
"""Batches that are inflated at a time, those for readers who wait not counted."""
BATCH: Final = 1 << 20
"""Compressed bytes of spans that one thread fills one after the other: below it, threads cost more than they bring."""
MARKS: Final = tuple({MISS: NEEDED, FILL: FILLED}.get(why, AHEAD) for why in CLASSES)
"""What a span that came in a class is marked with, by rank."""

Piece = tuple[int, memoryview]


def batches(run: range, writer: LayerWriter, content: bytes, wanted: Container[int]) -> list[list[Piece]]:
    """The ``wanted`` spans of ``run`` with their bytes, out of its one answer, a batch for each thread."""
    found: list[list[Piece]] = []
    size = BATCH
    for span, compressed in cut(run, writer.spans, content):
        if span not in wanted:
            continue
        if size >= BATCH:
            found.append([])
            size = 0
        found[-1].append((span, compressed))
        size += len(compressed)
    return found


def fill(writer: LayerWriter, batch: Iterable[Piece], mark: int) -> list[int]:
    """Check, inflate and fill each span that is still absent; returns those whose bytes are not the promised ones.

    A span whose bytes are as promised and yet do not inflate is the zTOC's fault: it is raised, for no source has
    better ones.
    """
    wrong: list[int] = []
    for span, compressed in batch:
        if writer.present(span):
            continue
        promised = writer.spans.digest(span)
        state = new_hash(promised)
        state.update(compressed)
        if state.hexdigest() != hex_of(promised):
            wrong.append(span)
            continue
        writer.fill_pieces(span, decompressed(writer, span, (compressed,)), mark, tail=True)
    return wrong
