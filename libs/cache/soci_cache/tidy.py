# SPDX-License-Identifier: Apache-2.0
"""Freeing: layers that no image uses, and what is above the budget. One process of the node at a time does it.

What may go is decided by `unused` and `steps`, which are pure; the rest does it, and asks the locks of readers and
fillers once more before anything goes (`soci_cache.evict`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from soci.errors import InvalidInput, NotFound, SociError, Unavailable
from soci.span import Spans
from soci_cache import locks
from soci_cache.compressed import FILE, drop
from soci_cache.evict import folder_size, is_kept, is_read, remove_layer, take_away
from soci_cache.files import BLOCK_UNIT, disk
from soci_cache.journal import read_journal
from soci_cache.presence import AHEAD, FILLED, NEEDED, Presence
from soci_cache.proof import forget_whole
from soci_cache.store import LayerStore, remove_drafts
from soci_cache.survey import HIGH_WATER, LOW_WATER, Held, Key, budget_here, look, survey

GRACE: Final = 20.0
"""Seconds after its last use for which a layer stays that no snapshot uses: one that is being pulled is not in use yet,
until it is mounted, which its reader's lock tells, and then committed."""
SHARED_GRACE: Final = 600.0
"""The same for a layer of which compressed bytes are kept for other nodes, since the last of them came: this node may
have no image of it at all. While a cluster pulls an image, its nodes ask for the same bytes within minutes."""
RECENT: Final = 600.0
"""Seconds after its last use for which a layer counts as one that is being launched from."""
ROOM_BYTES: Final = 64 << 20
"""Bytes that are freed at least where a fill finds the disk full."""
ROOM_WAIT: Final = 5.0
"""Seconds that such a fill waits for another process that makes room."""
SHARED: Final = 0
"""In a step: what is kept for other nodes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that can go: a layer's spans of one mark, or what it has for others (`SHARED`)."""

    key: Key
    what: int


@dataclass(slots=True)
class Tidied:
    """What was freed, or would be."""

    layers: list[Key] = field(default_factory=list)
    spans: int = 0
    freed: int = 0  # bytes
    used: int = 0  # bytes that the cache takes afterwards
    budget: int = 0
    again_in: float | None = None  # seconds, after which a layer that was spared for its newness may go
    troubles: list[str] = field(default_factory=list)
    busy: bool = False  # another process is at it; nothing was done

    @property
    def over(self) -> int:
        """Bytes above the budget that could not be freed."""
        return max(0, self.used - int(self.budget * HIGH_WATER))


def unused(held: Iterable[Held], in_use: Collection[Key], now: float, grace: float) -> tuple[list[Held], float | None]:
    """The layers that no snapshot uses, those used longest ago first; and in how many seconds one more would be. Pure.

    A last use in the future (the clock was set back) is one of now.
    """
    gone: list[Held] = []
    soon: list[float] = []
    for one in held:
        if one.key in in_use:
            continue
        left = grace - max(0.0, now - one.used_at)
        if one.shared_at and grace:
            left = max(left, SHARED_GRACE - max(0.0, now - one.shared_at))
        if left > 0:
            soon.append(left)
        else:
            gone.append(one)
    return sorted(gone, key=lambda one: (one.used_at, one.key)), min(soon, default=None)


