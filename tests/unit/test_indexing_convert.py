# SPDX-License-Identifier: Apache-2.0
"""Conversion: which bytes come out, and that nothing else in the image is broken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, parse_digest
from soci.errors import InvalidInput, InvalidManifest, LimitExceeded, NotFound, NoZtoc
from soci.index import SOCI_INDEX_V2, parse_index
from soci.oci import OCI_MANIFEST, Descriptor, Platform, parse_platform
from soci_indexing.artifacts import Artifact, ArtifactsDb
from soci_indexing.build import IndexWish, Noticed, Progress
from soci_indexing.convert import Converted, ConvertWish, convert, index_builder, open_image, platforms_of
from soci_indexing.layout import DirectorySource, LayoutContent
from soci_indexing.pool import BuildPool
from soci_indexing.rewrite import (
    canonical_descriptor,
    canonical_index,
    canonical_manifest,
    encode_index,
    rewrite_artifact,
    rewrite_image,
    soci_entry,
)
from soci_indexing.stores import NO_LABELS
from support.layouts import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    Json,
    Layout,
)

AMD64, ARM64 = parse_platform("linux/amd64"), parse_platform("linux/arm64")
A, B, C = (Digest("sha256:" + digit * 64) for digit in "abc")
INDEX_DIGEST = "com.amazon.soci.index-digest"
MANIFEST_DIGEST = "com.amazon.soci.image-manifest-digest"

GOLDEN_INDEX = (
    '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci'
    '.image.manifest.v1+json","digest":"sha256:4444444444444444444444444444444444444444444444444444444444444444","size":600,'
    '"annotations":{"com.amazon.soci.index-digest":"sha256:5555555555555555555555555555555555555555555555555555555555555555"'
    '},"platform":{"architecture":"amd64","os":"linux"}},{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":'
    '"sha256:5555555555555555555555555555555555555555555555555555555555555555","size":700,"annotations":{"com.amazon.soci.im'
    'age-manifest-digest":"sha256:4444444444444444444444444444444444444444444444444444444444444444"},"platform":{"architectu'
    're":"amd64","os":"linux"},"artifactType":"application/vnd.amazon.soci.index.v2+json"}]}'
)


@dataclass
class Labelled(LayoutContent):
    """A layout that remembers the labels which it was given."""

    source: DirectorySource
    fresh: Path
    labels: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.source, self.fresh)

    async def push(self, descriptor: Descriptor, content: bytes, labels: Mapping[str, str] = NO_LABELS) -> bool:
        await self.label(descriptor.digest, labels)
        return await super().push(descriptor, content, labels)

    async def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        self.labels.setdefault(digest, {}).update(labels)


@dataclass
class World:
    """A layout to convert in, whose content is always this folder; and what was said meanwhile."""

    layout: Layout
    told: list[str] = field(default_factory=list)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)

    async def convert(
        self,
        target: Json,
        *platforms: Platform,
        every: bool = False,
        db: ArtifactsDb | None = None,
        host: Platform = AMD64,
        **index: Any,
    ) -> Converted:
        def report(progress: Progress) -> None:
            if isinstance(progress, Noticed):
                self.told.append(progress.message)

        content = Labelled(DirectorySource(self.layout.folder), self.layout.folder)
        descriptor = Descriptor(target["mediaType"], parse_digest(target["digest"]), target["size"])
        async with BuildPool(1) as pool:
            wish = IndexWish(span_size=4096, **{"min_layer_size": 0, **index})
            build = index_builder(content, content, db, pool=pool, wish=wish, image=descriptor.digest, report=report)
            wanted = ConvertWish(host, platforms, every)
            converted = await convert(content, descriptor, wanted, build=build, db=db, report=report)
        self.labels = content.labels
        return converted

    def entries(self, converted: Converted) -> list[Json]:
        found: list[Json] = self.layout.json(converted.target.digest)["manifests"]
        return found

    def check(self, converted: Converted) -> None:
        """Every SOCI entry is a SOCI index, its manifest is listed, and the two name each other."""
        entries = self.entries(converted)
        images = {(entry["digest"], entry["platform"]["architecture"]): entry for entry in entries}
        for entry in entries:
            content = self.layout.read(entry["digest"])
            assert len(content) == entry["size"]
            if entry.get("artifactType") == SOCI_INDEX_V2:
                assert parse_index(content).version == 2
                image_entry = images[entry["annotations"][MANIFEST_DIGEST], entry["platform"]["architecture"]]
                assert image_entry["annotations"][INDEX_DIGEST] == entry["digest"]
                manifest = self.layout.json(image_entry["digest"])
                assert manifest["annotations"][INDEX_DIGEST] == entry["digest"]
                assert image_entry["platform"] == entry["platform"]
                assert "artifactType" not in image_entry


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Layout(tmp_path))


def as_target(converted: Converted) -> Json:
    return {"mediaType": OCI_INDEX, "digest": converted.target.digest, "size": converted.target.size}


# --- documents ----------------------------------------------------------------------------------------------------------


def test_the_image_index_is_the_known_bytes() -> None:
    """The format's published example comes out byte for byte, digest and all."""
    image_digest, index_digest = Digest("sha256:" + "4" * 64), Digest("sha256:" + "5" * 64)
    platform = {"os": "linux", "architecture": "amd64"}
    entry = {
        "platform": platform,
        "annotations": {INDEX_DIGEST: index_digest},
        "size": 600,
        "digest": image_digest,
        "mediaType": OCI_MANIFEST,
    }
    added = soci_entry(Descriptor(OCI_MANIFEST, index_digest, 700, platform=AMD64), image_digest)
    encoded = encode_index({"manifests": [], "schemaVersion": 2, "mediaType": DOCKER_LIST}, [entry, added])
    assert encoded.decode() == GOLDEN_INDEX
    assert len(encoded) == 801
    assert hashlib.sha256(encoded).hexdigest() == "0aa03516ccd46f2700536ba6dcc2b4f8599c851cc6762ec1fed00faa91fa4986"


