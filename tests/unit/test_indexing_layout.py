# SPDX-License-Identifier: Apache-2.0
"""Image layouts as files: which image they stand for, hostile ones, and what is written in their place."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import (
    FailedPrecondition,
    InvalidInput,
    InvalidManifest,
    InvalidTar,
    LimitExceeded,
    Mismatch,
    NotFound,
    NoZtoc,
    SociError,
    Unsupported,
)
from soci.index import SOCI_INDEX_V2
from soci.oci import Descriptor, parse_platform
from soci_indexing import archive, layout
from soci_indexing.archive import ArchiveSource, open_source, write_archive
from soci_indexing.build import IndexWish, Noticed, Progress
from soci_indexing.convert import Converted, ConvertWish
from soci_indexing.layout import DirectorySource, LayoutContent, Root, choose_root, reachable
from soci_indexing.pool import BuildPool
from soci_indexing.standalone import Files, Format, convert_files
from support.layouts import DOCKER_LIST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Json, Layout, pack, unpack

AMD64 = parse_platform("linux/amd64")


async def root_of(source: Path, fresh: Path) -> tuple[Root, LayoutContent]:
    with open_source(source) as opened:
        content = LayoutContent(opened, fresh)
        return await choose_root(opened, content), content


async def converting(
    source: Path, destination: Path, form: Format = "oci-archive", told: list[str] | None = None, **index: Any
) -> Converted:
    def report(progress: Progress) -> None:
        if told is not None and isinstance(progress, Noticed):
            told.append(progress.message)

    every = index.pop("every", False)
    async with BuildPool(1) as pool:
        wish = IndexWish(span_size=4096, **{"min_layer_size": 0, **index})
        files = Files(source, destination, form)
        return await convert_files(files, ConvertWish(AMD64, all_platforms=every), wish, pool, report)


@pytest.fixture
def made(tmp_path: Path) -> Layout:
    folder = tmp_path / "source"
    folder.mkdir()
    return Layout(folder)


def simple(made: Layout) -> Json:
    """One image of two layers, finished."""
    entry = made.image("amd64", [made.layer(1), made.layer(2)])
    made.finish(entry)
    return entry


# --- which image --------------------------------------------------------------------------------------------------------

NAMED = {"org.opencontainers.image.ref.name": "latest", "io.containerd.image.name": "example.com/a:latest"}


async def test_one_manifest_is_the_image(made: Layout, tmp_path: Path) -> None:
    """The only entry counts; what the layout calls it is told apart from it."""
    entry = made.image("amd64", [], annotations=NAMED)
    root, _ = await root_of(made.finish(entry), tmp_path)
    assert (root.target.digest, dict(root.target.annotations)) == (entry["digest"], {})
    assert root.annotations == NAMED


async def test_one_whole_index_is_the_image(made: Layout, tmp_path: Path) -> None:
    """An index all of whose manifests are here is taken as it is, docker's too."""
    entries = [made.image("amd64", []), made.image("arm64", [])]
    for media_type in (OCI_INDEX, DOCKER_LIST):
        index = made.index(entries, media_type)
        root, _ = await root_of(made.finish(index), tmp_path / "fresh")
        assert root.target == Descriptor(media_type, index["digest"], index["size"])
    assert not (tmp_path / "fresh").exists()


async def test_an_index_that_is_not_all_here_is_cut(made: Layout, tmp_path: Path) -> None:
    """Entries without their blob are left out of a list of our own; all else of the document stays."""
    entries = [made.image(name, [], annotations={"of": name}) for name in ("amd64", "arm64", "386")]
    index = made.index(entries, DOCKER_LIST, future=[1])
    made.remove(entries[1]["digest"])
    root, content = await root_of(made.finish(index), tmp_path / "fresh")
    cut = json.loads(await content.read(root.target.digest, limit=1 << 20))
    assert cut == {
        "schemaVersion": 2,
        "mediaType": DOCKER_LIST,
        "manifests": [entries[0], entries[2]],
        "future": [1],
    }
    assert root.target.media_type == DOCKER_LIST


