# SPDX-License-Identifier: Apache-2.0
"""What was seen of the way to each registry: bytes a second, and the seconds of a round trip.

Requests overlap, and each alone tells little of the link: what counts is how much came while at least one was under
way. The round trip is what is left of the quickest request once its bytes are paid for.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SAMPLES = 64
"""Requests to a registry that are remembered, the newest."""
REGISTRIES = 64
"""Registries that are remembered; the one unused for longest goes first."""
TELLING_BYTES = 1 << 20
"""A stretch of requests that brought less says nothing about the bandwidth."""


@dataclass(slots=True)
class Sample:
    """One request: from when to when (seconds of one clock), and how many bytes it brought."""

    begun: float
    ended: float
    size: int


def bandwidth(samples: Iterable[Sample]) -> float:
    """Bytes a second while requests were under way; 0 where too little came to say."""
    size = seconds = 0.0
    stretch: list[float] = []  # begin, end, bytes of the stretch of overlapping requests that is being gathered
    for sample in [*sorted(samples, key=lambda one: one.begun), None]:
        if stretch and (sample is None or sample.begun > stretch[1]):
            if stretch[2] >= TELLING_BYTES:
                seconds += stretch[1] - stretch[0]
                size += stretch[2]
            stretch = []
        if sample and not stretch:
            stretch = [sample.begun, sample.ended, sample.size]
        elif sample:
            stretch[1] = max(stretch[1], sample.ended)
            stretch[2] += sample.size
    return size / seconds if seconds > 0 else 0.0


def round_trip(samples: Iterable[Sample], bytes_per_second: float) -> float:
    """Seconds that the quickest request took beside the transport of its bytes."""
    paid = (one.ended - one.begun - one.size / bytes_per_second for one in samples)
    return max(0.0, min(paid, default=0.0))


class Links:
    """The samples of this process, a few of each registry."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: OrderedDict[str, deque[Sample]] = OrderedDict()

    @contextmanager
    def request(self, registry: str) -> Iterator[Sample]:
        """Around one request; the block sets ``size``. One that fails is not remembered."""
        sample = Sample(self._clock(), 0.0, 0)
        yield sample
        sample.ended = self._clock()
        kept = self._samples.setdefault(registry, deque(maxlen=SAMPLES))
        self._samples.move_to_end(registry)
        while len(self._samples) > REGISTRIES:
            self._samples.popitem(last=False)
        kept.append(sample)

    def seen(self, registry: str) -> tuple[float, float]:
        """Bytes a second and seconds of a round trip to ``registry``; two zeros where it is not known yet."""
        samples = self._samples.get(registry, ())
        speed = bandwidth(samples)
        return (speed, round_trip(samples, speed)) if speed else (0.0, 0.0)