def steps(held: Iterable[Held], now: float) -> list[Step]:
    """What goes next, where too much is here and all unused layers are gone. Pure.

    What is kept for other nodes first, then spans that came for nobody, then those that came ahead of reads, then those
    that reads waited for; of each kind the layers first whose last use was longest ago. Layers of which all is here
    come after all others: a hole makes them ask a registry again. But what a launch under way needs comes last, or it
    would be taken away under its hands, again and again, wherever the rest of the cache is whole.
    """
    order = sorted((one for one in held if one.known), key=lambda one: (one.used_at, one.key))
    shared = [Step(one.key, SHARED) for one in sorted(held, key=lambda one: (one.shared_at, one.key)) if one.shared_at]
    whole = [one for one in order if one.full]
    recent = [one for one in order if not one.full and now - one.used_at < RECENT]
    others = [one for one in order if not one.full and now - one.used_at >= RECENT]
    groups = (
        (FILLED, others + recent),
        *((mark, others) for mark in (AHEAD, NEEDED)),
        *((mark, whole) for mark in (FILLED, AHEAD, NEEDED)),
        *((mark, recent) for mark in (AHEAD, NEEDED)),
    )
    return shared + [Step(one.key, mark) for mark, group in groups for one in group if one.counts[mark]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a tidying is to do. ``in_use`` None: nobody knows, so no layer goes, and nothing for the budget's sake."""

    in_use: Collection[Key] | None
    budget: int = 0  # the setting: 0 is automatic
    grace: float = GRACE
    dry_run: bool = False
    stopped: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.time


def tidy(cache: Path, wish: Wish) -> Tidied:
    """Free what is to be freed now. Blocks on the disk; raises `SociError` where it cannot be looked at."""
    with disk(cache), locks.keeper(cache) as alone:
        held = survey(cache)
        done = Tidied(used=sum(one.size for one in held))
        done.budget = budget_here(cache, wish.budget, done.used)
        if not alone:
            done.busy = True
            return done
        for parent in {cache / "layers" / place.parent.name for place in (cache / "layers").glob("*/.new-*")}:
            remove_drafts(parent)
        if wish.in_use is None:
            return done
        gone, done.again_in = unused(held, wish.in_use, wish.clock(), wish.grace)
        for one in gone:
            _remove(cache, one, wish, done)
        if done.over:
            left = [one for one in held if one.key not in done.layers]
            _reduce(cache, steps(left, wish.clock()), done.used - int(done.budget * LOW_WATER), wish, done)
        return done


def make_room(cache: Path, size: int) -> int:
    """Free spans for a fill of ``size`` bytes that found the disk full; bytes that were freed.

    Nobody is asked what is in use: no layer goes as a whole. Where another process is at it, it is waited for, and 0.
    """
    with disk(cache), locks.keeper(cache, ROOM_WAIT) as alone:
        if not alone:
            return 0
        done = Tidied()
        _reduce(cache, steps(survey(cache), time.time()), max(size, ROOM_BYTES), Wish(None), done)
        return done.freed


def _remove(cache: Path, one: Held, wish: Wish, done: Tidied) -> None:
    place = LayerStore(cache).directory(*one.key)
    try:
        size: int | None = one.size
        if not wish.dry_run:
            with disk(place), locks.folder(place):
                now = look(place)
                if now is None or now.used_at != one.used_at:  # somebody came to want it
                    return
                size = remove_layer(place)
        elif is_read(place):
            return
    except NotFound:
        return
    except SociError as error:
        done.troubles.append(f"{place} is not freed: {error}")
        return
    if size is None:
        return  # it is being read: a container goes on whose snapshot is gone
    done.layers.append(one.key)
    done.freed += size
    done.used -= size


def _reduce(cache: Path, order: Sequence[Step], excess: int, wish: Wish, done: Tidied) -> None:
    """Take the steps until ``excess`` bytes are free."""
    for step in order:
        if excess <= 0 or wish.stopped():
            return
        try:
            while excess > 0:  # spans free less than their size, for their edges
                went, size = _take(cache, step, excess, dry_run=wish.dry_run)
                done.spans += went
                done.freed += size
                done.used -= size
                excess -= size
                if not went or wish.dry_run:
                    break
        except NotFound:
            continue
        except SociError as error:
            done.troubles.append(f"spans of {step.key[0]} are not freed: {error}")


def _take(cache: Path, step: Step, excess: int, *, dry_run: bool) -> tuple[int, int]:
    """Take spans of one mark, those that were filled longest ago first, until ``excess`` bytes are free."""
    store = LayerStore(cache)
    place = store.directory(*step.key)
    if step.what == SHARED:
        return 0, _drop(place, dry_run=dry_run)
    spans = Spans.of(store.table(*step.key))
    with disk(place), locks.folder(place):
        if is_kept(place / "layer.tar"):
            return 0, 0
        try:
            presence = Presence(place / "spans", writable=True)
        except InvalidInput as error:
            raise Unavailable(str(error)) from error
        with closing(presence):
            victims: list[int] = []
            left = excess
            for span in oldest_first(read_journal(place, spans.count), presence.marks(), step.what):
                if left <= 0:
                    break
                victims.append(span)
                start, end = spans.uncompressed(span)
                left -= end - start
            if dry_run:
                return len(victims), excess - left
            used = place.stat()
            try:
                size = folder_size(place)[0]
                forget_whole(place, presence)
                went, _ = take_away(place, spans, victims)
                return went, max(0, size - folder_size(place)[0])
            finally:  # the folder's time is its last use, and this is none
                os.utime(place, ns=(used.st_atime_ns, used.st_mtime_ns))


def _drop(place: Path, *, dry_run: bool) -> int:
    with disk(place), locks.folder(place):
        used = place.stat()
        size = (place / FILE).stat().st_blocks * BLOCK_UNIT
        if not dry_run:
            drop(place)
            os.utime(place, ns=(used.st_atime_ns, used.st_mtime_ns))
        return size


def oldest_first(journal: Iterable[int], marks: bytes, mark: int) -> list[int]:
    """The spans of a mark, in the journal's order; those that it does not know come first. Pure."""
    wanted = {span for span, one in enumerate(marks) if one == mark}
    known = [span for span in journal if span in wanted]
    return [*sorted(wanted - set(known)), *known]
