# SPDX-License-Identifier: Apache-2.0
"""Indexes of golden layers: which get a zTOC, what is reused, and the exact bytes that come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import InvalidInput, InvalidManifest, InvalidTar, Mismatch, NotFound, NoZtoc
from soci.index import EMPTY_CONFIG_DIGEST, PREFETCH_MEDIA_TYPE, SOCI_INDEX_V1, SOCI_INDEX_V2, parse_index
from soci.oci import Descriptor, Manifest
from soci.toc import TocEntry, Ztoc
from soci_indexing.artifacts import INDEX, PREFETCH, ZTOC, ArtifactsDb
from soci_indexing.build import (
    IndexResult,
    IndexWish,
    LayerDone,
    Noticed,
    Progress,
    build_index,
    gc_labels,
    needs_no_xattrs,
    plan,
)
from soci_indexing.pool import BuildPool
from soci_indexing.stores import NO_LABELS, LayoutStore
from support.indexing import IMAGE, SUBJECT, golden_image, golden_layer
from support.vectors import content, vectors

ALL = IndexWish(min_layer_size=0)

# Put together by hand from the golden zTOCs' digests; the bytes' sha256 is what the index is called.
GOLDEN_V1 = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":'
    b'"application/vnd.amazon.soci.index.v1+json","digest":'
    b'"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":['
    b'{"mediaType":"application/octet-stream","digest":'
    b'"sha256:da5e946af6ef7dd7c5d829a0d5684141224979f9b83cc7385fc8f56e7ccbdbf5","size":35528,"annotations":{'
    b'"com.amazon.soci.image-layer-digest":'
    b'"sha256:4998f696b84376ecd9d55478cd654563745f33f30fe88d472188d92b8b1b54ea",'
    b'"com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",'
    b'"com.amazon.soci.span-size":"4194304"}},{"mediaType":"application/octet-stream","digest":'
    b'"sha256:e6fff528c72499fe4cb98a505da8374eb69a4636ba7434cefb35c7217810c38f","size":3888,"annotations":{'
    b'"com.amazon.soci.image-layer-digest":'
    b'"sha256:6b66bdcf9779c85f6db9bb8883009e58736304e9a17087c9823df75c32ce484e",'
    b'"com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar",'
    b'"com.amazon.soci.span-size":"4194304"}}],"subject":{"mediaType":'
    b'"application/vnd.oci.image.manifest.v1+json","digest":'
    b'"sha256:3333333333333333333333333333333333333333333333333333333333333333","size":1234},"annotations":{'
    b'"com.amazon.soci.build-tool-identifier":"AWS SOCI CLI v0.2"}}'
)


class Labelled(LayoutStore):
    """A layout that remembers the labels it was given."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.labels: dict[Digest, dict[str, str]] = {}

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = NO_LABELS) -> bool:
        self.labels.setdefault(descriptor.digest, {}).update(labels)
        return await super().push(descriptor, content, labels)


@pytest.fixture
def db(tmp_path: Path) -> ArtifactsDb:
    return ArtifactsDb(tmp_path / "artifacts.sqlite3")


async def build(
    store: LayoutStore,
    manifest: Manifest,
    db: ArtifactsDb | None = None,
    wish: IndexWish = ALL,
    said: list[Progress] | None = None,
    **more: Any,
) -> IndexResult:
    heard: list[Progress] = [] if said is None else said
    async with BuildPool(1) as pool:
        return await build_index(
            store,
            more.get("target", store),
            db,
            pool,
            wish,
            subject=SUBJECT,
            manifest=manifest,
            image=IMAGE,
            platform="linux/amd64",
            report=heard.append,
        )


def done(said: list[Progress]) -> list[LayerDone]:
    return [one for one in said if isinstance(one, LayerDone)]


async def test_the_bytes_of_an_index(tmp_path: Path) -> None:
    """Version 1 of a gzip and a plain layer has exactly these bytes; version 2 those without subject."""
    store, manifest = await golden_image(tmp_path, "gnu-types", "plain")
    made = await build(store, manifest)
    assert made.content == GOLDEN_V1
    assert made.descriptor.digest == sha256_digest(GOLDEN_V1)
    assert (made.descriptor.size, made.descriptor.artifact_type) == (len(GOLDEN_V1), SOCI_INDEX_V1)
    second = await build(store, manifest, wish=replace(ALL, version=2))
    subject = GOLDEN_V1[GOLDEN_V1.index(b',"subject"') : GOLDEN_V1.index(b',"annotations":{"com.amazon.soci.build')]
    assert second.content == GOLDEN_V1.replace(b"index.v1", b"index.v2").replace(subject, b"")
    assert second.descriptor.artifact_type == SOCI_INDEX_V2


