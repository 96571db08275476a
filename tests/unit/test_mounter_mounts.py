# SPDX-License-Identifier: Apache-2.0
"""The registry of mounts, over a real span cache and without FUSE."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from soci.errors import AlreadyExists, NotFound, RegistryUnavailable, SociError, Unavailable
from soci.launch import TraceParent, new_launch_id, new_traceparent
from soci_bus.asks import FetchSpans, MountLayer, PrepareLayer
from soci_cache import LayerStore
from soci_mounter import graduate
from soci_mounter import mounts as mounts_module
from soci_mounter.filesystem import FileSystem
from soci_mounter.mounts import Mounts, News, Place
from soci_mounter.reader import Seams
from soci_mounter.records import Records
from support.mounter_layers import Made, item, make


@pytest.fixture(scope="module")
def made() -> Made:
    return make([item("dir/file", b"content")])


@dataclass
class Rig:
    """A registry and what was heard of it."""

    root: Path
    made: Made
    files: FileSystem = field(init=False)
    mounts: Mounts = field(init=False)
    asked: list[FetchSpans] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    fail: SociError | None = None

    async def ask_spans(self, ask: FetchSpans | PrepareLayer, _seconds: float, _trace: TraceParent | None) -> None:
        assert isinstance(ask, FetchSpans)
        self.asked.append(ask)
        if self.fail and ask.image == "registry/bad":
            raise self.fail
        self.made.fill(self.root / "cache", range(ask.first, ask.last + 1))

    def ask(self, mount: str = "m1", image: str = "registry/good", **change: Any) -> MountLayer:
        return replace(MountLayer(mount, image, self.made.layer, self.made.ztoc_digest), **change)

    async def read(self, mount: str) -> bytes:
        ino = 1
        for name in (mount.encode(), b"dir", b"file"):
            found = self.files.lookup(ino, name)
            assert found is not None
            ino = found.ino
        return await self.files.read(self.files.open(ino, os.O_RDONLY), 0, 100)


@asynccontextmanager
async def rigged(root: Path, made: Made) -> AsyncIterator[Rig]:
    rig = Rig(root, made)
    (root / "mounter").mkdir(exist_ok=True)
    made.put(root / "cache")
    rig.files = FileSystem(root)
    place = Place(root / "mounts", LayerStore(root / "cache"), Records(root / "mounter"))
    seams = Seams(20.0, lambda _miss: None, lambda what, _error: rig.heard.append(what))
    news = News(
        lambda ask, *_rest: rig.heard.append(f"shown {ask.mount}"), lambda name: rig.heard.append(f"hidden {name}")
    )
    rig.mounts = Mounts(rig.files, place, rig.ask_spans, seams, news)
    try:
        yield rig
    finally:
        await rig.mounts.close()


async def test_mounting_is_idempotent_even_at_once(tmp_path: Path, made: Made) -> None:
    """Ten equal asks at the same time make one mount and get one answer."""
    async with rigged(tmp_path, made) as rig:
        answers = await asyncio.gather(*(rig.mounts.mount(rig.ask()) for _ in range(10)))
        assert {answer.path for answer in answers} == {str(tmp_path / "mounts/m1")}
        assert rig.heard == ["shown m1"]
        with pytest.raises(AlreadyExists):
            await rig.mounts.mount(rig.ask(image="registry/other"))


async def test_mounts_of_one_layer_share_it(tmp_path: Path, made: Made) -> None:
    """Two mounts of a layer fetch its spans once, and the layer stays open until the last one goes."""
    async with rigged(tmp_path, made) as rig:
        await rig.mounts.mount(rig.ask("m1"))
        await rig.mounts.mount(rig.ask("m2"))
        assert set(await asyncio.gather(rig.read("m1"), rig.read("m2"))) == {b"content"}
        assert len(rig.asked) == 1
        await rig.mounts.unmount("m1")
        assert await rig.read("m2") == b"content"
        (layer,) = rig.mounts._layers.values()
        await rig.mounts.unmount("m2")
        assert layer.content.closed
        assert rig.mounts._layers == {}
        assert rig.heard == ["shown m1", "shown m2", "hidden m1", "hidden m2"]


async def test_a_layer_of_two_images_is_fetched_from_either(tmp_path: Path, made: Made) -> None:
    """When one image's repository refuses, the next try goes to the other's."""
    async with rigged(tmp_path, made) as rig:
        rig.fail = RegistryUnavailable("gone")
        await rig.mounts.mount(rig.ask("m1", "registry/bad"))
        await rig.mounts.mount(rig.ask("m2", "registry/good"))
        assert await rig.read("m1") == b"content"
        assert [ask.image for ask in rig.asked] == ["registry/bad", "registry/good"]


async def test_a_caller_that_gives_up_finds_the_mount_made(tmp_path: Path, made: Made) -> None:
    """Cancelling the ask leaves the mounting to be finished, and the next ask gets its answer."""
    async with rigged(tmp_path, made) as rig:
        impatient = asyncio.create_task(rig.mounts.mount(rig.ask()))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        await asyncio.gather(*rig.mounts._work)
        assert rig.mounts.check(["m1"]) == ("m1",)
        await rig.mounts.mount(rig.ask())
        assert rig.heard == ["shown m1"]


@pytest.mark.parametrize(
    ("change", "error"), [({"layer": "sha256:" + "0" * 64}, NotFound), ({"lower": ("/absent",)}, Unavailable)]
)
async def test_a_mount_that_fails_leaves_nothing(
    tmp_path: Path, made: Made, change: dict[str, Any], error: type[SociError]
) -> None:
    """Neither a directory nor a record nor an open layer is left, and the name is free."""
    async with rigged(tmp_path, made) as rig:
        with pytest.raises(error):
            await rig.mounts.mount(rig.ask(**change))
        assert rig.mounts.check(["m1"]) == ()
        assert rig.mounts._layers == {}
        assert list((tmp_path / "mounter").iterdir()) == []
        await rig.mounts.mount(rig.ask())


async def test_a_successor_shows_what_the_records_say(tmp_path: Path, made: Made) -> None:
    """Mounts come back; one whose layer is gone from the cache is forgotten and can be asked for anew."""
    other = make([item("dir/file", b"other")])
    other.put(tmp_path / "cache")
    async with rigged(tmp_path, made) as rig:
        await rig.mounts.mount(rig.ask("m1"))
        await rig.mounts.mount(rig.ask("m2", layer=other.layer, ztoc=other.ztoc_digest))
        await rig.mounts.mount(rig.ask("m3"))
        await rig.mounts.unmount("m3")
    (LayerStore(tmp_path / "cache").directory(other.layer, other.ztoc_digest) / "ztoc").unlink()
    async with rigged(tmp_path, made) as rig:
        await rig.mounts.restore()
        assert rig.mounts.check(["m1", "m2", "m3"]) == ("m1",)
        assert await rig.read("m1") == b"content"
        assert [path.name for path in (tmp_path / "mounter").iterdir()] == ["m1.json"]
        assert rig.heard == ["mount m2 could not be shown again"]


async def test_misses_are_filed_under_the_attached_launch(tmp_path: Path, made: Made) -> None:
    """The newest attach of a mount counts; mounts that are not there, and unmounted ones, have none."""
    async with rigged(tmp_path, made) as rig:
        first, second = new_traceparent(), new_launch_id()
        await rig.mounts.mount(rig.ask(), first)
        traces = rig.mounts._seams.traces
        assert traces == {"m1": first}
        rig.mounts.attach(["m1", "m2"], second, first)
        assert set(traces) == {"m1"}
        assert traces["m1"].launch == second
        await rig.mounts.unmount("m1")
        assert traces == {}


async def test_mounts_are_listed_page_by_page(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mount once, in the order of names, whatever the size of a page."""
    monkeypatch.setattr(mounts_module, "PAGE_MOUNTS", 2)
    async with rigged(tmp_path, made) as rig:
        for name in ("m3", "m1", "m2"):
            await rig.mounts.mount(rig.ask(name))
        first = await rig.mounts.shown()
        second = await rig.mounts.shown(first.next)
        assert [one.mount for one in first.layers] == ["m1", "m2"]
        assert ([one.mount for one in second.layers], second.next) == (["m3"], "")
        assert [(one.way, one.state, one.spans) for one in second.layers] == [("fuse", "lazy", 1)]


async def test_a_proof_that_fails_ends_nothing(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an image's tar does to the proof of its headers: it is reported once, and the layer is shown as before."""
    monkeypatch.setattr(mounts_module, "LOOK_SECONDS", 0.0)

    def broken(*_args: object) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(graduate, "walk", broken)
    async with rigged(tmp_path, made) as rig:
        await rig.mounts.mount(rig.ask())
        made.complete(tmp_path / "cache")
        looking = asyncio.create_task(rig.mounts.look_after())
        async with asyncio.timeout(20):
            while len(rig.heard) < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not looking.done()
        looking.cancel()
        await asyncio.wait([looking])
        assert len(rig.heard) == 2
        assert "will not be mounted from its file" in rig.heard[1]
        assert await rig.read("m1") == b"content"