def test_a_docker_manifest_becomes_an_oci_one() -> None:
    """Manifest and config get OCI's types; layers keep theirs, and all that was said of them."""
    before = {
        "mediaType": DOCKER_MANIFEST,
        "schemaVersion": 2,
        "layers": [{"size": 7, "digest": B, "mediaType": DOCKER_LAYER, "urls": ["https://e/?a=1&b=<2>"]}],
        "config": {"size": 5, "mediaType": DOCKER_CONFIG, "digest": A},
        "annotations": {"z": "ü", "a": ""},
    }
    assert rewrite_image(json.dumps(before, indent=3).encode(), C).decode() == (
        '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci'
        f'.image.config.v1+json","digest":"{A}","size":5}},"layers":[{{"mediaType":"application/vnd.docker.image.rootfs.diff.ta'
        f'r.gzip","digest":"{B}","size":7,"urls":["https://e/?a=1\\u0026b=\\u003c2\\u003e"]}}],"annotations":{{"a":"","com.amaz'
        f'on.soci.index-digest":"{C}","z":"ü"}}}}'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"mediaType": "m", "digest": "d", "size": 0}, {"mediaType": "m", "digest": "d", "size": 0}),
        (
            {"annotations": {}, "size": 1, "urls": [], "digest": "d", "data": "", "mediaType": "m", "platform": None},
            {"mediaType": "m", "digest": "d", "size": 1},
        ),
        (
            {
                "artifactType": "t",
                "platform": {"variant": "v7", "os": "linux", "os.features": ["x"], "os.version": "1", "odd": 1},
                "data": "e30=",
                "annotations": {"b": "1", "a": "2"},
                "urls": ["u"],
                "mediaType": "m",
                "size": 1,
                "digest": "d",
            },
            {
                "mediaType": "m",
                "digest": "d",
                "size": 1,
                "urls": ["u"],
                "annotations": {"a": "2", "b": "1"},
                "data": "e30=",
                "platform": {
                    "architecture": "",
                    "os": "linux",
                    "os.version": "1",
                    "os.features": ["x"],
                    "variant": "v7",
                    "odd": 1,
                },
                "artifactType": "t",
            },
        ),
        (
            {"future": {"b": 1, "a": [None, 1.5]}, "mediaType": "m", "digest": "d", "size": 1, "other": None},
            {"mediaType": "m", "digest": "d", "size": 1, "future": {"b": 1, "a": [None, 1.5]}, "other": None},
        ),
    ],
    ids=["least", "empty members go", "order", "unknown members stay"],
)
def test_descriptors_in_canonical_order(before: Json, after: Json) -> None:
    """Known members first and in order, empty optional ones left out, unknown ones behind, untouched."""
    assert json.dumps(canonical_descriptor(before)) == json.dumps(after)


