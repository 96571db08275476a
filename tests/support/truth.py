# SPDX-License-Identifier: Apache-2.0
"""What a node's span cache must be: every span that it says is here has the layer's own bytes.

The folders are read as they lie on the disk, not through `LayerStore`, which would mend them first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from soci.digest import Digest
from soci.span import Spans
from soci.ztoc import parse_ztoc
from soci_cache.journal import parse_journal
from soci_cache.presence import Presence

DRAFT = ".new-"


def check_cache(cache: Path, tars: Mapping[Digest, bytes]) -> dict[Digest, list[int]]:
    """The spans that are here, by layer; fails where one of them, or the journal's word on one, is not the truth.

    ``tars`` are the uncompressed tars of the layers that are looked at.
    """
    return {layer: check_layer(place, tars[layer]) for layer, place in _places(cache) if layer in tars}


def _places(cache: Path) -> list[tuple[Digest, Path]]:
    found = sorted(path for path in (cache / "layers").glob("*/*") if not path.name.startswith(DRAFT))
    return [(Digest(f"sha256:{place.parent.name}"), place) for place in found]


def check_layer(place: Path, tar: bytes) -> list[int]:
    """As `check_cache`, of one layer's folder."""
    content = (place / "ztoc").read_bytes()
    assert hashlib.sha256(content).hexdigest() == place.name, f"{place}/ztoc is not the one of its name"
    spans = Spans.of(parse_ztoc(content))
    assert spans.uncompressed_size <= len(tar), "another layer's truth"  # it ends before the tar's padding
    presence = Presence(place / "spans", writable=False)
    try:
        here = [span for span in range(spans.count) if presence[span]]
    finally:
        presence.close()
    journal = parse_journal((place / "journal").read_bytes(), spans.count)
    with (place / "layer.tar").open("rb") as file:
        for span in sorted({*here, *journal}):
            start, end = spans.uncompressed(span)
            file.seek(start)
            right = tar[start:end]
            assert span not in here or file.read(end - start) == right, f"span {span} in {place} is wrong"
            assert span not in journal or journal[span] == hashlib.sha256(right).digest(), f"journal of span {span}"
    assert set(here) <= journal.keys(), f"spans in {place} that the journal does not know"
    return here