async def test_one_manifest_left_is_the_image(made: Layout, tmp_path: Path) -> None:
    """An index of which one manifest is here stands for that one."""
    entries = [made.image("amd64", [], annotations={"mine": "1"}), made.image("arm64", [])]
    index = made.index(entries)
    made.remove(entries[1]["digest"])
    root, _ = await root_of(made.finish(index), tmp_path / "fresh")
    assert root.target.digest == entries[0]["digest"]
    assert root.target.annotations == {"mine": "1"}


async def test_several_entries_are_a_list(made: Layout, tmp_path: Path) -> None:
    """With several entries ``index.json`` is the image index; names of a layout's entries have no meaning in one."""
    entries = [made.image("amd64", [], annotations=NAMED), made.image("arm64", [], annotations={**NAMED, "mine": "1"})]
    root, content = await root_of(made.finish(*entries), tmp_path / "fresh")
    listed = json.loads(await content.read(root.target.digest, limit=1 << 20))
    assert [entry["digest"] for entry in listed["manifests"]] == [entry["digest"] for entry in entries]
    assert [entry.get("annotations") for entry in listed["manifests"]] == [None, {"mine": "1"}]
    assert listed["mediaType"] == OCI_INDEX
    assert root.annotations == {}


def _no_layout_file(folder: Path) -> None:
    (folder / "oci-layout").unlink()


def _no_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def _docker(folder: Path) -> None:
    _no_layout_file(folder)
    _no_index(folder)
    (folder / "manifest.json").write_text('[{"Config":"abc.json","RepoTags":["a:1"],"Layers":["x/layer.tar"]}]')


def _version(folder: Path) -> None:
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')


