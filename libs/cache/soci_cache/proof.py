# SPDX-License-Identifier: Apache-2.0
"""Whether a layer, once all of it is here, is what its image promises: an end-to-end check by its diff_id.

In the layer's folder stand

    diff_ids   what images say the whole uncompressed layer is: a digest a line
    tail       what follows the last span (padding, which the zTOC does not count): SHA-256, then the bytes
    whole      once all was here: the digests that it has, and the verdict, as JSON

A zTOC's own digests are over compressed bytes, and its checkpoints decide what they inflate to; only the diff_id, which
comes from the image, says that the result is the layer. A layer that is not is refused from then on, by a byte in the
map that all readers see at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.digest import Digest, new_hash, parse_digest
from soci.errors import InvalidInput, Mismatch
from soci.inflate import MAX_TAIL_BYTES
from soci.span import Spans
from soci_cache import locks
from soci_cache.evict import take_away
from soci_cache.files import PIECE, digest, disk, replace, sync
from soci_cache.journal import read_journal
from soci_cache.presence import ABSENT, Presence

OPEN: Final = 0
"""Not all of it was here yet, or nobody looked."""
COMPLETE: Final = 1
UNPROVEN: Final = 2
"""All is here; nobody said what it should be, or its tail is not known."""
REJECTED: Final = 3
RETIRED: Final = 4
"""No verdict: this map was damaged, and another one is in its place. Whoever still has it open is to open that one."""
NAMES: Final = {OPEN: "open", COMPLETE: "complete", UNPROVEN: "unproven", REJECTED: "rejected"}
MOST_DIFF_IDS: Final = 8
"""What images may say of one layer. An honest one more is enough to prove it; more than so many are not kept."""
SMALL_FILE: Final = 64 << 10
"""Bytes of ``diff_ids`` or ``whole``; more is damage."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What was found of a whole layer."""

    verdict: int
    digests: tuple[Digest, ...] = ()


def judge(wanted: Sequence[Digest], found: Sequence[Digest], *, tail_known: bool) -> int:
    """The verdict. One image that is right is enough: another's false word takes nothing from it. Pure."""
    if any(one in found for one in wanted):
        return COMPLETE
    comparable = {_algorithm(one) for one in wanted} & {_algorithm(one) for one in found}
    return REJECTED if comparable and tail_known else UNPROVEN


def refused(layer: Digest, ztoc: Digest) -> Mismatch:
    """The error of whoever wants something of a rejected layer."""
    return Mismatch(
        f"layer {layer} as the SOCI index with zTOC {ztoc} has it is not what its image promises (diff_id): the index"
        " is wrong or forged. Build and push it anew; `soci cache gc` frees the layer once no image uses it"
    )


def read_diff_ids(place: Path) -> list[Digest]:
    """What images said so far. Damage is as if nobody had said it."""
    try:
        content = _small(place / "diff_ids")
        return [parse_digest(line) for line in content.splitlines()][:MOST_DIFF_IDS]
    except (OSError, InvalidInput, UnicodeDecodeError):
        return []


def read_whole(place: Path) -> Whole | None:
    """What was found of the layer; None where nobody looked."""
    try:
        content = json.loads(_small(place / "whole"))
        verdict = {name: number for number, name in NAMES.items()}[content["verdict"]]
        return Whole(verdict, tuple(parse_digest(one) for one in content["digests"]))
    except (OSError, InvalidInput, ValueError, KeyError, TypeError):
        return None


def forget_whole(place: Path, presence: Presence) -> None:
    """Take the verdict away, durably: bytes of the layer will go. In its locked folder. Raises OSError."""
    if presence.verdict == REJECTED:  # it stays so, whatever of it is here
        return
    presence.verdict = OPEN
    (place / "whole").unlink(missing_ok=True)
    sync(place)


def tell_diff_id(place: Path, layer: Digest, ztoc: Digest, diff_id: Digest | None) -> None:
    """Note what an image says of the layer, in its locked folder.

    Raises `Mismatch` where all of the layer is here and is something else: its bytes are right by another image's
    word, or are refused by all. Raises OSError.
    """
    whole = read_whole(place)
    known = read_diff_ids(place)
    new = diff_id is not None and diff_id not in known and len(known) < MOST_DIFF_IDS
    if new and diff_id is not None:
        known.append(parse_digest(diff_id))
        replace(place, "diff_ids", "\n".join(known).encode())
    if whole is None:
        return
    verdict = whole.verdict
    if diff_id in whole.digests:
        verdict = COMPLETE
    elif new and verdict == UNPROVEN:
        verdict = OPEN  # now there is something to compare it with
    if verdict != whole.verdict:
        presence = Presence(place / "spans", writable=True)
        try:
            if verdict == OPEN:
                (place / "whole").unlink()
            else:
                _write_whole(place, Whole(verdict, whole.digests))
            presence.verdict = verdict
        finally:
            presence.close()
    comparable = diff_id is not None and _algorithm(diff_id) in map(_algorithm, whole.digests)
    if verdict == REJECTED or (verdict == COMPLETE and comparable and diff_id not in whole.digests):
        raise refused(layer, ztoc)


