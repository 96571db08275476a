# SPDX-License-Identifier: Apache-2.0
"""`soci cache`, without services: what it makes of a cache's files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import NotFound
from soci_bus.asks import CacheFreed
from soci_cache import LayerStore
from soci_cache.presence import AHEAD, FILLED, NEEDED
from soci_cache.survey import Held
from soci_cli import cache
from soci_cli.__main__ import run
from soci_cli.cache import as_json, chosen, totals
from support.mounter_layers import Made, item, make, noise

ZTOC = sha256_digest(b"z")
AWAY = ("--nats-url", "nats://127.0.0.1:1")


def held(digit: str, counts: tuple[int, ...] = (0, 0, 0, 0), *, known: bool = True) -> Held:
    return Held(Digest("sha256:" + digit * 64), ZTOC, 1000, 1.5, counts, known=known)


A, B = held("a", (1, 2, 3, 4)), held("b", known=False)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [((), (A, B)), (("sha256:a",), (A,)), (("b",), (B,)), (("b", "sha256:aaa"), (A, B)), ((A.layer,), (A,))],
)
def test_choosing(wanted: Sequence[str], found: Sequence[Held]) -> None:
    """A digest or its beginning, with or without the algorithm."""
    assert chosen([A, B], wanted) == list(found)


@pytest.mark.parametrize("wanted", ["c", "", "sha512:", "sha256:ab"])
def test_what_is_not_there_is_an_error(wanted: str) -> None:
    """And not the answer that all is well."""
    with pytest.raises(NotFound, match="soci cache ls"):
        chosen([A, B], ["a", wanted])


def test_as_plain_data() -> None:
    """What is not known is null, and never 0."""
    assert as_json(A, {A.key}) == {
        "layer": A.layer,
        "ztoc": ZTOC,
        "size": 1000,
        "spans": 10,
        "here": 9,
        "needed": 2,
        "ahead": 3,
        "filled": 4,
        "state": "filling",
        "in_use": True,
        "used_at": 1_500_000_000,
    }
    unknown = as_json(B, None)
    assert (unknown["spans"], unknown["here"], unknown["in_use"]) == (None, None, None)


def test_totals() -> None:
    """Sums over all layers; without services no budget and nothing in use."""
    found = totals(Path("/r"), [A, B], {A.key}, CacheFreed(freed=5, budget=9))
    assert found == {
        "path": "/r/cache",
        "layers": 2,
        "in_use": 1,
        "states": {"filling": 1, "unchecked": 1},
        "spans": {"all": 10, "here": 9, "needed": 2, "ahead": 3, "filled": 4},
        "used": 2000,
        "budget": 9,
        "freeable": 5,
    }
    nothing = totals(Path("/r"), [], None, None)
    assert (nothing["in_use"], nothing["budget"], nothing["freeable"], nothing["used"]) == (None, None, None, 0)


@pytest.fixture(scope="module")
def made() -> Made:
    return make([item("a", noise(300_000))])


def test_verify_names_damage_and_takes_it_away(tmp_path: Path, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 the first time, 0 the second: what is left is right."""
    store = LayerStore(tmp_path / "cache")
    store.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
    with store.write(made.layer, made.ztoc_digest) as writer:
        for span, mark in ((0, NEEDED), (1, AHEAD), (3, FILLED)):
            start, end = writer.spans.uncompressed(span)
            writer.fill(span, made.tar[start:end], mark)
        tar = os.open(writer.directory / "layer.tar", os.O_WRONLY)
        os.pwrite(tar, b"damage", start + 1000)
        os.close(tar)
    words = ["--root", str(tmp_path), "cache", "verify"]
    assert run(words) == 1
    said = capsys.readouterr()
    assert said.out == f"{made.layer} zTOC {made.ztoc_digest}: damaged spans 3\n"
    assert said.err == "1 layers, 3 spans: 1 were damaged and are taken away\n"
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"layer": made.layer, "ztoc": made.ztoc_digest, "spans": 2, "wrong": [], "error": ""}
    ]
    with store.read(made.layer, made.ztoc_digest) as reader:
        assert [span for span in range(4) if reader.present(span)] == [0, 1]


def test_without_services(
    tmp_path: Path, made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are shown all the same, what is not known is a question mark, and a warning says why; only freeing
    needs a fetcher."""
    monkeypatch.setattr(cache, "CONNECT_SECONDS", 0.1)
    LayerStore(tmp_path / "cache").prepare(made.layer, made.ztoc_digest, made.ztoc_bytes).close()
    words = [*AWAY, "--root", str(tmp_path), "cache"]
    assert run([*words, "ls"]) == 0
    heading, line = (said := capsys.readouterr()).out.splitlines()
    assert heading.split() == ["LAYER", "ZTOC", "SIZE", "SPANS", "STATE", "IN", "USE", "LAST", "USE"]
    spans = len(made.ztoc.span_digests)
    assert line.split()[:2] == [made.layer[:19], made.ztoc_digest[:19]]
    assert line.split()[4:7] == [f"0/{spans}", "lazy", "?"]
    assert said.err.count("not known") == 1
    assert run([*words, "info"]) == 0
    assert "budget    ?" in capsys.readouterr().out
    assert run([*words, "gc"]) == 1
    assert capsys.readouterr().out == ""


def test_an_empty_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No layer is no error."""
    for verb in ("ls", "verify"):
        assert run(["--root", str(tmp_path), "cache", verb, *(["-q"] if verb == "ls" else [])]) == 0
    assert capsys.readouterr().out == ""
