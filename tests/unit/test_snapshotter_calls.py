# SPDX-License-Identifier: Apache-2.0
"""The calls of the service against a bus in memory: how layers are brought, and what is left when that fails."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from soci import errors
from soci.digest import Digest, sha256_digest
from soci.errors import AlreadyExists, FailedPrecondition, InvalidInput, NoIndex, NotFound, Unavailable, Unsupported
from soci.oci import OCI_LAYER_GZIP
from soci_bus import asks
from soci_bus.events import ContainerPrepared, IndexChosen, LaunchStarted, ModeChosen
from soci_bus.face import Context
from soci_bus.memory import MemoryBus
from soci_cache import LayerStore
from soci_cache.arriving import COMPLETE, ArrivingWriter
from soci_runtime.flights import Flights
from soci_runtime.logs import configure_logs
from soci_snapshotter import directories
from soci_snapshotter import labels as names
from soci_snapshotter import snapshots as module
from soci_snapshotter.history import History
from soci_snapshotter.images import Images
from soci_snapshotter.layers import Layers
from soci_snapshotter.mode import Rules
from soci_snapshotter.mounts import Places
from soci_snapshotter.snapshots import Snapshots, namespace_of
from soci_snapshotter.store import SnapshotStore
from soci_snapshotter.whole import WholeLayers

MANIFEST, LAYER, ZTOC, INDEX = (sha256_digest(text) for text in (b"manifest", b"layer", b"ztoc", b"index"))
CHAIN = "sha256:" + "c" * 64
KEY = "default/4/extract-1 " + CHAIN
WANTED = {
    names.REF: CHAIN,
    "containerd.io/snapshot/cri.image-ref": "docker.io/library/redis:7",
    "containerd.io/snapshot/cri.manifest-digest": str(MANIFEST),
    "containerd.io/snapshot/cri.layer-digest": str(LAYER),
}


def layer_blob(**files: bytes) -> tuple[bytes, Digest]:
    """A gzip layer and its diff_id."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue()), sha256_digest(out.getvalue())