def test_manifests_and_indexes_in_canonical_order() -> None:
    """The same for the documents around descriptors; absent layers are null, and an empty list stays one."""
    blob = {"mediaType": "m", "digest": "d", "size": 0}
    manifest = {
        "future": 1,
        "annotations": {"b": "1", "a": "2"},
        "subject": blob,
        "config": blob,
        "artifactType": "t",
        "mediaType": "m",
        "schemaVersion": 2,
    }
    order = ["schemaVersion", "mediaType", "artifactType", "config", "layers", "subject", "annotations", "future"]
    assert list(canonical_manifest(manifest)) == order
    assert canonical_manifest(manifest)["layers"] is None
    assert canonical_manifest({**manifest, "layers": []})["layers"] == []
    index = {"future": 1, "subject": blob, "manifests": [blob], "artifactType": "", "schemaVersion": 2}
    assert list(canonical_index(index)) == ["schemaVersion", "manifests", "subject", "future"]


def test_an_artifact_changes_only_with_its_subject() -> None:
    """A signature stays byte for byte, white space and all, until the manifest that it signs moves."""
    subject = {"mediaType": DOCKER_MANIFEST, "digest": A, "size": 3}
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": C, "size": 2}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [], "subject": subject}
    content = json.dumps(document, indent=1).encode()
    assert rewrite_artifact(content, {}) is content
    assert rewrite_artifact(content, {A: Descriptor(OCI_MANIFEST, A, 3)}) is content
    moved = json.loads(rewrite_artifact(content, {A: Descriptor(OCI_MANIFEST, B, 9)}))
    assert moved == document | {"subject": {"mediaType": OCI_MANIFEST, "digest": B, "size": 9}}


def test_an_image_index_that_nobody_would_read_is_refused() -> None:
    """More entries than readers take are an error at once, not at the next reading."""
    entry = {"mediaType": OCI_MANIFEST, "digest": A, "size": 1}
    with pytest.raises(LimitExceeded, match="1001 entries"):
        encode_index({"schemaVersion": 2}, [entry] * 1001)


# --- whole images -------------------------------------------------------------------------------------------------------


async def test_a_single_manifest_becomes_an_index(world: World) -> None:
    """The image of one manifest comes out as an index of it and its SOCI index, for the platform of its config."""
    layers = [world.layout.layer(1), world.layout.layer(2)]
    target = world.layout.image("arm64", layers, docker=True)
    converted = await world.convert(target)
    world.check(converted)
    shown, index = world.entries(converted)
    assert shown["platform"] == index["platform"] == {"architecture": "arm64", "os": "linux"}
    manifest = world.layout.json(shown["digest"])
    before = world.layout.json(target["digest"])
    assert manifest["config"] == before["config"] | {"mediaType": OCI_CONFIG}
    assert manifest["layers"] == before["layers"]
    assert manifest["mediaType"] == shown["mediaType"] == OCI_MANIFEST
    soci = parse_index(world.layout.read(index["digest"]))
    assert [entry.layer for entry in soci.layers] == [layer.digest for layer in layers]
    assert world.layout.json(converted.target.digest).keys() == {"schemaVersion", "mediaType", "manifests"}
    assert [index.platform for index in converted.indexes] == [ARM64]


