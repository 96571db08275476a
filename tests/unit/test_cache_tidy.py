# SPDX-License-Identifier: Apache-2.0
"""What goes when, and in which order: unused layers, then what is above the budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci.span import Spans
from soci_cache import LayerStore, locks, store
from soci_cache.compressed import CompressedLayer
from soci_cache.presence import AHEAD, FILLED, NEEDED
from soci_cache.proof import COMPLETE, OPEN, REJECTED, UNPROVEN, prove, read_whole
from soci_cache.survey import Held, Key, budget_of, look, survey
from soci_cache.tidy import RECENT, SHARED, SHARED_GRACE, Wish, make_room, oldest_first, steps, tidy, unused
from support.mounter_layers import Made, item, make, noise

NOW = 1_000_000.0
GRACE = 20.0
ZTOC = sha256_digest(b"z")


def held(name: str, used_at: float, marks: str = "", verdict: int = OPEN, *, known: bool = True) -> Held:
    layer = sha256_digest(name.encode())
    return Held(layer, ZTOC, 1000, used_at, tuple(marks.count(str(mark)) for mark in range(4)), verdict, known)


OLD, MID, NEW = held("old", 10, "1203"), held("mid", 20, "3333"), held("new", NOW - 5, "0")


@pytest.mark.parametrize(
    ("layers", "in_use", "gone", "again"),
    [
        ((), (), (), None),
        ((MID, OLD), (), (OLD, MID), None),
        ((MID, OLD), (MID.key,), (OLD,), None),
        ((MID, OLD, NEW), (), (OLD, MID), 15.0),
        ((NEW,), (NEW.key,), (), None),
        ((replace(OLD, used_at=NOW + 500),), (), (), GRACE),
        ((replace(OLD, used_at=NOW - GRACE),), (), (OLD,), None),
        ((replace(OLD, shared_at=NOW - 100),), (), (), SHARED_GRACE - 100),
        ((replace(OLD, shared_at=NOW - SHARED_GRACE),), (), (OLD,), None),
        ((replace(NEW, shared_at=NOW - SHARED_GRACE + 1),), (), (), 15.0),
    ],
)
def test_unused(layers: Sequence[Held], in_use: Sequence[Key], gone: Sequence[Held], again: float | None) -> None:
    """What no snapshot uses and nobody opened within the grace goes, the longest unused first."""
    found, soon = unused(layers, in_use, NOW, GRACE)
    assert [one.layer for one in found] == [one.layer for one in gone]
    assert soon == again


def test_the_order_of_steps() -> None:
    """For others before for nobody before ahead before needed, old layers before new ones, whole layers after those
    with holes, what a launch needs now last; layers that nobody looked into keep what they have."""
    layers = {
        "b": held("b", 2, "0123"),
        "a": held("a", 1, "0110"),
        "whole": held("whole", 0, "1133", COMPLETE),
        "unknown": held("unknown", 0, known=False),
        "empty": held("empty", 0, "000"),
        "full": held("full", NOW, "2", OPEN),
        "launch": held("launch", NOW - RECENT + 1, "01233"),
        "late": held("late", NOW - RECENT, "01"),
        "shared": replace(held("shared", 4, known=False), shared_at=9),
    }
    named = {one.key: name for name, one in layers.items()}
    assert [(named[step.key], step.what) for step in steps(layers.values(), NOW)] == [
        ("shared", SHARED),
        ("b", FILLED),
        ("launch", FILLED),
        ("b", AHEAD),
        ("a", NEEDED),
        ("b", NEEDED),
        ("late", NEEDED),
        ("whole", FILLED),
        ("full", AHEAD),
        ("whole", NEEDED),
        ("launch", AHEAD),
        ("launch", NEEDED),
    ]


@pytest.mark.parametrize(
    ("setting", "used", "disk", "free", "budget"),
    [
        (7, 100, 1000, 500, 7),
        (0, 100, 1000, 500, 400),
        (0, 100, 1000, 200, 100),
        (0, 100, 1000, 50, 0),
        (0, 0, 0, 0, 0),
    ],
)
def test_the_budget(setting: int, used: int, disk: int, free: int, budget: int) -> None:
    """What is set; else what leaves a fifth of the disk free."""
    assert budget_of(setting, used, disk, free) == budget


@pytest.mark.parametrize(
    ("journal", "marks", "mark", "order"),
    [([3, 1, 2], "0111", 1, [3, 1, 2]), ([3, 1], "1113", 1, [0, 2, 1]), ([3, 1], "0000", 3, []), ([9], "3", 3, [0])],
)
def test_spans_of_a_mark(journal: Sequence[int], marks: str, mark: int, order: Sequence[int]) -> None:
    """Those filled longest ago first; those of which the journal knows nothing before them."""
    assert oldest_first(journal, bytes(int(one) for one in marks), mark) == order


@pytest.mark.parametrize(
    ("marks", "verdict", "known", "state"),
    [
        ("0120", OPEN, True, "lazy"),
        ("0130", OPEN, True, "filling"),
        ("1111", OPEN, True, "filling"),
        ("1111", COMPLETE, True, "complete"),
        ("1111", UNPROVEN, True, "unproven"),
        ("1011", REJECTED, True, "rejected"),
        ("", OPEN, False, "unchecked"),
    ],
)
def test_states(marks: str, verdict: int, known: bool, state: str) -> None:  # noqa: FBT001
    """The word that people see."""
    assert held("x", 0, marks, verdict, known=known).state == state


# --- on a disk


@pytest.fixture(scope="module")
def layers() -> list[Made]:
    """Three layers of some 700 KB."""
    return [make([item("a", noise(700_000, seed))]) for seed in range(3)]


@pytest.fixture
def cache(tmp_path: Path, layers: list[Made]) -> Path:
    """All of them in a cache: the first whole and proven, the second in the background, the third for reads."""
    cache = tmp_path / "cache"
    opened = LayerStore(cache)
    for made, mark, spans in zip(layers, (NEEDED, FILLED, NEEDED), (99, 8, 8), strict=True):
        opened.prepare(made.layer, made.ztoc_digest, made.ztoc_bytes, sha256_digest(made.tar)).close()
        with opened.write(made.layer, made.ztoc_digest) as writer:
            for span in range(min(writer.spans.count, spans)):
                start, end = writer.spans.uncompressed(span)
                writer.fill_pieces(
                    span, (made.tar[start:end] if span < writer.spans.count - 1 else made.tar[start:],), mark, tail=True
                )
    assert prove(place(cache, layers[0]), Spans.of(layers[0].ztoc)) == COMPLETE
    for number, made in enumerate(layers):
        os.utime(place(cache, made), (number, number))
    return cache


def place(cache: Path, made: Made) -> Path:
    return LayerStore(cache).directory(made.layer, made.ztoc_digest)


def key(made: Made) -> Key:
    return made.layer, made.ztoc_digest


def counts(cache: Path) -> dict[Key, int]:
    return {one.key: one.here for one in survey(cache)}


def on_disk(cache: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in (cache / "layers").glob("*/*/**/*")) + sum(
        path.lstat().st_blocks * 512 for path in (cache / "layers").glob("*/*")
    )


def test_what_is_unused_goes(cache: Path, layers: list[Made]) -> None:
    """And nothing else; what was opened a moment ago stays until its grace is over."""
    LayerStore(cache).read(*key(layers[1])).close()
    before = on_disk(cache)
    done = tidy(cache, Wish({key(layers[2])}, budget=1 << 40))
    assert done.layers == [key(layers[0])]
    assert done.again_in is not None
    assert 0 < done.again_in <= GRACE
    assert set(counts(cache)) == {key(layers[1]), key(layers[2])}
    assert done.freed == before - on_disk(cache)
    assert done.used == on_disk(cache)
    done = tidy(cache, Wish({key(layers[2])}, budget=1 << 40, grace=0))
    assert done.layers == [key(layers[1])]


def test_nothing_goes_while_nobody_knows_what_is_in_use(cache: Path) -> None:
    """However far above the budget it is."""
    before = counts(cache)
    done = tidy(cache, Wish(None, budget=1, grace=0))
    assert (done.layers, done.spans, done.freed) == ([], 0, 0)
    assert done.over > 0
    assert counts(cache) == before


def test_an_open_layer_stays(cache: Path, layers: list[Made]) -> None:
    """Whatever the snapshots say: a container reads it."""
    with LayerStore(cache).read(*key(layers[0])) as reader:
        os.utime(reader.directory, (0, 0))
        for dry_run in (True, False):
            assert key(layers[0]) not in tidy(cache, Wish((), budget=1 << 40, dry_run=dry_run)).layers
        assert reader.pread(10, 0) == layers[0].tar[:10]


def test_a_layer_that_is_opened_meanwhile_stays(
    cache: Path, layers: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was looked at, found unused, and is prepared again before it goes."""
    real = locks.folder

    def late(where: Path) -> object:
        monkeypatch.setattr(locks, "folder", real)
        os.utime(where)
        return real(where)

    monkeypatch.setattr(locks, "folder", late)
    assert len(tidy(cache, Wish((), budget=1 << 40)).layers) == 2