@dataclass
class Node:
    """A snapshotter without its socket, and the other services as a few lines each."""

    root: Path
    thread: ThreadPoolExecutor
    bus: MemoryBus = field(default_factory=MemoryBus)
    index: asks.IndexFound | Exception = field(
        default_factory=lambda: asks.IndexFound(INDEX, "v1-referrer", (asks.IndexedLayer(LAYER, ZTOC, 99),))
    )
    shown: dict[str, asks.MountLayer] = field(default_factory=dict)
    fetched: list[asks.FetchLayer] = field(default_factory=list)
    attached: list[asks.AttachLaunch] = field(default_factory=list)
    blob: bytes = b""
    diff_id: Digest = LAYER
    hook: Callable[[str], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.places = Places(self.root / "snapshots", self.root / "mounts")
        self.places.snapshots.mkdir()
        self.places.mounts.mkdir()
        self.store = self.thread.submit(SnapshotStore, self.root / "metadata.db").result()

    async def begin(self, stack: AsyncExitStack) -> None:
        flights = await stack.enter_async_context(Flights())
        whole = await stack.enter_async_context(WholeLayers(self.bus, self.root / "unpack"))
        history, rules = History(self.root / "history.db"), Rules()
        stack.callback(history.close)
        cache = LayerStore(self.root / "cache")
        images = Images(self.bus, flights, whole, history, cache, rules, timeout=10.0)
        self.layers = Layers(self.bus, self.places, images, whole, rules, mount_timeout=10.0)
        self.snapshots = Snapshots(self.store, self.layers, self.places, self.bus, self.thread)

    async def fetcher(self) -> None:
        for cls, answer in (
            (asks.FindIndex, self._find),
            (asks.PrepareLayer, self._prepare),
            (asks.ReadImageConfig, self._config),
            (asks.FetchLayer, self._layer),
        ):
            await self.bus.serve(cls, self._hooked(cls.verb, answer))

    async def mounter(self) -> None:
        for cls, answer in (
            (asks.MountLayer, self._mount),
            (asks.UnmountLayer, self._unmount),
            (asks.CheckMounts, self._check),
            (asks.AttachLaunch, self._attach),
        ):
            await self.bus.serve(cls, self._hooked(cls.verb, answer))

    def _hooked(self, verb: str, answer: Callable[[Any], Any]) -> Callable[[Any, Context], Awaitable[Any]]:
        async def handler(ask: Any, _context: Context) -> Any:
            if self.hook:
                await self.hook(verb)
            return answer(ask)

        return handler

    def _find(self, _ask: asks.FindIndex) -> asks.IndexFound:
        if isinstance(self.index, Exception):
            raise self.index
        return self.index

    def _prepare(self, _ask: asks.PrepareLayer) -> asks.LayerPrepared:
        return asks.LayerPrepared("x", 1, 0)

    def _config(self, _ask: asks.ReadImageConfig) -> asks.ImageConfig:
        return asks.ImageConfig((LAYER,), (OCI_LAYER_GZIP,), (self.diff_id,))

    def _layer(self, ask: asks.FetchLayer) -> asks.LayerFetched:
        self.fetched.append(ask)
        writer = ArrivingWriter.claim(Path(ask.path))
        assert writer
        writer.write(0, self.blob)
        writer.advance(len(self.blob))
        writer.finish(COMPLETE)
        writer.close()
        return asks.LayerFetched(ask.path, len(self.blob))

    def _mount(self, ask: asks.MountLayer) -> asks.LayerMounted:
        self.shown[ask.mount] = ask
        (self.places.mounts / ask.mount).mkdir(exist_ok=True)
        return asks.LayerMounted(str(self.places.mounts / ask.mount))

    def _unmount(self, ask: asks.UnmountLayer) -> asks.Done:
        if self.shown.pop(ask.mount, None):
            (self.places.mounts / ask.mount).rmdir()
        return asks.Done()

    def _check(self, ask: asks.CheckMounts) -> asks.MountsShown:
        return asks.MountsShown(tuple(mount for mount in ask.mounts if mount in self.shown))

    def _attach(self, ask: asks.AttachLaunch) -> asks.Done:
        self.attached.append(ask)
        return asks.Done()

    def events(self, *classes: type) -> list[Any]:
        return [kept.event for kept in self.bus.events if isinstance(kept.event, classes)]

    async def pull(self, key: str = KEY, parent: str = "", **labels: str) -> None:
        with pytest.raises(AlreadyExists, match="target snapshot"):
            await self.snapshots.prepare(key, parent, {**WANTED, **labels}, "")

    async def kinds(self) -> dict[str, str]:
        return {one.name: one.kind for one in await self.snapshots.list([])}


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    with ThreadPoolExecutor(1) as thread:
        made = Node(tmp_path, thread)
        await made.fetcher()
        await made.mounter()
        async with AsyncExitStack() as stack:
            await made.begin(stack)
            yield made
        thread.submit(made.store.close).result()


async def test_a_lazy_layer(node: Node) -> None:
    """A layer with a zTOC is shown, and committed under the chain id with all labels that a restart needs."""
    await node.pull()
    found = await node.snapshots.stat(CHAIN)
    assert found.kind == "committed"
    assert dict(found.labels) == {
        **WANTED,
        names.REMOTE: names.REMOTE_VALUE,
        names.HAS_INDEX: "true",
        names.NAMESPACE: "default",
        names.ZTOC: str(ZTOC),
        names.ZTOC_SIZE: "99",
    }
    assert (found.size, found.inodes) == (0, 0)
    assert list(node.shown) == [str(found.id)]
    (mode,) = node.events(ModeChosen)
    assert (mode.mode, mode.layer) == ("lazy", LAYER)
    assert len(node.events(LaunchStarted)) == len(node.events(IndexChosen)) == 1
    sent = f'labels."{names.REF}"=={CHAIN},parent==""'
    assert [one.name for one in await node.snapshots.list([sent])] == [CHAIN]


async def test_labels_that_are_ours(node: Node) -> None:
    """A client cannot make its own snapshot lazy, by any call."""
    fake = {names.REMOTE: "remote snapshot", names.ZTOC: "x", "kept": "yes"}
    await node.snapshots.prepare("k", "", fake, "")
    await node.snapshots.commit("n", "k", fake, "")
    assert dict((await node.snapshots.stat("n")).labels) == {"kept": "yes"}
    await node.snapshots.update("n", fake, [])
    assert dict((await node.snapshots.stat("n")).labels) == {"kept": "yes"}
    with pytest.raises(InvalidInput):
        await node.snapshots.update("n", fake, [f"labels.{names.REMOTE}"])
    await node.pull()
    kept = dict((await node.snapshots.stat(CHAIN)).labels)
    await node.snapshots.update(CHAIN, {names.REF: CHAIN}, ["labels"])
    after = dict((await node.snapshots.stat(CHAIN)).labels)
    assert {key: after.get(key) for key in names.OURS} == {key: kept.get(key) for key in names.OURS}


async def test_a_container_over_lazy_layers(node: Node) -> None:
    """The mounts name the shown directory, and the mounter is told of the launch."""
    await node.pull()
    number = (await node.snapshots.stat(CHAIN)).id
    (mount,) = await node.snapshots.prepare("default/9/container", CHAIN, {}, "")
    assert f"lowerdir={node.places.mounts / str(number)}" in mount.options
    (attached,) = node.attached
    assert attached.mounts == (str(number),)
    (prepared,) = node.events(ContainerPrepared)
    assert (prepared.id, prepared.layers, prepared.lazy) == (attached.launch, 1, 1)
    assert prepared.id == node.events(LaunchStarted)[0].id


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (NoIndex("none was pushed"), "none was pushed"),
        (errors.RegistryUnavailable("registry is away"), "registry is away"),
        (ZeroDivisionError(), "no index could be looked for"),
    ],
)
async def test_without_an_index(node: Node, index: Exception, why: str) -> None:
    """Where no index can be had, containerd gets mounts, and the reason is told."""
    node.index = index
    (mount,) = await node.snapshots.prepare(KEY, "", WANTED, "")
    assert (mount.type, mount.options) == ("bind", ("rw", "rbind"))
    (mode,) = node.events(ModeChosen)
    assert mode.mode == "defer"
    assert why in mode.why