async def test_everything_is_stored_and_known(tmp_path: Path, db: ArtifactsDb) -> None:
    """Index, config and zTOCs are in the store, labelled for a collector; the database has what each is of."""
    store, manifest = await golden_image(tmp_path / "source", "gnu-types", "plain")
    target = Labelled(tmp_path / "target")
    made = await build(store, manifest, db, target=target)
    ztocs = [entry.ztoc.digest for entry in made.entries]
    assert ztocs == [vectors(name="gnu-types")[0]["ztoc_digest"], vectors(name="plain")[0]["ztoc_digest"]]
    assert await target.read(made.descriptor.digest, limit=10_000) == made.content
    assert await target.read(EMPTY_CONFIG_DIGEST, limit=10) == b"{}"
    for entry in made.entries:
        assert await target.info(entry.ztoc.digest) == entry.ztoc.size
    assert target.labels[made.descriptor.digest] == {
        "containerd.io/gc.ref.content.config": EMPTY_CONFIG_DIGEST,
        "containerd.io/gc.ref.content.ztoc.0": ztocs[0],
        "containerd.io/gc.ref.content.ztoc.1": ztocs[1],
    }
    (index,) = db.all(INDEX)
    assert (index.digest, index.original_digest, index.image_digest) == (made.descriptor.digest, SUBJECT.digest, IMAGE)
    assert (index.platform, index.artifact_type, index.size) == ("linux/amd64", SOCI_INDEX_V1, len(GOLDEN_V1))
    assert {(one.digest, one.original_digest, one.span_size) for one in db.all(ZTOC)} == {
        (ztocs[0], manifest.layers[0].digest, 4194304),
        (ztocs[1], manifest.layers[1].digest, 4194304),
    }


async def test_docker_layers_are_layers_too(tmp_path: Path) -> None:
    """Docker's types give the same zTOCs, and their own name in the annotation."""
    store, manifest = await golden_image(tmp_path, "gnu-types", "plain", docker=True)
    made = await build(store, manifest)
    assert made.content == GOLDEN_V1.replace(
        b"vnd.oci.image.layer.v1.tar+gzip", b"vnd.docker.image.rootfs.diff.tar.gzip"
    ).replace(b'vnd.oci.image.layer.v1.tar"', b'vnd.docker.image.rootfs.diff.tar"')


async def test_a_ztoc_is_reused_where_it_fits(tmp_path: Path, db: ArtifactsDb) -> None:
    """The same layer and span size is not built again; --force, another span size or a lost blob is."""
    store, manifest = await golden_image(tmp_path, "spans")
    first = await build(store, manifest, db)
    ztoc = first.entries[0].ztoc.digest

    async def again(wish: IndexWish = ALL, known: ArtifactsDb | None = db) -> tuple[bool, bytes]:
        said: list[Progress] = []
        made = await build(store, manifest, known, wish, said)
        return done(said)[0].reused, made.content

    assert await again() == (True, first.content)
    assert await again(replace(ALL, force=True)) == (False, first.content)
    assert await again(known=None) == (False, first.content)
    assert (await again(replace(ALL, span_size=40_000)))[0] is False
    await store.delete(ztoc)
    assert await again() == (False, first.content)
    store.path(ztoc).write_bytes(bytes(store.path(ztoc).stat().st_size))
    assert await again() == (False, first.content)  # of the right size, and yet not it
    assert sha256_digest(store.path(ztoc).read_bytes()) == ztoc
    assert await again() == (True, first.content)


@pytest.mark.parametrize(
    ("media_type", "size", "algorithm"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip", 10, "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+gzip", 11, "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+gzip", 9, None),
        ("application/vnd.oci.image.layer.v1.tar", 10, "uncompressed"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", 10, "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", 10, None),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", 10, "gzip"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", 10, "gzip"),
        ("application/vnd.docker.image.rootfs.diff.tar", 10, "uncompressed"),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted", 10, None),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", 10, None),
        ("application/vnd.oci.image.layer.v1.tar+zstd", 10, "zstd"),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", 10, "zstd"),
        ("application/vnd.oci.image.layer.anything", 10, None),
        ("application/vnd.oci.image.layer.v1.tar+unknown", 10, None),
    ],
)
def test_the_rules_of_layers(media_type: str, size: int, algorithm: str | None) -> None:
    """Type and size decide: strictly smaller than the minimum is skipped, and what cannot be read is skipped."""
    (one,) = plan([Descriptor(media_type, SUBJECT.digest, size)], 10)
    assert (one.algorithm, bool(one.skipped)) == (algorithm, algorithm is None)