def _empty(folder: Path) -> None:
    (folder / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')


def _not_json(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def _a_manifest(folder: Path) -> None:
    (path,) = [path for path in (folder / "blobs" / "sha256").iterdir() if b'"layers":[{' in path.read_bytes()]
    (folder / "index.json").write_bytes(path.read_bytes())


def _nothing_here(folder: Path) -> None:
    for path in (folder / "blobs" / "sha256").iterdir():
        path.unlink()


def _large(folder: Path) -> None:
    (folder / "index.json").write_bytes(b" " * (5 << 20))


BROKEN = [
    (_no_layout_file, InvalidInput, "there is no oci-layout"),
    (_no_index, InvalidInput, "there is no index.json"),
    (_docker, Unsupported, "docker save"),
    (_version, Unsupported, "version '2.0.0'"),
    (_empty, NotFound, "lists no manifests"),
    (_not_json, InvalidManifest, "not JSON"),
    (_a_manifest, InvalidManifest, "not an image index"),
    (_nothing_here, NotFound, "none of the manifests"),
    (_large, LimitExceeded, "index.json has more than 4194304 bytes"),
]


@pytest.mark.parametrize("form", ["directory", "archive"])
@pytest.mark.parametrize(("spoil", "error", "words"), BROKEN, ids=[spoil.__name__ for spoil, _, _ in BROKEN])
async def test_what_is_no_layout_is_refused(
    made: Layout, tmp_path: Path, form: str, spoil: Callable[[Path], None], error: type[SociError], words: str
) -> None:
    """Each kind of broken layout says what is wrong with it, as a directory and as a tar, and nothing is written."""
    simple(made)
    spoil(made.folder)
    source = made.folder if form == "directory" else pack(made.folder, tmp_path / "source.tar")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=words):
        await converting(source, tmp_path / "out.tar")
    assert sorted(tmp_path.iterdir()) == before


# --- hostile archives ---------------------------------------------------------------------------------------------------


def tar_of(*members: tuple[tarfile.TarInfo | str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


LAYOUT = ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')


def index_of(*entries: Json) -> tuple[str, bytes]:
    return "index.json", json.dumps({"schemaVersion": 2, "manifests": entries}).encode()


async def test_names_in_an_archive_lead_nowhere(made: Layout, tmp_path: Path) -> None:
    """Absolute names, names with dots, links out of the archive and devices write and read nothing."""
    simple(made)
    good = tmp_path / "good.tar"
    pack(made.folder, good)
    evil = tmp_path / "evil.tar"
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    device = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
    device.type = tarfile.CHRTYPE
    extra = tar_of(
        ("../escaped", b"x"),
        (str(tmp_path / "absolute"), b"x"),
        ("blobs/../../escaped", b"x"),
        ("blobs/sha256/../../../escaped", b"x"),
        ("blobs/sha256/" + "A" * 64, b"x"),
        ("blobs/sha256/" + "a" * 63, b"x"),
        (device, b""),
        link(f"blobs/sha256/{digest}", str(secret)),
        link("blobs/sha256/" + "1" * 64, str(secret), tarfile.LNKTYPE),
        link("index.json", "/etc/passwd"),
        link("blobs", "/"),
    )
    evil.write_bytes(
        extra[:-1024].rstrip(b"\0").ljust(-(-len(extra[:-1024].rstrip(b"\0")) // 512) * 512, b"\0") + good.read_bytes()
    )
    with ArchiveSource.open(evil) as source:
        assert source.size(Digest(f"sha256:{digest}")) is None
        assert source.size(Digest("sha256:" + "1" * 64)) is None
    await converting(evil, tmp_path / "out", "oci-dir")
    assert not list(tmp_path.glob("**/escaped"))
    assert not (tmp_path / "absolute").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "good.tar", "evil.tar", "secret", "out"}
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert all(name in ("oci-layout", "index.json") or name.startswith("blobs/sha256/") for name in names)


async def test_a_blob_that_is_another_is_refused(made: Layout, tmp_path: Path) -> None:
    """A layer, a config and a manifest with other bytes than their digest says are found out, whatever their place."""
    layers = [made.layer(1), made.layer(2)]
    entry = made.image("amd64", layers)
    made.finish(entry)
    config = made.json(entry["digest"])["config"]["digest"]
    for digest in (layers[0].digest, layers[1].digest, config, entry["digest"]):
        path = made.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        # The second layer is too small to be looked at before it is copied.
        with pytest.raises(SociError) as caught:
            await converting(made.folder, tmp_path / "out.tar", min_layer_size=min(layer.size for layer in layers) + 1)
        assert isinstance(caught.value, Mismatch | InvalidInput), digest
        path.write_bytes(content)
    assert not (tmp_path / "out.tar").exists()


async def test_a_blob_of_another_size_is_refused(made: Layout, tmp_path: Path) -> None:
    """A descriptor that gives a blob another size than it has does not get into a result."""
    layer = made.layer(1)
    config = made.put(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}, OCI_CONFIG
    )
    blob = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {**config, "size": 1}, "layers": [blob]}
    made.finish(made.put(manifest, OCI_MANIFEST))
    with pytest.raises(Mismatch, match="not 1"):
        await converting(made.folder, tmp_path / "out.tar")


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", InvalidInput, "there is no oci-layout"),
        (b"\0" * 10240, InvalidInput, "there is no oci-layout"),
        (b"no tar at all" * 100, InvalidTar, "source.tar: "),
        (b"\x1f\x8b\x08\x00" + b"\0" * 600, Unsupported, "gzip -d"),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 600, Unsupported, "zstd -d"),
        (tar_of(LAYOUT)[:530], InvalidTar, "cut short"),
        (
            tar_of(LAYOUT, index_of({"mediaType": OCI_MANIFEST, "digest": "sha256:../../x", "size": 1})),
            InvalidManifest,
            "digest",
        ),
        (
            tar_of(LAYOUT, index_of({"mediaType": OCI_INDEX, "digest": "sha256:" + "0" * 64, "size": 1})),
            NotFound,
            "no blob",
        ),
        (tar_of(LAYOUT, ("index.json", b"[" * 100_000)), InvalidManifest, "index.json: "),
    ],
    ids=["nothing", "zeros", "text", "gzip", "zstd", "cut", "digest", "absent", "deep"],
)
async def test_broken_archives(tmp_path: Path, content: bytes, error: type[SociError], words: str) -> None:
    """What is no tar, is compressed, cut short or malicious is one of our errors."""
    path = tmp_path / "source.tar"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        await converting(path, tmp_path / "out.tar")


def test_a_member_larger_than_its_archive(tmp_path: Path) -> None:
    """A header that promises terabytes costs nothing and is refused."""
    info = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
    info.size = 1 << 50
    path = tmp_path / "source.tar"
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + b"x" * 512)
    with pytest.raises(InvalidTar, match="cut short"), ArchiveSource.open(path):
        pass