def keep_tail(place: Path, tail: bytes) -> None:
    """Keep what follows the last span; takes the folder's lock. Raises OSError, `NotFound` where the folder is gone."""
    with locks.folder(place):
        replace(place, "tail", hashlib.sha256(tail).digest() + tail)


def read_tail(place: Path) -> bytes | None:
    """What follows the last span; None where it is not known, or is damaged."""
    try:
        with (place / "tail").open("rb") as file:
            content = file.read(32 + MAX_TAIL_BYTES + 1)
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def prove(place: Path, spans: Spans, stopped: Callable[[], bool] = lambda: False) -> int | None:
    """Compare the whole layer with what images say of it, if all is here; the verdict, which is durable then.

    None where nothing new is to be said: not all is here, it was judged before, another process is at it, bytes were
    taken away meanwhile, or it was ``stopped``. Takes as long as reading and digesting the layer. A layer whose spans
    are not those that were filled is the disk's fault and not the index's: what is damaged goes, and nothing is said.
    Raises `NotFound` where the layer is not here, `SociError` where the disk fails.
    """
    with disk(place), (place / "layer.tar").open("rb") as tar, (place / "ztoc").open("rb") as only:
        fcntl.flock(tar, fcntl.LOCK_SH)
        if not locks.lock_alone(only.fileno()):
            return None
        presence = Presence(place / "spans", writable=True)
        try:
            if presence.verdict != OPEN or ABSENT in presence.marks():
                return None
            evictions, wanted, tail = presence.evictions, read_diff_ids(place), read_tail(place)
            found = _digests(tar.fileno(), spans.uncompressed_size, tail or b"", wanted, stopped)
            if found is None:
                return None
            rejected = judge(wanted, found, tail_known=tail is not None) == REJECTED
            if rejected:
                wrong = damaged(place, tar.fileno(), spans, presence, stopped)
                if wrong:
                    with locks.folder(place):
                        take_away(place, spans, wrong)
                if wrong is None or wrong:
                    return None
            with locks.folder(place):
                if presence.evictions != evictions or ABSENT in presence.marks() or stopped():
                    return None
                os.fsync(tar.fileno())
                sync(place / "journal")
                verdict = judge(read_diff_ids(place), found, tail_known=tail is not None)
                _write_whole(place, Whole(verdict, tuple(found)))
                presence.verdict = verdict
                return verdict
        finally:
            presence.close()


def _digests(
    tar: int, size: int, tail: bytes, wanted: Sequence[Digest], stopped: Callable[[], bool]
) -> list[Digest] | None:
    """The digests of the whole stream, by the algorithms of ``wanted``; None where it was stopped or cut short."""
    states = {_algorithm(one): new_hash(one) for one in wanted}
    if not states:
        return []
    at = 0
    while at < size:
        piece = os.pread(tar, min(PIECE, size - at), at)
        if not piece or stopped():
            return None
        at += len(piece)
        for state in states.values():
            state.update(piece)
    for state in states.values():
        state.update(tail)
    return [Digest(f"{name}:{state.hexdigest()}") for name, state in states.items()]


def damaged(
    place: Path, tar: int, spans: Spans, presence: Presence, stopped: Callable[[], bool] = lambda: False
) -> list[int] | None:
    """The spans that are said to be here and are not those that were filled; None where it was ``stopped``."""
    promised = read_journal(place, spans.count)
    wrong: list[int] = []
    for span, mark in enumerate(presence.marks()):
        if stopped():
            return None
        if mark and promised.get(span) != digest(tar, *spans.uncompressed(span)) and presence[span]:
            wrong.append(span)
    return wrong


def _write_whole(place: Path, whole: Whole) -> None:
    content = {"verdict": NAMES[whole.verdict], "digests": list(whole.digests)}
    replace(place, "whole", json.dumps(content).encode())
    sync(place)


def _small(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(SMALL_FILE + 1)
    if len(content) > SMALL_FILE:
        raise InvalidInput(f"{path} is larger than it may be")
    return content.decode()


def _algorithm(one: Digest) -> str:
    return one.partition(":")[0]