def test_the_budget_is_kept(cache: Path, layers: list[Made]) -> None:
    """Of layers in use, what nobody asked for goes first; the whole layer keeps its verdict as long as it can."""
    used = on_disk(cache)
    budget = used - 10_000
    wish = Wish({key(made) for made in layers}, budget=budget)
    done = tidy(cache, wish)
    assert done.spans > 0
    assert done.used == on_disk(cache) <= int(budget * 0.9)
    assert done.budget == budget
    now = counts(cache)
    assert now[key(layers[1])] < now[key(layers[2])] == 8
    assert look(place(cache, layers[0])) == replace(survey_of(cache, layers[0]), verdict=COMPLETE)
    assert [path.stat().st_mtime for path in (place(cache, one) for one in layers)] == [0, 1, 2]
    assert tidy(cache, wish).freed == 0


def survey_of(cache: Path, made: Made) -> Held:
    (found,) = (one for one in survey(cache) if one.key == key(made))
    return found


def test_a_budget_that_cannot_be_kept(cache: Path, layers: list[Made]) -> None:
    """All spans go, the whole layer's last and with its verdict; folders of layers in use stay; what is over is told."""
    done = tidy(cache, Wish({key(made) for made in layers}, budget=1))
    assert set(counts(cache).values()) == {0}
    assert len(counts(cache)) == 3
    assert done.over == done.used - 1 == on_disk(cache) - 1
    assert read_whole(place(cache, layers[0])) is None
    assert survey_of(cache, layers[0]).verdict == OPEN