def test_more_members_than_an_image_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of members is limited."""
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    path = tmp_path / "source.tar"
    path.write_bytes(tar_of(*((f"file-{number}", b"x") for number in range(11))))
    with pytest.raises(LimitExceeded, match="MAX_MEMBERS"), ArchiveSource.open(path):
        pass


async def test_indexes_inside_one_another_end(made: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of image indexes, too many blobs and too large ones are refused and not followed to their end."""
    entry = made.image("amd64", [made.layer(1, 100_000)])
    nested = entry
    for _ in range(6):
        nested = made.index([nested])
    made.finish(made.index([entry, nested]))
    with pytest.raises(LimitExceeded, match="MAX_DEPTH"):
        await converting(made.folder, tmp_path / "out.tar")
    made.finish(entry)
    monkeypatch.setattr(layout, "MAX_BLOB_BYTES", 20_000)
    with pytest.raises(LimitExceeded, match="MAX_BLOB_BYTES"):
        await converting(made.folder, tmp_path / "out.tar")
    monkeypatch.undo()
    monkeypatch.setattr(layout, "MAX_BLOBS", 3)
    with pytest.raises(LimitExceeded, match="MAX_BLOBS"):
        await converting(made.folder, tmp_path / "out.tar")


@pytest.mark.timeout(20)
async def test_pipes_and_folders_in_a_blobs_place(made: Layout, tmp_path: Path) -> None:
    """A fifo does not stop the reader, and a folder is no blob."""
    entry = simple(made)
    path = made.folder / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InvalidInput, match="not a regular file"):
        await converting(made.folder, tmp_path / "out.tar")
    with pytest.raises(InvalidInput, match="not a regular file"):
        await converting(path, tmp_path / "out.tar")
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidInput, match="not a regular file"):
        await converting(made.folder, tmp_path / "out.tar")
    path.rmdir()
    target = tmp_path / "elsewhere"
    target.write_bytes(content)
    path.symlink_to(target)
    await converting(made.folder, tmp_path / "out.tar")  # content is content, wherever a link finds it


def test_the_last_of_two_members_counts(tmp_path: Path) -> None:
    """As in unpacking; ``./`` before a name says nothing."""
    digest = sha256_digest(b"new")
    name = "blobs/sha256/" + digest.removeprefix("sha256:")
    path = tmp_path / "source.tar"
    path.write_bytes(tar_of((name, b"old one"), LAYOUT, ("./" + name, b"new"), ("./oci-layout", b"{}")))
    with ArchiveSource.open(path) as source:
        assert b"".join(source.chunks(digest)) == b"new"
        assert source.document("oci-layout", 100) == b"{}"


# --- the store of a conversion ------------------------------------------------------------------------------------------


async def test_new_blobs_are_checked_and_kept_apart(made: Layout, tmp_path: Path) -> None:
    """What is pushed is verified, lies beside the source, and goes when it is deleted; the source never changes."""
    layer = made.layer(1)
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    content = LayoutContent(DirectorySource(made.folder), tmp_path / "fresh")
    blob = Descriptor("text/plain", sha256_digest(b"new"), 3)
    with pytest.raises(Mismatch):
        await content.push(blob, b"old")
    with pytest.raises(Mismatch):
        await content.push(Descriptor("text/plain", blob.digest, 4), b"new")
    assert await content.push(blob, b"new") is True
    assert await content.push(blob, b"new") is False
    assert await content.info(blob.digest) == 3
    old = Descriptor("x", parse_digest(layer.digest), layer.size)
    assert await content.push(old, made.read(layer.digest)) is False
    with pytest.raises(LimitExceeded):
        await content.read(old.digest, limit=layer.size - 1)
    assert len(await content.read(old.digest, limit=layer.size)) == layer.size
    await content.delete(blob.digest)
    await content.delete(old.digest)
    assert (await content.info(blob.digest), await content.info(old.digest)) == (None, layer.size)
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


async def test_streams_left_early_are_closed(made: Layout, tmp_path: Path) -> None:
    """A reader that stops leaves no file open."""
    layer = made.layer(1, 3 << 20)
    content = LayoutContent(DirectorySource(made.folder), tmp_path / "fresh")
    before = set(Path("/proc/self/fd").iterdir())
    async with contextlib.aclosing(content.stream(parse_digest(layer.digest))) as chunks:
        assert await anext(chunks)
    assert set(Path("/proc/self/fd").iterdir()) == before