async def test_a_zstd_layer_has_a_type_of_its_own(tmp_path: Path, db: ArtifactsDb) -> None:
    """Its zTOC is stored, listed and reused under a media type that readers without zstd pass over."""
    store, manifest = await golden_image(tmp_path, "spans", "plain")
    packed = zstandard.compress(content("plain.tar"))
    layer = Descriptor("application/vnd.oci.image.layer.v1.tar+zstd", sha256_digest(packed), len(packed))
    await store.push(layer, packed)
    for _ in range(2):
        made = await build(store, replace(manifest, layers=(manifest.layers[0], layer)), db)
        assert [entry.ztoc.media_type for entry in made.entries] == [
            "application/octet-stream",
            "application/vnd.sociable.ztoc.v1",
        ]
    (known,) = db.ztocs_of(layer.digest)
    assert known.media_type == "application/vnd.sociable.ztoc.v1"


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "application/vnd.amazon.soci.index.v1+json",
        "application/octet-stream",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.image.rootfs.diff.tar.bzip2",
    ],
)
def test_what_is_no_layer_fails_the_whole_index(media_type: str) -> None:
    """A manifest with something else among its layers is no image, however small that is."""
    with pytest.raises(InvalidManifest, match="not a layer"):
        plan([golden_layer("spans"), Descriptor(media_type, SUBJECT.digest, 1)], 10)


def test_prefetch_lists_among_layers_are_passed_over() -> None:
    """They are neither indexed nor refused."""
    assert plan([Descriptor(PREFETCH_MEDIA_TYPE, SUBJECT.digest, 100)], 0) == ()


async def test_skipped_layers_leave_no_gap(tmp_path: Path) -> None:
    """Entries are in the image's order; what was skipped is told, with its reason."""
    store, manifest = await golden_image(tmp_path, "spans", "gnu-types", "plain")
    said: list[Progress] = []
    made = await build(store, manifest, wish=IndexWish(min_layer_size=20_480), said=said)
    assert [entry.layer for entry in made.entries] == [manifest.layers[0].digest, manifest.layers[2].digest]
    assert [(one.layer.digest, one.skipped) for one in made.skipped] == [
        (manifest.layers[1].digest, "1013 bytes, under the minimum of 20480")
    ]
    assert {one.layer.digest: one.skipped for one in done(said) if one.skipped} == {
        manifest.layers[1].digest: "1013 bytes, under the minimum of 20480"
    }


async def test_nothing_to_index_is_an_error(tmp_path: Path, db: ArtifactsDb) -> None:
    """An image of small layers only has no index, and nothing is left behind."""
    store, manifest = await golden_image(tmp_path, "gnu-types")
    with pytest.raises(NoZtoc, match="1013 bytes"):
        await build(store, manifest, db, IndexWish())
    with pytest.raises(NoZtoc, match="no layers"):
        await build(store, replace(manifest, layers=()), db)
    assert db.all() == []


async def test_all_failing_layers_are_told(tmp_path: Path) -> None:
    """One bad layer fails the index; the error names each bad one, and none is made."""
    store, manifest = await golden_image(tmp_path, "spans", "plain", "gnu-types")
    bad = content("bad-trailing-garbage.tar.gz")
    lost = Descriptor(manifest.layers[0].media_type, parse_digest("sha256:" + "77" * 32), 10)
    gzip_called_plain = replace(manifest.layers[0], media_type="application/vnd.oci.image.layer.v1.tar")
    with pytest.raises(InvalidTar, match=manifest.layers[0].digest) as caught:
        await build(store, replace(manifest, layers=(gzip_called_plain, manifest.layers[1], lost)))
    assert lost.digest in str(caught.value)
    with pytest.raises(NotFound):
        await build(store, replace(manifest, layers=(lost,)))
    wrong = Descriptor(manifest.layers[0].media_type, sha256_digest(bad), len(bad))
    assert await store.push(wrong, bad)
    with pytest.raises(Exception, match=wrong.digest):
        await build(store, replace(manifest, layers=(manifest.layers[0], wrong)))