def test_a_dry_run_does_nothing(cache: Path, layers: list[Made]) -> None:
    """It tells what would go, of both kinds."""
    before = counts(cache)
    done = tidy(cache, Wish({key(layers[1]), key(layers[2])}, budget=500_000, dry_run=True))
    assert done.layers == [key(layers[0])]
    assert done.spans > 0
    assert done.freed > 700_000
    assert counts(cache) == before


def test_one_at_a_time(cache: Path) -> None:
    """Who finds another at it does nothing, and says so."""
    with locks.keeper(cache) as alone:
        assert alone
        done = tidy(cache, Wish((), grace=0))
        assert done.busy
        assert done.freed == 0
    assert not tidy(cache, Wish((), grace=0)).busy


def test_an_empty_cache_is_tidy(tmp_path: Path) -> None:
    """No folder yet, and files that are none of ours, are nothing to free."""
    done = tidy(tmp_path / "none", Wish(()))
    assert (done.layers, done.used, done.over) == ([], 0, 0)
    (tmp_path / "none" / "layers" / "x" / "y").mkdir(parents=True)
    (tmp_path / "none" / "layers" / "file").touch()
    assert tidy(tmp_path / "none", Wish(())).layers == []


def test_leftovers_of_the_killed_go(cache: Path, layers: list[Made]) -> None:
    """A folder that was half removed when its process died goes after a while."""
    parent = place(cache, layers[0]).parent
    (parent / ".new-gone").mkdir()
    os.utime(parent / ".new-gone", (0, 0))
    tidy(cache, Wish({key(made) for made in layers}))
    assert not (parent / ".new-gone").exists()


def test_one_trouble_stops_nothing(cache: Path, layers: list[Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that cannot be freed is told, and the others are freed."""
    blocked = place(cache, layers[0])
    (blocked / "layer.tar").unlink()
    (blocked / "layer.tar").symlink_to("/dev/null")
    done = tidy(cache, Wish((), budget=1 << 40, grace=0))
    assert set(done.layers) == {key(layers[1]), key(layers[2])}
    assert len(done.troubles) == 1
    assert str(blocked) in done.troubles[0]


def test_what_is_kept_for_others_goes_first(cache: Path, layers: list[Made]) -> None:
    """Above the budget it costs this node nothing; and its room is counted."""
    made = layers[1]
    spans = Spans.of(made.ztoc)
    kept = CompressedLayer(place(cache, made), spans)
    assert kept.put(range(spans.count), made.blob[spans.compressed(0)[0] :]) == []
    kept.close()
    before, used = counts(cache), on_disk(cache)
    done = tidy(cache, Wish({key(one) for one in layers}, budget=used - 1000))
    assert done.spans == 0
    assert done.freed > 600_000
    assert counts(cache) == before
    assert survey_of(cache, made).shared_at == 0


def test_room_for_a_fill(cache: Path, layers: list[Made]) -> None:
    """Spans go without a word from anybody, layers do not."""
    assert make_room(cache, 10) > 1_500_000
    assert len(counts(cache)) == 3
    assert set(counts(cache).values()) == {0}


def test_after_a_boot_a_proven_layer_with_damage_is_proven_no_more(
    cache: Path, layers: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A span that did not survive is a hole: the layer is lazy again, and can be proven once it is filled."""
    made = layers[0]
    with (place(cache, made) / "layer.tar").open("r+b") as tar:
        tar.seek(200_000)
        tar.write(b"lost")
    for module in (store, __import__("soci_cache.survey", fromlist=["boot_id"])):
        monkeypatch.setattr(module, "boot_id", lambda: "0" * 36)
    assert survey_of(cache, made).state == "unchecked"
    with LayerStore(cache).read(*key(made)) as reader:
        assert len(reader.missing(range(reader.spans.count))) == 1
    assert survey_of(cache, made).verdict == OPEN
    assert read_whole(place(cache, made)) is None