async def test_without_a_bus(tmp_path: Path) -> None:
    """With nobody on the bus a remote Prepare is deferred with the reason, and local snapshots work."""
    with ThreadPoolExecutor(1) as thread:
        node = Node(tmp_path, thread)
        stack = AsyncExitStack()
        await node.begin(stack)
        (mount,) = await node.snapshots.prepare(KEY, "", WANTED, "")
        assert mount.type == "bind"
        assert "no process answers find-index" in node.events(ModeChosen)[0].why
        await node.snapshots.commit("default/5/" + CHAIN, KEY, WANTED, "")
        await node.snapshots.prepare("c", "default/5/" + CHAIN, {}, "")
        await node.snapshots.remove("c")
        await node.snapshots.cleanup()
        assert [path.name for path in node.places.snapshots.iterdir()] == ["1"]
        await stack.aclose()
        thread.submit(node.store.close).result()


@pytest.mark.parametrize(("key", "header", "found"), [(KEY, "", "default"), ("extract", "k8s.io", "k8s.io")])
async def test_namespace(node: Node, key: str, header: str, found: str) -> None:
    """The namespace is taken from the header, or from the key where a containerd sends no header."""
    with pytest.raises(AlreadyExists):
        await node.snapshots.prepare(key, "", WANTED, header)
    assert (await node.snapshots.stat(CHAIN)).labels[names.NAMESPACE] == found


async def test_no_namespace(node: Node) -> None:
    """A remote Prepare that says no namespace at all is refused; a local one needs none."""
    with pytest.raises(FailedPrecondition, match="namespace"):
        await node.snapshots.prepare("extract", "", WANTED, "")
    assert await node.snapshots.prepare("extract", "", {}, "")
    assert [namespace_of(key, "") for key in ("a/b/c", "a/1", "a", "", "a/1/b/c")] == ["", "", "", "", "a"]