async def test_a_layer_of_another_size_is_refused(tmp_path: Path) -> None:
    """The manifest's word on a layer's size is checked."""
    store, manifest = await golden_image(tmp_path, "spans")
    with pytest.raises(Mismatch, match="76434 bytes, not 76435"):
        await build(store, replace(manifest, layers=(replace(manifest.layers[0], size=76_435),)))


async def test_a_layer_twice_is_built_once(tmp_path: Path) -> None:
    """It is in the index twice all the same, as it is in the image."""
    store, manifest = await golden_image(tmp_path, "gnu-types", "plain")
    said: list[Progress] = []
    made = await build(store, replace(manifest, layers=manifest.layers + manifest.layers[:1]), said=said)
    assert [entry.layer for entry in made.entries] == [manifest.layers[at].digest for at in (0, 1, 0)]
    assert len(done(said)) == 2


async def test_the_xattr_optimization(tmp_path: Path, db: ArtifactsDb) -> None:
    """Only layers without extended attributes and opaque directories are marked, new or reused."""
    store, manifest = await golden_image(tmp_path, "spans", "pax-types")
    expected = [not needs_xattrs for needs_xattrs in (False, True)]
    for _ in range(2):
        made = await build(store, manifest, db, replace(ALL, optimizations=frozenset({"xattr"})))
        assert [entry.disable_xattrs for entry in made.entries] == expected
    assert b'"com.amazon.soci.disable-xattrs":"true","com.amazon.soci.image-layer-digest"' in made.content
    plain = await build(store, manifest, db)
    assert b"disable-xattrs" not in plain.content


@pytest.mark.parametrize(
    ("name", "pax", "free"),
    [
        (b"a", {}, True),
        (b"a", {b"mtime": b"1"}, True),
        (b"a", {b"SCHILY.xattr.user.a": b""}, False),
        (b"a/.wh..wh..opq", {}, False),
        (b"a/.wh.b", {}, True),
    ],
)
def test_which_layers_need_no_xattrs(name: bytes, pax: dict[bytes, bytes], *, free: bool) -> None:
    """Any attribute counts, even an empty one, and so does an opaque directory."""
    assert needs_no_xattrs(Ztoc("", "", 0, 0, (TocEntry(name, "reg", 0, 0, pax=pax),), "gzip", 0, (), b"")) is free


async def test_prefetch_lists_are_made(tmp_path: Path, db: ArtifactsDb) -> None:
    """Files that are found make a list for their layer, after all zTOCs; the others are noticed; reused zTOCs count."""
    store, manifest = await golden_image(tmp_path, "plain", "spans")
    name = min(vectors(name="spans", span_size=40_000)[0]["files"])
    wish = replace(ALL, span_size=40_000, prefetch_files=("/" + name, "not/there"))
    for _ in range(2):
        said: list[Progress] = []
        made = await build(store, manifest, db, wish, said)
        (entry,) = made.prefetch
        assert entry.layer == manifest.layers[1].digest
        assert dict(entry.ztoc.annotations) == {"com.amazon.soci.image-layer-digest": manifest.layers[1].digest}
        assert [one.message for one in said if isinstance(one, Noticed)] == [
            "prefetch 'not/there': no such file in a layer that has a zTOC"
        ]
    written = await store.read(entry.ztoc.digest, limit=1000)
    assert written.startswith(b'{"version":"1.0","prefetch_spans":[{"start_span":')
    index = parse_index(made.content)
    assert index.prefetch == made.prefetch
    assert made.content.index(b"prefetch.v1") > made.content.rindex(b"octet-stream")
    assert gc_labels(index)["containerd.io/gc.ref.content.ztoc.2"] == entry.ztoc.digest
    (known,) = db.all(PREFETCH)
    assert (known.digest, known.original_digest) == (entry.ztoc.digest, entry.layer)


@pytest.mark.parametrize(
    "values",
    [{"span_size": -1}, {"span_size": 2**63}, {"min_layer_size": -1}, {"min_layer_size": 2**63}],
    ids=str,
)
def test_sizes_that_nobody_can_mean(values: dict[str, int]) -> None:
    """Negative sizes and those beyond 63 bits are refused."""
    with pytest.raises(InvalidInput):
        IndexWish(**values)  # type: ignore[arg-type]


def test_unknown_optimizations_are_refused() -> None:
    """The error says which there are."""
    with pytest.raises(InvalidInput, match="there is xattr"):
        IndexWish(optimizations=frozenset({"speed"}))
