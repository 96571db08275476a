# SPDX-License-Identifier: Apache-2.0
"""Requests for neighbouring spans: how large they get, and whose bytes an answer holds. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from soci.span import Spans

RUN_BYTES = 16 << 20
"""Compressed bytes of one range request: large enough to fill a fast link, small enough that a miss inside it waits
little and a retry repeats little."""


def cut(run: range, spans: Spans, content: bytes) -> Iterator[tuple[int, memoryview]]:
    """Each span of ``run`` with its compressed bytes, out of the run's one answer.

    Where a span starts in the middle of a byte, that byte belongs to its neighbour too and is in both pieces.
    """
    view = memoryview(content)
    base = spans.compressed(run.start)[0]
    for span in run:
        start, end = spans.compressed(span)
        yield span, view[start - base : end - base]