async def test_missing_labels(node: Node) -> None:
    """Where the client did not name the layer, containerd is to bring it."""
    (mount,) = await node.snapshots.prepare(KEY, "", {names.REF: CHAIN}, "")
    assert mount.type == "bind"
    assert await node.kinds() == {KEY: "active"}


@pytest.mark.parametrize(
    ("case", "row", "also"),
    [
        ("lazy", {"remote-snapshot-prepared": "true"}, []),
        ("fails", {"local-snapshot-prepared": "true", "error": "told to fail"}, []),
        ("sparse", {"local-snapshot-prepared": "true"}, [{"layerDigest": LAYER, "image": "docker.io/library/redis:7"}]),
        ("no index", {"defer-snapshot-runtime": "true", "error": "none was pushed"}, []),
        ("no labels", {"defer-snapshot-runtime": "true"}, []),
    ],
)
async def test_what_the_log_says(
    node: Node, capsys: pytest.CaptureFixture[str], case: str, row: dict[str, str], also: list[dict[str, str]]
) -> None:
    """The reference's rows: key and parent, how the layer was prepared, and the error where that failed; by what the
    index was chosen, at debug; layers that it leaves out."""
    configure_logs("debug", "test")
    node.blob, node.diff_id = layer_blob(hello=b"world")
    if case == "fails":
        node.hook = told_to_fail
    elif case == "sparse":
        node.index = asks.IndexFound(INDEX, "explicit", ())
    elif case == "no index":
        node.index = NoIndex("none was pushed")
    with suppress(AlreadyExists):
        await node.snapshots.prepare(KEY, "", WANTED if case != "no labels" else {names.REF: CHAIN}, "")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (layer,) = [one for one in told if one["msg"] == "layer"]
    assert (layer["level"], layer["key"], layer["parent"]) == ("info", KEY, "")
    assert layer["remote-snapshot-prepared"] == ("true" if case == "lazy" else "false")
    assert {key: layer[key] for key in row} == row
    assert ("error" in layer) == (case in {"fails", "no index", "no labels"})
    chosen = [one for one in told if "SOCI index" in one["msg"] and one["level"] == "debug"]
    assert len(chosen) == (0 if case == "no labels" else 1)
    assert [{key: one[key] for key in ("layerDigest", "image")} for one in told if "layerDigest" in one] == also


