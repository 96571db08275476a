# SPDX-License-Identifier: Apache-2.0
"""OCI documents: parsed with suspicion, written byte for byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from soci import oci
from soci.digest import Digest
from soci.errors import InvalidInput, InvalidManifest, NotFound
from soci.oci import (
    Descriptor,
    ImageIndex,
    Manifest,
    Platform,
    chain_ids,
    choose_platform,
    encode_manifest,
    is_layer,
    layer_compression,
    parse_config,
    parse_manifest,
    parse_platform,
)
from soci.oci_json import MAX_JSON_PARTS


def digest(digit: str) -> Digest:
    return Digest("sha256:" + digit * 64)


def blob(digit: str = "1", **more: Any) -> dict[str, Any]:
    return {"mediaType": "application/x", "digest": digest(digit), "size": 7} | more


def manifest(**changes: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "config": blob("c"), "layers": [blob("a")]} | changes


def index(**changes: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [blob("a")]} | changes


def text(document: object) -> bytes:
    return json.dumps(document).encode()


GOLDEN_INDEX = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/'
    b'vnd.oci.image.manifest.v1+json","digest":"sha256:4444444444444444444444444444444444444444444444444444444444444444'
    b'","size":600,"annotations":{"com.amazon.soci.index-digest":"sha256:5555555555555555555555555555555555555555555555'
    b'555555555555555555"},"platform":{"architecture":"amd64","os":"linux"}},{"mediaType":"application/vnd.oci.image.ma'
    b'nifest.v1+json","digest":"sha256:5555555555555555555555555555555555555555555555555555555555555555","size":700,"an'
    b'notations":{"com.amazon.soci.image-manifest-digest":"sha256:444444444444444444444444444444444444444444444444444444'
    b'4444444444"},"platform":{"architecture":"amd64","os":"linux"},"artifactType":"application/vnd.amazon.soci.index.v'
    b'2+json"}]}'
)


def test_an_image_index_is_written_as_it_was_read() -> None:
    """The bytes of a SOCI-enabled image index survive parsing and writing, to the digest."""
    assert (
        hashlib.sha256(GOLDEN_INDEX).hexdigest() == "0aa03516ccd46f2700536ba6dcc2b4f8599c851cc6762ec1fed00faa91fa4986"
    )
    parsed = parse_manifest(GOLDEN_INDEX)
    assert isinstance(parsed, ImageIndex)
    assert [entry.size for entry in parsed.manifests] == [600, 700]
    assert encode_manifest(parsed) == GOLDEN_INDEX


def test_a_manifest_with_everything_round_trips() -> None:
    """Every member that the values know is read and written again, in canonical order."""
    full = manifest(
        artifactType="application/y",
        layers=[
            blob(
                "a",
                urls=["https://example.com/a"],
                annotations={"b": "2", "a": "1"},
                data="e30=",
                platform={
                    "architecture": "arm",
                    "os": "windows",
                    "os.version": "10",
                    "os.features": ["win32k"],
                    "variant": "v7",
                },
                artifactType="application/z",
            )
        ],
        subject=blob("b"),
        annotations={"é": "<&>"},
    )
    parsed = parse_manifest(text(full))
    assert isinstance(parsed, Manifest)
    assert json.loads(encode_manifest(parsed)) == full
    assert parse_manifest(encode_manifest(parsed)) == parsed
    assert list(json.loads(encode_manifest(parsed))) == [
        "schemaVersion",
        "mediaType",
        "artifactType",
        "config",
        "layers",
        "subject",
        "annotations",
    ]
    layer = json.loads(encode_manifest(parsed))["layers"][0]
    assert list(layer) == ["mediaType", "digest", "size", "urls", "annotations", "data", "platform", "artifactType"]
    assert list(layer["platform"]) == ["architecture", "os", "os.version", "os.features", "variant"]
    assert list(layer["annotations"]) == ["a", "b"]


def test_null_and_absent_members_are_the_same() -> None:
    """What Go writes for an empty value reads as an empty value."""
    parsed = parse_manifest(text(manifest(layers=None, annotations=None, subject=None)))
    assert parsed == parse_manifest(text({"schemaVersion": 2, "config": blob("c")}))
    assert isinstance(parsed, Manifest)
    assert (parsed.media_type, parsed.layers, parsed.subject) == (oci.OCI_MANIFEST, (), None)


def test_documents_are_told_apart_by_their_members_where_no_type_is_given() -> None:
    """An OCI document may leave out its own media type."""
    document = index()
    del document["mediaType"]
    parsed = parse_manifest(text(document))
    assert isinstance(parsed, ImageIndex)
    assert parsed.media_type == oci.OCI_INDEX
    assert isinstance(parse_manifest(text(index(mediaType=oci.DOCKER_LIST))), ImageIndex)
    assert isinstance(parse_manifest(text(manifest(mediaType=oci.DOCKER_MANIFEST))), Manifest)


@pytest.mark.parametrize(
    "document",
    [
        [],
        "x",
        None,
        {},
        manifest(schemaVersion=1),
        manifest(schemaVersion="2"),
        manifest(schemaVersion=True),
        manifest(schemaVersion=2.0),
        manifest(fsLayers=[]),
        manifest(mediaType="text/html"),
        manifest(mediaType=oci.OCI_INDEX),
        manifest(mediaType=3),
        manifest(manifests=[blob()]),
        manifest(config=None),
        manifest(config=[]),
        manifest(layers={}),
        manifest(layers=["x"]),
        manifest(layers=[blob(digest="sha256:ab")]),
        manifest(layers=[blob(digest="md5:" + "a" * 32)]),
        manifest(layers=[blob(digest=5)]),
        manifest(layers=[blob(size=-1)]),
        manifest(layers=[blob(size=2**63)]),
        manifest(layers=[blob(size=1.5)]),
        manifest(layers=[blob(size=False)]),
        manifest(layers=[blob(size="7")]),
        manifest(layers=[blob(mediaType=None)]),
        manifest(layers=[blob(annotations=["a"])]),
        manifest(layers=[blob(annotations={"a": 1})]),
        manifest(layers=[blob(platform="linux/amd64")]),
        manifest(layers=[blob(urls="x")]),
        manifest(layers=[blob()] * (oci.MAX_LAYERS + 1)),
        manifest(subject=[]),
        manifest(annotations={"a": "\ud800"}),
        index(mediaType=oci.OCI_MANIFEST),
        index(layers=[]),
        index(config=blob()),
        index(manifests=[blob()] * (oci.MAX_MANIFESTS + 1)),
    ],
)
def test_bad_manifests_are_refused(document: object) -> None:
    """A document of a wrong shape, type or size is InvalidManifest, in a message of bounded length."""
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(text(document))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"{",
        b"\xef\xbb\xbf{}",
        b"NaN",
        b'{"schemaVersion":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":[' + b"0," * (MAX_JSON_PARTS + 1) + b"0]}",
        b'{"schemaVersion":2,"schemaVersion":2,"manifests":[]}',
        b" " * oci.MAX_MANIFEST_BYTES + b"{}",
    ],
)
def test_bad_json_is_refused(data: bytes) -> None:
    """Text that is no JSON, is too deep, too large or ambiguous is InvalidManifest."""
    with pytest.raises(InvalidManifest):
        parse_manifest(data)
    with pytest.raises(InvalidManifest):
        parse_config(data)


def test_limits_admit_their_own_value() -> None:
    """A thousand layers, and a manifest of exactly the size limit, are fine."""
    data = text(manifest(layers=[blob()] * oci.MAX_LAYERS))
    parsed = parse_manifest(data + b" " * (oci.MAX_MANIFEST_BYTES - len(data)))
    assert isinstance(parsed, Manifest)
    assert len(parsed.layers) == oci.MAX_LAYERS


def descriptor(digit: str, platform: Platform | None, artifact_type: str | None = None) -> Descriptor:
    return Descriptor(oci.OCI_MANIFEST, digest(digit), 1, {}, platform, artifact_type)


def test_the_first_image_for_the_platform_is_chosen() -> None:
    """Order decides among equals; artifacts, attestations and entries without a platform are no images."""
    entries = (
        descriptor("1", None),
        descriptor("2", Platform("linux", "amd64"), "application/vnd.amazon.soci.index.v2+json"),
        descriptor("3", Platform("unknown", "unknown")),
        descriptor("4", Platform("linux", "arm64", "v8")),
        descriptor("5", Platform("linux", "amd64")),
        descriptor("6", Platform("linux", "amd64")),
        descriptor("7", Platform("linux", "arm", "v6")),
    )
    image = ImageIndex(oci.OCI_INDEX, entries)
    for wanted, digit in (("linux/amd64", "5"), ("linux/aarch64", "4"), ("linux/armel", "7")):
        assert choose_platform(image, parse_platform(wanted)).digest == digest(digit)
    for wanted in ("linux/arm", "linux/amd64/v3", "windows/amd64"):
        with pytest.raises(NotFound, match="linux/arm64/v8"):
            choose_platform(image, parse_platform(wanted))
    with pytest.raises(NotFound, match="none for any platform"):
        choose_platform(ImageIndex(oci.OCI_INDEX, ()), Platform("linux", "amd64"))


@pytest.mark.parametrize(
    ("given_text", "normal"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/i686", "linux/386"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/riscv64", "linux/riscv64"),
        ("macos/aarch64", "darwin/arm64"),
    ],
)
def test_platforms_have_one_name(given_text: str, normal: str) -> None:
    """Every spelling of a platform becomes its usual name, and the usual name stays."""
    assert str(parse_platform(given_text)) == normal
    assert str(parse_platform(normal)) == normal


@pytest.mark.parametrize("bad", ["", "linux", "/", "linux/", "a/b/c/d", "linux/amd 64", "linux/amd64\n", "x" * 1000])
def test_bad_platforms_are_refused(bad: str) -> None:
    """What is not os/architecture[/variant] is InvalidInput."""
    with pytest.raises(InvalidInput, match="not a platform"):
        parse_platform(bad)


def config(**changes: Any) -> dict[str, Any]:
    return {"os": "linux", "architecture": "arm64", "rootfs": {"type": "layers", "diff_ids": [digest("d")]}} | changes


def test_a_config_gives_what_a_launch_needs() -> None:
    """The members that say what to run, as whom and where come out with their types."""
    run = {
        "Env": ["A=1"],
        "Entrypoint": ["/e"],
        "Cmd": ["c"],
        "WorkingDir": "/w",
        "User": "1:2",
        "StopSignal": "SIGINT",
        "Labels": {"a": "b"},
        "ExposedPorts": {"80/tcp": {}},
    }
    parsed = parse_config(text(config(config=run, variant="v8", history=[{"empty_layer": True}])))
    assert parsed.diff_ids == (digest("d"),)
    assert (parsed.env, parsed.entrypoint, parsed.cmd) == (("A=1",), ("/e",), ("c",))
    assert (parsed.working_dir, parsed.user, parsed.stop_signal, parsed.labels) == ("/w", "1:2", "SIGINT", {"a": "b"})
    assert str(parsed.platform) == "linux/arm64/v8"
    assert parse_config(text(config(config={"Env": None, "Cmd": None}))).cmd == ()


@pytest.mark.parametrize(
    "document",
    [
        {},
        config(rootfs=None),
        config(rootfs={"type": "other", "diff_ids": []}),
        config(rootfs={"type": "layers", "diff_ids": ["x"]}),
        config(rootfs={"type": "layers", "diff_ids": digest("d")}),
        config(rootfs={"type": "layers", "diff_ids": [digest("d")] * (oci.MAX_LAYERS + 1)}),
        config(config=[]),
        config(config={"Env": "A=1"}),
        config(config={"Env": [1]}),
        config(config={"Labels": {"a": None}}),
        config(config={"User": 0}),
        config(os=1),
    ],
)
def test_bad_configs_are_refused(document: object) -> None:
    """A config without layers, or with members of wrong types, is InvalidManifest."""
    with pytest.raises(InvalidManifest):
        parse_config(text(document))


def test_chain_ids() -> None:
    """The first layer's chain id is its diff id; each further one hashes the chain below and its own."""
    a, b, c = digest("a"), digest("b"), digest("c")
    ab = Digest("sha256:" + hashlib.sha256(f"{a} {b}".encode()).hexdigest())
    abc = Digest("sha256:" + hashlib.sha256(f"{ab} {c}".encode()).hexdigest())
    assert chain_ids([a, b, c]) == (a, ab, abc)
    assert chain_ids([]) == ()


@pytest.mark.parametrize(
    ("media_type", "compression"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip", "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "gzip"),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "gzip"),
        ("application/vnd.oci.image.layer.v1.tar", "uncompressed"),
        ("application/vnd.docker.image.rootfs.diff.tar", "uncompressed"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", "uncompressed"),
        ("application/vnd.oci.image.layer.v1.tar+zstd", "zstd"),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", "zstd"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", None),
        ("application/vnd.oci.image.layer.v1.tar+encrypted", None),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", None),
        ("application/vnd.oci.image.layer.v1.tar+lz4", None),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted", None),
        ("application/vnd.oci.image.layer.v2.tar+gzip", None),
    ],
)
def test_the_media_type_says_how_a_layer_is_compressed(media_type: str, compression: str | None) -> None:
    """Every layer type is known as one, with its compression or None where it cannot be read."""
    assert layer_compression(media_type) == compression
    assert is_layer(media_type)


@pytest.mark.parametrize("media_type", ["", "+gzip", oci.OCI_CONFIG, "application/octet-stream", "text/plain+gzip"])
def test_other_types_are_no_layers(media_type: str) -> None:
    """A type that is no layer's has no compression."""
    assert layer_compression(media_type) is None
    assert not is_layer(media_type)
