# SPDX-License-Identifier: Apache-2.0
"""Which node of a cluster keeps which spans for all: rendezvous hashing. Pure.

Every node computes a score for each node and key; the highest owns the key. Where a node comes or goes, only the keys
that it owns or owned move. A key is a block: neighbouring spans, so that they still come by one request.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import numpy as np

from soci.digest import Digest
from soci.span import Spans

BLOCK_BYTES = 16 << 20
"""Compressed bytes of a block, by where its spans begin: as many as one range request has (`soci_fetcher.runs`)."""

ZTOC_BLOCK = -1
"""Stands for the zTOC, which is shared as a block is."""

_MASK = (1 << 64) - 1


def key_of(layer: Digest, ztoc: Digest, block: int) -> int:
    """64 bits that stand for one block of one layer."""
    return _hash64(f"{layer}\0{ztoc}\0{block}")


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Ring:
    """The nodes (or the processes of one node) among whom keys are shared; frozen. Their order does not matter."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(sorted(set(names)))
        self._hashes = np.array([_hash64(name) for name in self.names], dtype=np.uint64)

    def ranked(self, key: int, count: int) -> tuple[str, ...]:
        """The ``count`` best for a key, the owner first; fewer where there are no more."""
        scores = _mixed(self._hashes ^ np.uint64(key & _MASK))
        best = np.argsort(scores, kind="stable")[::-1][:count]
        return tuple(self.names[place] for place in best)


def _mixed(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Each word's bits thrown about, one to one: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def blocks(spans: Spans, run: range) -> Iterator[tuple[int, range]]:
    """``run`` cut where a block begins: the block's number, and its part of the run."""
    first = run.start
    for span in run:
        block = spans.compressed(span)[0] // BLOCK_BYTES
        if span + 1 == run.stop or spans.compressed(span + 1)[0] // BLOCK_BYTES != block:
            yield block, range(first, span + 1)
            first = span + 1


def run_of(spans: Spans, start: int, end: int) -> range | None:
    """The spans whose compressed bytes are [start, end) together; None where these are no whole spans."""
    first = bisect_left(spans.starts, start)
    last = bisect_left(spans.ends, end)
    if not 0 <= first <= last < spans.count or (spans.starts[first], spans.ends[last]) != (start, end):
        return None
    return range(first, last + 1)