async def test_labels_keep_everything(world: World) -> None:
    """From the image index a collector finds every blob, old and new."""
    target = world.layout.image("amd64", [world.layout.layer(1)])
    converted = await world.convert(target)
    shown, index = world.entries(converted)
    manifest, soci = world.layout.json(shown["digest"]), world.layout.json(index["digest"])
    ref = "containerd.io/gc.ref.content"
    assert world.labels[converted.target.digest] == {f"{ref}.m.0": shown["digest"], f"{ref}.m.1": index["digest"]}
    assert world.labels[shown["digest"]] == {
        f"{ref}.config": manifest["config"]["digest"],
        f"{ref}.l.0": manifest["layers"][0]["digest"],
    }
    assert world.labels[index["digest"]] == {
        f"{ref}.config": soci["config"]["digest"],
        f"{ref}.ztoc.0": soci["layers"][0]["digest"],
    }


async def test_platforms_are_converted_as_wished(world: World) -> None:
    """By default the host's, else the named ones, each once and in order, or all."""
    base = world.layout.layer(1)
    entries = [
        world.layout.image(name, [base, world.layout.layer(seed)]) for seed, name in enumerate(("amd64", "arm64"), 2)
    ]
    target = world.layout.index(entries, DOCKER_LIST)

    async def made(*platforms: Platform, **wish: Any) -> list[str]:
        converted = await world.convert(target, *platforms, **wish)
        world.check(converted)
        kinds = ["artifactType" in entry for entry in world.entries(converted)]
        assert kinds == sorted(kinds), "images come before SOCI indexes"
        return [str(index.platform) for index in converted.indexes]

    assert await made() == ["linux/amd64"]
    assert await made(host=ARM64) == ["linux/arm64"]
    assert await made(every=True) == ["linux/amd64", "linux/arm64"]
    assert await made(ARM64, AMD64) == ["linux/arm64", "linux/amd64"]
    assert await made(ARM64, AMD64, Platform("linux", "aarch64", "v8")) == ["linux/arm64", "linux/amd64"]
    with pytest.raises(NotFound, match=r"no image for linux/s390x; there is linux/amd64, linux/arm64"):
        await made(AMD64, parse_platform("linux/s390x"))


async def test_other_platforms_that_are_not_here_stay_as_they_are(world: World) -> None:
    """What was not pulled is carried along by its descriptor; asking for it says what to do."""
    entries = [
        world.layout.image("amd64", [world.layout.layer(1)]),
        world.layout.image("arm64", [world.layout.layer(2)]),
    ]
    target = world.layout.index(entries)
    world.layout.remove(entries[1]["digest"])
    converted = await world.convert(target)
    assert world.entries(converted)[1] == entries[1]
    with pytest.raises(NotFound, match=f"the manifest for linux/arm64, {entries[1]['digest']}, is not here"):
        await world.convert(target, every=True)


async def test_platforms_with_nothing_to_index_are_left_alone(world: World) -> None:
    """One platform may have small layers only; where all have, there is nothing to convert."""
    entries = [
        world.layout.image("amd64", [world.layout.layer(1, 50)]),
        world.layout.image("arm64", [world.layout.layer(2, 50_000)]),
    ]
    target = world.layout.index(entries)
    converted = await world.convert(target, every=True, min_layer_size=10_000)
    assert [str(index.platform) for index in converted.indexes] == ["linux/arm64"]
    assert world.told[0].startswith("linux/amd64 is left as it is: no zTOC for any layer")
    assert "annotations" not in world.entries(converted)[0]
    with pytest.raises(NoZtoc, match="no ztocs created, all layers either skipped or produced errors"):
        await world.convert(target, every=True, min_layer_size=1 << 30)


