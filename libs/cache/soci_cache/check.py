# SPDX-License-Identifier: Apache-2.0
"""Looking after every byte of a layer: each span that is here against the digest of when it was filled."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from soci.span import Spans
from soci_cache import locks
from soci_cache.evict import take_away
from soci_cache.files import disk
from soci_cache.presence import Presence
from soci_cache.proof import damaged, forget_whole
from soci_cache.store import LayerStore
from soci_cache.survey import Key


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found: spans that were looked at, and those that were wrong and are taken away."""

    spans: int
    wrong: tuple[int, ...]


def check(cache: Path, key: Key, stopped: Callable[[], bool] = lambda: False) -> Checked:
    """Digest every span of a layer that is here; those that are not what was filled go, and will be fetched again.

    Services may run beside it. Takes as long as reading and digesting what is here. Raises `NotFound` where the layer
    is gone, `SociError` where the disk fails.
    """
    store = LayerStore(cache)
    place = store.directory(*key)
    spans = Spans.of(store.table(*key))
    with disk(place), (place / "layer.tar").open("rb") as tar:
        fcntl.flock(tar, fcntl.LOCK_SH)
        with closing(Presence(place / "spans", writable=True)) as presence:
            here = presence.present()
            wrong = damaged(place, tar.fileno(), spans, presence, stopped) or []
            if wrong:
                with locks.folder(place):
                    forget_whole(place, presence)
                    take_away(place, spans, wrong)
    return Checked(here, tuple(wrong))