async def test_what_is_needed_is_found(made: Layout, tmp_path: Path) -> None:
    """Config, layers and manifests of every platform count, and what is absent is told."""
    layers = [made.layer(1), made.layer(2)]
    entries = [made.image("amd64", layers[:1]), made.image("arm64", layers)]
    index = made.index(entries)
    made.remove(layers[1].digest)
    unneeded = made.blob(b"junk", "text/plain")
    content = LayoutContent(DirectorySource(made.folder), tmp_path / "fresh")
    found, absent = await reachable(content, Descriptor(OCI_INDEX, index["digest"], index["size"]))
    assert absent == [layers[1].digest]
    configs = [made.json(entry["digest"])["config"]["digest"] for entry in entries]
    assert set(found) == {index["digest"], layers[0].digest, *configs, *(entry["digest"] for entry in entries)}
    assert unneeded["digest"] not in found


# --- from file to file --------------------------------------------------------------------------------------------------


def blobs(made: Layout) -> set[str]:
    return {path.name for path in (made.folder / "blobs" / "sha256").iterdir()}


@pytest.mark.parametrize("form", ["oci-archive", "oci-dir"])
async def test_every_source_gives_the_same_result(made: Layout, tmp_path: Path, form: Format) -> None:
    """From a directory and from a tar of it the same image comes out, the same bytes of a tar even."""
    simple(made)
    made.blob(b"junk", "text/plain")
    archived = pack(made.folder, tmp_path / "source.tar")
    outs = [tmp_path / "one", tmp_path / "two"]
    results = [await converting(source, out, form) for source, out in zip((made.folder, archived), outs, strict=True)]
    assert results[0] == results[1]
    if form == "oci-archive":
        assert outs[0].read_bytes() == outs[1].read_bytes()
        one = unpack(outs[0], tmp_path / "unpacked")
    else:
        one = Layout(outs[0])
    assert blobs(one) >= blobs(made) - {
        hashlib.sha256(b"junk").hexdigest(),
        json.loads((made.folder / "index.json").read_bytes())["manifests"][0]["digest"].removeprefix("sha256:"),
    }
    assert hashlib.sha256(b"junk").hexdigest() not in blobs(one)
    assert (one.folder / "oci-layout").read_bytes() == b'{"imageLayoutVersion":"1.0.0"}'
    assert one.top() == {"mediaType": OCI_INDEX, "digest": results[0].target.digest, "size": results[0].target.size}
    shown, index = one.json(one.top()["digest"])["manifests"]
    assert index["artifactType"] == SOCI_INDEX_V2
    for name in blobs(one):
        one.read(f"sha256:{name}")
    assert one.json(shown["digest"])["annotations"]["com.amazon.soci.index-digest"] == index["digest"]


async def test_converting_again_gives_the_same_bytes(made: Layout, tmp_path: Path) -> None:
    """A converted layout, converted again in its place, does not change by a byte; not as a directory either."""
    made.finish(made.index([made.image("amd64", [made.layer(1)]), made.image("arm64", [made.layer(2)])]))
    out = tmp_path / "out.tar"
    first = await converting(made.folder, out, every=True)
    before = out.read_bytes()
    assert await converting(out, out, every=True) == first
    assert out.read_bytes() == before
    assert await converting(out, tmp_path / "out", "oci-dir", every=True) == first
    assert await converting(tmp_path / "out", tmp_path / "out", "oci-dir", every=True) == first
    await converting(tmp_path / "out", tmp_path / "again.tar", every=True)
    assert (tmp_path / "again.tar").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.tar", "out", "again.tar"}


async def test_the_image_keeps_its_name(made: Layout, tmp_path: Path) -> None:
    """What ``index.json`` called the image is in the new one, and nowhere inside the image."""
    entry = made.image("amd64", [made.layer(1)], annotations=NAMED)
    made.finish(entry)
    await converting(made.folder, tmp_path / "out", "oci-dir")
    out = Layout(tmp_path / "out")
    assert out.top()["annotations"] == NAMED
    assert "ref.name" not in out.read(out.top()["digest"]).decode()