async def test_attestations_follow_their_image(world: World) -> None:
    """An attestation keeps its bytes and its entry's annotations, and names its image by the new digest."""
    shown = world.layout.image("amd64", [world.layout.layer(1)], annotations={"mine": "kept"})
    attestation = world.layout.attestation(shown)
    converted = await world.convert(world.layout.index([shown, attestation]), every=True)
    world.check(converted)
    after, attested, _ = world.entries(converted)
    assert attested["digest"] == attestation["digest"]
    assert attested["annotations"] == attestation["annotations"] | {"vnd.docker.reference.digest": after["digest"]}
    assert attested["platform"] == {"architecture": "unknown", "os": "unknown"}
    assert after["annotations"] == {"mine": "kept", INDEX_DIGEST: converted.indexes[0].digest}
    again = await world.convert(as_target(converted), min_layer_size=10_000)
    assert again == converted


async def test_a_signature_by_subject_follows_its_image(world: World) -> None:
    """An artifact in the index that refers to the image is written anew with the new digest."""
    shown = world.layout.image("amd64", [world.layout.layer(1)])
    empty = world.layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    subject = {name: shown[name] for name in ("mediaType", "digest", "size")}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": [empty], "subject": subject}
    signature = world.layout.put(document, OCI_MANIFEST, artifactType="application/vnd.example.signature")
    # Listed before the image: the order of the entries must not matter.
    converted = await world.convert(world.layout.index([signature, shown]))
    after, image_after, _ = world.entries(converted)
    assert world.layout.json(after["digest"])["subject"]["digest"] == image_after["digest"]
    assert world.layout.json(after["digest"])["config"] == empty
    assert after["artifactType"] == "application/vnd.example.signature"


async def test_converting_again_changes_nothing(world: World) -> None:
    """A converted image converted once more, with the same wishes, is the same image."""
    entries = [
        world.layout.image("amd64", [world.layout.layer(1)], docker=True),
        world.layout.image("arm64", [world.layout.layer(2)]),
    ]
    converted = await world.convert(world.layout.index(entries, DOCKER_LIST), every=True)
    assert await world.convert(as_target(converted), every=True) == converted
    assert await world.convert(as_target(converted), every=True, force=True) == converted


async def test_converting_some_platforms_again_leaves_the_others_valid(world: World) -> None:
    """A platform that is not converted again keeps a SOCI index that can be read, named by its manifest, and listed."""
    entries = [
        world.layout.image("amd64", [world.layout.layer(1)]),
        world.layout.image("arm64", [world.layout.layer(2, 60_000)]),
    ]
    converted = await world.convert(world.layout.index(entries), every=True)
    before = world.entries(converted)
    again = await world.convert(as_target(converted), AMD64, optimizations=frozenset({"xattr"}))
    world.check(again)
    after = world.entries(again)
    assert len(after) == 4
    assert [one["digest"] == two["digest"] for one, two in zip(before, after, strict=True)] == [
        False,
        True,
        False,
        True,
    ]
    smaller = await world.convert(as_target(again), AMD64, ARM64, min_layer_size=world.layout.layer(1).size + 1)
    world.check(smaller)
    assert world.told[-1].startswith("linux/amd64 is left as it is")


async def test_a_manifest_in_other_words_keeps_its_index(world: World) -> None:
    """Where a manifest is written anew though its platform is not converted, its SOCI index's entry follows it."""
    target = world.layout.index(
        [world.layout.image(name, [world.layout.layer(seed)]) for seed, name in enumerate(("amd64", "arm64"))]
    )
    converted = await world.convert(target, every=True)
    entries = world.entries(converted)
    spaced = json.dumps(world.layout.json(entries[1]["digest"]), indent=2).encode()
    entries[1] |= world.layout.blob(spaced, OCI_MANIFEST)
    entries[3]["annotations"][MANIFEST_DIGEST] = entries[1]["digest"]
    again = await world.convert(world.layout.index(entries), AMD64)
    world.check(again)
    assert again.target == converted.target