async def test_a_call_that_fails_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """With its key, its parent and the error, at warning; one that says that the layer is here is no failure."""
    configure_logs("warning", "test")
    await node.pull()
    with pytest.raises(AlreadyExists):
        await node.snapshots.prepare(KEY, "", WANTED, "")
    with pytest.raises(NotFound):
        await node.snapshots.prepare("default/7/x", "absent", {**WANTED, names.REF: "sha256:" + "d" * 64}, "")
    (told,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (told["key"], told["parent"], told["remote-snapshot-prepared"]) == ("default/7/x", "absent", "false")
    assert "absent" in told["error"]


async def told_to_fail(verb: str) -> None:
    """A mounter that shows nothing."""
    if verb == asks.MountLayer.verb:
        raise errors.InvalidZtoc("told to fail")


async def test_a_whole_layer(node: Node) -> None:
    """A layer that the index leaves out is downloaded, checked, unpacked and committed as a local one."""
    node.index = asks.IndexFound(INDEX, "explicit", ())
    node.blob, node.diff_id = layer_blob(hello=b"world" * 2000)
    await node.pull()
    found = await node.snapshots.stat(CHAIN)
    assert (node.places.upper(found.id) / "hello").read_bytes() == b"world" * 2000
    assert names.REMOTE not in found.labels
    assert found.labels[names.HAS_INDEX] == "true"
    assert found.size >= 10_000
    assert found.inodes == 2
    assert list((node.root / "unpack").iterdir()) == []


async def test_a_lazy_attempt_that_fails(node: Node) -> None:
    """Where the mounter does not show the layer, it is unpacked; its half-made mount is freed with the snapshot."""
    node.blob, node.diff_id = layer_blob(hello=b"world")
    node.hook = told_to_fail
    await node.pull()
    (mode,) = node.events(ModeChosen)
    assert mode.mode == "whole"
    assert "told to fail" in mode.why


async def test_a_layer_that_does_not_unpack(node: Node) -> None:
    """After a mismatch nothing of the layer is left where containerd will unpack."""
    node.index = asks.IndexFound(INDEX, "explicit", ())
    node.blob, _ = layer_blob(hello=b"world")
    (mount,) = await node.snapshots.prepare(KEY, "", WANTED, "")
    assert list(Path(mount.source).iterdir()) == []
    assert "the image says" in node.events(ModeChosen)[0].why
    assert list((node.root / "unpack").iterdir()) == []


async def test_the_mounter_shows_another_root(node: Node) -> None:
    """A mounter with another --root is found out."""
    node.places = Places(node.places.snapshots, node.root / "other")
    node.places.mounts.mkdir()
    await node.snapshots.prepare(KEY, "", WANTED, "")
    assert "same --root" in node.events(ModeChosen)[0].why


async def test_two_prepares_at_once(node: Node) -> None:
    """Two pulls of one layer at once both hear that it is here; one snapshot remains, the other is freed."""
    await asyncio.gather(*(node.pull(f"default/{number}/extract {CHAIN}") for number in range(1, 5)))
    assert await node.kinds() == {CHAIN: "committed"}
    await node.snapshots.cleanup()
    number = str((await node.snapshots.stat(CHAIN)).id)
    assert list(node.shown) == [number]
    assert [path.name for path in node.places.snapshots.iterdir()] == [number]


async def test_one_key_at_once(node: Node) -> None:
    """Of several calls for one key at once, one makes it and the others are told."""
    results = await asyncio.gather(*(node.snapshots.prepare("k", "", {}, "") for _ in range(8)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AlreadyExists"] * 7 + ["tuple"]


async def test_the_chain_id_is_taken_by_another(node: Node) -> None:
    """Where the same chain id lies on another parent, both are there: containerd looks for label and parent."""
    for name in ("base-a", "base-b"):
        await node.snapshots.prepare(name + "-key", "", {}, "")
        await node.snapshots.commit(name, name + "-key", {}, "")
        await node.pull(f"{name}/1/extract", name)
        sent = f'labels."{names.REF}"=={CHAIN},parent=={name}'
        assert len(await node.snapshots.list([sent])) == 1


async def test_a_failure_frees_the_key(node: Node) -> None:
    """Where Prepare fails after the snapshot was made, the snapshot goes again."""

    async def hook(verb: str) -> None:
        if verb == asks.FindIndex.verb:
            await node.snapshots.remove(KEY)

    node.hook = hook
    with pytest.raises(NotFound):
        await node.snapshots.prepare(KEY, "", WANTED, "")
    node.hook = None
    assert await node.kinds() == {}
    await node.pull()
    await node.snapshots.cleanup()
    assert len(node.shown) == 1


@pytest.mark.parametrize("verb", [asks.FindIndex.verb, asks.MountLayer.verb, asks.FetchLayer.verb])
async def test_the_client_goes_away(node: Node, verb: str) -> None:
    """A cancelled Prepare leaves no snapshot, wherever it stood, and its key can be used again."""
    reached, answered = asyncio.Event(), asyncio.Event()
    if verb == asks.FetchLayer.verb:
        node.index = asks.IndexFound(INDEX, "explicit", ())
        node.blob, node.diff_id = layer_blob(hello=b"world")

    async def hook(asked: str) -> None:
        if asked == verb:
            reached.set()
            await answered.wait()

    node.hook = hook
    call = asyncio.ensure_future(node.snapshots.prepare(KEY, "", WANTED, ""))
    await reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await node.kinds() == {}
    node.hook = None
    answered.set()
    await node.pull()
    await node.snapshots.cleanup()
    assert [path.name for path in node.places.snapshots.iterdir()] == [str((await node.snapshots.stat(CHAIN)).id)]


async def test_the_client_goes_away_at_any_moment(node: Node) -> None:
    """A Prepare cancelled after any number of steps leaves all or nothing."""
    for steps in range(40):
        key = f"default/{steps}/extract"
        call = asyncio.ensure_future(node.snapshots.prepare(key, "", {**WANTED, names.REF: f"c{steps}"}, ""))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        with suppress(asyncio.CancelledError, AlreadyExists):
            await call
        assert key not in await node.kinds()


async def test_a_whole_layer_goes_on_without_its_client(node: Node) -> None:
    """Where the client goes away while a layer comes, it goes on coming, and the next client takes it."""
    node.index = asks.IndexFound(INDEX, "explicit", ())
    node.blob, node.diff_id = layer_blob(hello=b"world")
    reached, answered = asyncio.Event(), asyncio.Event()

    async def hook(verb: str) -> None:
        if verb == asks.FetchLayer.verb:
            reached.set()
            await answered.wait()

    node.hook = hook
    call = asyncio.ensure_future(node.snapshots.prepare(KEY, "", WANTED, ""))
    await reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    answered.set()
    await node.pull()
    assert len(node.fetched) == 1
    assert (node.places.upper((await node.snapshots.stat(CHAIN)).id) / "hello").read_bytes() == b"world"


async def test_a_layer_that_another_namespace_pulled(node: Node) -> None:
    """A layer that is here is not brought again, whoever asks for it; what lies on something else is."""
    await node.pull()
    await node.pull("other/4/extract " + CHAIN)
    assert await node.kinds() == {CHAIN: "committed"}
    assert len(node.events(ModeChosen)) == 1
    await node.pull("other/5/extract", CHAIN)
    assert len(node.events(ModeChosen)) == 2
    node.shown.clear()  # the mounter lost them: they are shown again
    await node.pull("third/4/extract " + CHAIN)
    assert len(node.shown) == 1


async def test_lazy_layers_that_are_gone(node: Node) -> None:
    """A mount that the mounter lost is made again before a container gets it; where it cannot be, `Unavailable`."""
    await node.pull()
    await node.pull("default/5/x", CHAIN, **{names.REF: "second"})
    shown = dict(node.shown)
    node.shown.clear()
    await node.snapshots.view("v", "second", {})
    assert node.shown == shown
    assert [len(ask.lower) for ask in node.shown.values()] == [0, 1]
    node.shown.clear()

    async def hook(verb: str) -> None:
        if verb == asks.PrepareLayer.verb:
            raise errors.RegistryUnavailable("away")

    node.hook = hook
    for call in (
        node.snapshots.prepare("c", "second", {}, ""),
        node.snapshots.view("w", "second", {}),
        node.snapshots.mounts("v"),
        node.snapshots.prepare("default/7/x", "second", {**WANTED, names.REF: "third"}, ""),
    ):
        with pytest.raises(Unavailable, match="away"):
            await call
    assert set(await node.kinds()) == {CHAIN, "second", "v"}  # no key is burnt


async def test_a_mounter_that_hangs(node: Node) -> None:
    """All that is waited for ends with mount_timeout, and then the next mode is tried."""
    node.blob, node.diff_id = layer_blob(hello=b"world")
    node.layers._timeout = 0.2

    async def hook(verb: str) -> None:
        if verb == asks.PrepareLayer.verb:
            await asyncio.Event().wait()

    node.hook = hook
    await node.pull()
    assert node.events(ModeChosen)[0].mode == "whole"


async def test_cleanup_during_prepare(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot whose directories are there and whose transaction is not finished yet outlives a clean-up."""
    loop = asyncio.get_running_loop()
    made, listed = asyncio.Event(), asyncio.Event()
    real = directories.make_directories

    def slow(place: Path, **options: Any) -> None:
        real(place, **options)
        loop.call_soon_threadsafe(made.set)
        asyncio.run_coroutine_threadsafe(listed.wait(), loop).result(20)

    real_numbers = directories.numbers

    def numbers(snapshots: Path) -> set[int]:
        found = real_numbers(snapshots)
        loop.call_soon_threadsafe(listed.set)
        return found

    monkeypatch.setattr(module, "make_directories", slow)
    monkeypatch.setattr(module, "numbers", numbers)
    prepare = asyncio.ensure_future(node.snapshots.prepare("k", "", {}, ""))
    await made.wait()
    cleanup = asyncio.ensure_future(node.snapshots.cleanup())
    (mount,) = await prepare
    await cleanup
    assert Path(mount.source).is_dir()


async def test_a_number_listed_is_not_given_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory left by a failed call is not taken for a new snapshot while the clean-up is about to delete it."""
    (node.places.snapshots / "1").mkdir()
    real, mounts = directories.remove_directory, []
    loop = asyncio.get_running_loop()

    def slow(place: Path) -> None:
        asked = asyncio.run_coroutine_threadsafe(node.snapshots.prepare("k", "", {}, ""), loop)
        mounts.append(asked.result(20)[0])
        real(place)

    monkeypatch.setattr(module, "remove_place", slow)
    await node.snapshots.cleanup()
    assert Path(mounts[0].source).is_dir()
    assert not (node.places.snapshots / "1").exists()


async def test_cleanup_without_the_mounter(node: Node) -> None:
    """Local directories are freed while the mounter is away; lazy ones stay, and are freed once it is back."""
    await node.pull()
    await node.snapshots.prepare("k", "", {}, "")
    lazy, local = [node.places.snapshots / str((await node.snapshots.stat(name)).id) for name in (CHAIN, "k")]
    await node.snapshots.remove(CHAIN)
    await node.snapshots.remove("k")

    async def hook(_verb: str) -> None:
        raise errors.BusUnavailable("away")

    node.hook = hook
    await node.snapshots.cleanup()
    assert (lazy.exists(), local.exists()) == (True, False)
    node.hook = None
    await node.snapshots.cleanup()
    assert not lazy.exists()
    assert node.shown == {}


async def test_cleanup_tells_of_lazy_layers_that_went(node: Node) -> None:
    """The word goes out once what showed them is gone, and not for local directories."""
    told: list[set[str]] = []
    node.snapshots._freed = lambda: told.append(set(node.shown))
    await node.pull()
    await node.snapshots.prepare("k", "", {}, "")
    await node.snapshots.cleanup()
    await node.snapshots.remove("k")
    await node.snapshots.cleanup()
    assert told == []
    await node.snapshots.remove(CHAIN)
    await node.snapshots.cleanup()
    assert told == [set()]


async def test_remove_during_prepare(node: Node) -> None:
    """Where the snapshot is removed and cleaned while its layer is brought, the call fails and nothing stays."""
    node.index = asks.IndexFound(INDEX, "explicit", ())
    node.blob, node.diff_id = layer_blob(hello=b"world")

    async def hook(verb: str) -> None:
        if verb == asks.FetchLayer.verb:
            await node.snapshots.remove(KEY)
            await node.snapshots.cleanup()

    node.hook = hook
    with pytest.raises(errors.SociError):
        await node.snapshots.prepare(KEY, "", WANTED, "")
    assert await node.kinds() == {}
    await node.snapshots.cleanup()
    assert list(node.places.snapshots.iterdir()) == []


async def test_too_many_layers_burn_no_key(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that overlayfs does not take is refused before anything is made."""
    monkeypatch.setattr(module, "OVERLAY_LAYERS", 2)
    parent = ""
    for number in range(3):
        await node.snapshots.prepare(f"k{number}", parent, {}, "")
        parent = f"n{number}"
        await node.snapshots.commit(parent, f"k{number}", {}, "")
    with pytest.raises(Unsupported):
        await node.snapshots.prepare("k", parent, {}, "")
    assert "k" not in await node.kinds()