async def test_what_the_source_lacks_is_told(made: Layout, tmp_path: Path) -> None:
    """A layer of another platform that was never here is named; the rest is converted."""
    layers = [made.layer(1), made.layer(2)]
    made.finish(made.index([made.image("amd64", layers[:1]), made.image("arm64", layers[1:])]))
    made.remove(layers[1].digest)
    told: list[str] = []
    await converting(made.folder, tmp_path / "out.tar", told=told)
    assert [layers[1].digest in line for line in told] == [True]
    with pytest.raises(NotFound, match=layers[1].digest):
        await converting(made.folder, tmp_path / "other.tar", every=True)


def _a_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("mine")


def _a_file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize(
    ("put", "form", "words"),
    [
        (_a_folder, "oci-dir", "other things in it"),
        (_a_folder, "oci-archive", "--format oci-dir"),
        (_a_file, "oci-dir", "not a directory"),
    ],
)
async def test_other_things_are_not_replaced(
    made: Layout, tmp_path: Path, put: Callable[[Path], None], form: Format, words: str
) -> None:
    """A destination that is something else than an image is left alone."""
    simple(made)
    put(tmp_path / "out")
    with pytest.raises(FailedPrecondition, match=words):
        await converting(made.folder, tmp_path / "out", form)
    path = tmp_path / "out"
    assert (path / "precious" if path.is_dir() else path).read_text() == "mine"


@pytest.mark.parametrize("form", ["oci-archive", "oci-dir"])
async def test_a_failure_leaves_the_old_result(made: Layout, tmp_path: Path, form: Format) -> None:
    """Where a conversion fails, the destination has what it had, and nothing lies about."""
    entry = simple(made)
    out = tmp_path / "out"
    await converting(made.folder, out, form)

    def state() -> Iterator[tuple[str, bytes]]:
        for path in [out, *sorted(out.rglob("*"))]:
            if path.is_file():
                yield str(path), path.read_bytes()

    before = list(state())
    with pytest.raises(NoZtoc):
        await converting(made.folder, out, form, min_layer_size=1 << 30)
    layer = made.json(entry["digest"])["layers"][0]["digest"]
    (made.folder / "blobs" / "sha256" / layer.removeprefix("sha256:")).write_bytes(b"spoiled")
    with pytest.raises(SociError):
        await converting(made.folder, out, form)
    assert list(state()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


async def test_sources_and_destinations_that_are_not_there(made: Layout, tmp_path: Path) -> None:
    """A missing source and a missing folder of the destination are named."""
    simple(made)
    with pytest.raises(NotFound, match=r"nothing\.tar"):
        await converting(tmp_path / "nothing.tar", tmp_path / "out.tar")
    with pytest.raises(NotFound, match="no directory"):
        await converting(made.folder, tmp_path / "no" / "out.tar")


def test_a_tar_is_the_same_bytes_always() -> None:
    """Known documents and blobs give a known tar: owners, times and modes are constants, long names are PAX."""
    out = io.BytesIO()
    short, long = sha256_digest(b"a"), parse_digest("sha512:" + hashlib.sha512(b"bc").hexdigest())
    chunks = [(short, 1, iter([b"a"])), (long, 2, iter([b"b", b"c"]))]
    write_archive(out, [("oci-layout", b"{}"), ("index.json", b"[]")], chunks)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        members = tar.getmembers()
        assert [(member.name, member.mode, member.uid, member.gid, member.mtime) for member in members] == [
            ("oci-layout", 0o644, 0, 0, 0),
            ("index.json", 0o644, 0, 0, 0),
            ("blobs", 0o755, 0, 0, 0),
            ("blobs/sha256", 0o755, 0, 0, 0),
            ("blobs/sha256/" + short.removeprefix("sha256:"), 0o644, 0, 0, 0),
            ("blobs/sha512", 0o755, 0, 0, 0),
            ("blobs/sha512/" + long.removeprefix("sha512:"), 0o644, 0, 0, 0),
        ]
        assert (tar.extractfile(members[-1]) or io.BytesIO()).read() == b"bc"
    with pytest.raises(Mismatch, match="longer"):
        write_archive(io.BytesIO(), [], [(short, 1, iter([b"ab"]))])