async def test_a_replaced_index_takes_the_place_of_the_old_one(world: World) -> None:
    """Entries do not pile up: each platform has one SOCI index, where its first one was."""
    target = world.layout.index(
        [world.layout.image(name, [world.layout.layer(seed)]) for seed, name in enumerate(("amd64", "arm64"))]
    )
    converted = await world.convert(target, ARM64)
    converted = await world.convert(as_target(converted), AMD64)
    converted = await world.convert(as_target(converted), ARM64, optimizations=frozenset({"xattr"}))
    world.check(converted)
    kinds = [(entry["platform"]["architecture"], "artifactType" in entry) for entry in world.entries(converted)]
    assert kinds == [("amd64", False), ("arm64", False), ("arm64", True), ("amd64", True)]


async def test_an_index_without_its_artifact_type_is_known_by_its_config(world: World) -> None:
    """Tools that drop an entry's artifact type do not make a SOCI index an image."""
    converted = await world.convert(world.layout.image("amd64", [world.layout.layer(1)]))
    entries = world.entries(converted)
    del entries[1]["artifactType"]
    again = await world.convert(world.layout.index(entries))
    assert again == converted


async def test_members_that_nobody_knows_survive(world: World) -> None:
    """Unknown members of index, entries, manifest and their descriptors are still there, behind the known ones."""
    more: dict[str, Any] = {"org.example": {"z": 1, "a": [1.5, None, "<&>"]}}
    shown = world.layout.image("amd64", [world.layout.layer(1)], manifest_more=more, **more)
    converted = await world.convert(world.layout.index([shown], **more, annotations={"b": "1", "a": "2"}))
    document = world.layout.json(converted.target.digest)
    assert document["org.example"] == document["manifests"][0]["org.example"] == more["org.example"]
    assert document["annotations"] == {"a": "2", "b": "1"}
    manifest = world.layout.json(document["manifests"][0]["digest"])
    assert manifest["org.example"] == more["org.example"]
    assert list(manifest)[-1] == "org.example"
    assert list(document) == ["schemaVersion", "mediaType", "manifests", "annotations", "org.example"]


async def test_an_entry_without_platform_gets_its_configs(world: World) -> None:
    """Clients prefer entries with a platform, and would else take the SOCI index for the image."""
    target = world.layout.index([world.layout.image("amd64", [world.layout.layer(1)], platform=False)])
    converted = await world.convert(target)
    world.check(converted)
    assert world.entries(converted)[0]["platform"] == {"architecture": "amd64", "os": "linux"}


async def test_one_manifest_for_two_platforms(world: World) -> None:
    """A manifest listed twice is converted once, and each of its platforms gets its entry."""
    shown = world.layout.image("amd64", [world.layout.layer(1)])
    other = {**shown, "platform": {"architecture": "386", "os": "linux"}}
    converted = await world.convert(world.layout.index([shown, other]), every=True)
    world.check(converted)
    assert len(world.entries(converted)) == 4
    assert len({entry["digest"] for entry in world.entries(converted)}) == 2


async def test_what_is_no_image_is_refused(world: World) -> None:
    """An artifact, an index of no platform, and a nested index in a manifest's place say what they are not."""
    empty = world.layout.blob(b"{}", "application/vnd.oci.empty.v1+json")
    artifact = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": []}
    with pytest.raises(InvalidManifest):
        await world.convert(world.layout.put(artifact, OCI_MANIFEST))
    with pytest.raises(InvalidInput, match="for no platform"):
        await world.convert(world.layout.index([]))
    nested = world.layout.index([])
    with pytest.raises(InvalidManifest, match="but it is an image index"):
        await world.convert(world.layout.index([{**nested, "mediaType": OCI_MANIFEST}]))


async def test_the_database_follows(world: World, tmp_path: Path) -> None:
    """After a conversion the index is known as the new image's and the new manifest's; zTOCs are found again."""
    db = ArtifactsDb(tmp_path / "artifacts.sqlite3")
    converted = await world.convert(world.layout.image("amd64", [world.layout.layer(1)]), db=db)
    shown, index = world.entries(converted)
    (known,) = db.all("soci_index")
    assert isinstance(known, Artifact)
    assert (known.digest, known.original_digest, known.image_digest) == (
        index["digest"],
        shown["digest"],
        converted.target.digest,
    )
    assert (known.artifact_type, known.platform) == (SOCI_INDEX_V2, "linux/amd64")
    assert len(db.all("soci_layer")) == 1
    assert await world.convert(as_target(converted), db=db) == converted


async def test_artifacts_in_another_store_are_in_the_image_too(world: World, tmp_path: Path) -> None:
    """With a store of its own for artifacts, both that store and the image's have what the index names."""
    target = world.layout.image("amd64", [world.layout.layer(1)])
    other = Layout(tmp_path / "other")
    content = LayoutContent(DirectorySource(world.layout.folder), world.layout.folder)
    artifacts = LayoutContent(DirectorySource(other.folder), other.folder)
    descriptor = Descriptor(OCI_MANIFEST, parse_digest(target["digest"]), target["size"])
    ignore: Any = lambda _: None  # noqa: E731
    async with BuildPool(1) as pool:
        wish = IndexWish(min_layer_size=0)
        build = index_builder(content, artifacts, None, pool=pool, wish=wish, image=descriptor.digest, report=ignore)
        made = await convert(content, descriptor, ConvertWish(AMD64), build=build, db=None, report=ignore)
    world.check(made)
    for layout in (world.layout, other):
        index = layout.json(made.indexes[0].digest)
        assert layout.read(index["config"]["digest"]) == b"{}"
        assert layout.read(index["layers"][0]["digest"])


async def test_windows_versions_are_kept(world: World) -> None:
    """A config's version and features of Windows become the entry's; of several versions the first is converted."""
    layer = world.layout.layer(1)
    config = {
        "architecture": "amd64",
        "os": "windows",
        "os.version": "10.0.17763.1",
        "os.features": ["win32k"],
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
    }
    blob = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": world.layout.put(config, OCI_CONFIG),
        "layers": [blob],
    }
    target = world.layout.put(manifest, OCI_MANIFEST)
    content = LayoutContent(DirectorySource(world.layout.folder), world.layout.folder)
    opened = await open_image(content, Descriptor(OCI_MANIFEST, parse_digest(target["digest"]), target["size"]))
    (platform,) = platforms_of(opened, ConvertWish(AMD64, all_platforms=True))
    assert (platform.os_version, platform.os_features) == ("10.0.17763.1", ("win32k",))
    newer = {**target, "platform": {"architecture": "amd64", "os": "windows", "os.version": "10.0.20348.1"}}
    older = {**target, "platform": {"architecture": "amd64", "os": "windows", "os.version": "10.0.17763.1"}}
    both = world.layout.index([older, newer])
    opened = await open_image(content, Descriptor(OCI_INDEX, parse_digest(both["digest"]), both["size"]))
    assert [one.os_version for one in platforms_of(opened, ConvertWish(AMD64, all_platforms=True))] == ["10.0.17763.1"]
    converted = await world.convert(target, every=True)
    assert [entry["platform"] for entry in world.entries(converted)] == [
        {"architecture": "amd64", "os": "windows", "os.version": "10.0.17763.1", "os.features": ["win32k"]}
    ] * 2
