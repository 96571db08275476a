# SPDX-License-Identifier: Apache-2.0
"""The SOCI index: exact bytes out, careful reading in."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci import index as names
from soci.digest import Digest, sha256_digest
from soci.errors import InvalidManifest, NoZtoc
from soci.index import IndexEntry, SociIndex, encode_index, parse_index, prefetch_entry, ztoc_entry
from soci.oci import OCI_INDEX, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_MANIFEST, Descriptor, Platform


def digest(digit: str) -> Digest:
    return Digest("sha256:" + digit * 64)


LAYER = Descriptor(OCI_LAYER_GZIP, digest("2"), 99_999)
ENTRY = ztoc_entry(LAYER, digest("1"), 35_680, 4_194_304)
SUBJECT = Descriptor(OCI_MANIFEST, digest("3"), 1234)

GOLDEN = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vn'
    b'd.amazon.soci.index.v%d+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",'
    b'"size":2},"layers":[{"mediaType":"application/octet-stream","digest":"sha256:11111111111111111111111111111111111111'
    b'11111111111111111111111111","size":35680,"annotations":{"com.amazon.soci.image-layer-digest":"sha256:222222222222'
    b'2222222222222222222222222222222222222222222222222222","com.amazon.soci.image-layer-mediaType":"application/vnd.oc'
    b'i.image.layer.v1.tar+gzip","com.amazon.soci.span-size":"4194304"}}]%s,"annotations":{"com.amazon.soci.build-tool-'
    b'identifier":"AWS SOCI CLI v0.2"}}'
)
GOLDEN_SUBJECT = (
    b',"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:333333333333333333333333333'
    b'3333333333333333333333333333333333333","size":1234}'
)


def test_version_1_to_the_byte() -> None:
    """The known example has its known bytes and digest."""
    content = encode_index(SociIndex.v1((ENTRY,), SUBJECT))
    assert content == GOLDEN % (1, GOLDEN_SUBJECT)
    assert len(content) == 874
    assert hashlib.sha256(content).hexdigest() == "bb57be032b15b1e072983d1beead008235fc675cc7476584d5321c7afc4f552f"


def test_version_2_to_the_byte() -> None:
    """The known example without a subject has its known bytes and digest."""
    content = encode_index(SociIndex.v2((ENTRY,)))
    assert content == GOLDEN % (2, b"")
    assert len(content) == 710
    assert hashlib.sha256(content).hexdigest() == "c230983af27007b4e29d8b805373b08dca59444da9f2a20b1a4704b8bdf81208"


def test_the_subject_is_bare() -> None:
    """Of the image's manifest only type, digest and size are written, whatever else its descriptor says."""
    subject = Descriptor(OCI_MANIFEST, digest("3"), 1234, {"a": "b"}, Platform("linux", "amd64"), "x")
    assert encode_index(SociIndex.v1((ENTRY,), subject)) == GOLDEN % (1, GOLDEN_SUBJECT)


def test_an_index_round_trips() -> None:
    """zTOCs come first, then prefetch lists, and reading gives back what was written."""
    index = SociIndex(
        2,
        (ztoc_entry(LAYER, digest("1"), 5, 4096, disable_xattrs=True), IndexEntry(digest("7"), ENTRY.ztoc)),
        prefetch=(prefetch_entry(digest("2"), digest("8"), 96),),
    )
    index = SociIndex(2, (index.layers[0], ENTRY), prefetch=index.prefetch)
    content = encode_index(index)
    assert [layer["mediaType"] for layer in json.loads(content)["layers"]] == [
        names.ZTOC_MEDIA_TYPE,
        names.ZTOC_MEDIA_TYPE,
        names.PREFETCH_MEDIA_TYPE,
    ]
    assert parse_index(content) == index
    assert encode_index(parse_index(content)) == content
    assert parse_index(content).layers[0].disable_xattrs
    assert not parse_index(content).layers[1].disable_xattrs


def test_an_index_that_nobody_could_use_is_not_written() -> None:
    """No zTOC, version 1 without a subject and version 2 with one are refused."""
    for index in (SociIndex(1, (), SUBJECT), SociIndex(1, (ENTRY,)), SociIndex(2, (ENTRY,), SUBJECT)):
        with pytest.raises(InvalidManifest):
            encode_index(index)


def document(layers: list[dict[str, Any]], **changes: Any) -> bytes:
    base = json.loads(encode_index(SociIndex.v1((ENTRY,), SUBJECT)))
    return json.dumps(base | {"layers": layers} | changes).encode()


def layer(**changes: Any) -> dict[str, Any]:
    annotations = {names.LAYER_DIGEST_ANNOTATION: str(digest("2"))}
    return {"mediaType": names.ZTOC_MEDIA_TYPE, "digest": digest("1"), "size": 5, "annotations": annotations} | changes


def test_the_last_ztoc_of_a_layer_counts() -> None:
    """Of two for one layer every reader must take the same; an unknown layer has none."""
    index = parse_index(document([layer(), layer(digest=digest("9"))]))
    assert index.of_layer(digest("2")).ztoc.digest == digest("9")
    assert index.find(digest("6")) is None
    with pytest.raises(NoZtoc, match="6666"):
        index.of_layer(digest("6"))


def test_what_names_no_layer_is_left_out() -> None:
    """Entries without the layer annotation and entries of unknown types are passed over."""
    index = parse_index(document([layer(annotations=None), layer(mediaType="application/new"), layer()]))
    assert [entry.layer for entry in index.layers] == [digest("2")]
    assert index.prefetch == ()
    assert parse_index(document([])).layers == ()


@pytest.mark.parametrize(
    ("span_size", "value"),
    [("4096", 4096), ("0", 0), ("", None), ("-1", None), ("4k", None), ("9" * 5000, None), ("٣", None)],
)
def test_a_strange_span_size_is_unknown(span_size: str, value: int | None) -> None:
    """The span size is told for show, so what is no number is no error."""
    annotations = {names.LAYER_DIGEST_ANNOTATION: digest("2"), names.SPAN_SIZE_ANNOTATION: span_size}
    assert parse_index(document([layer(annotations=annotations)])).layers[0].span_size == value


@pytest.mark.parametrize(
    "data",
    [
        document([layer()], config={"mediaType": "application/x", "digest": digest("4"), "size": 2}),
        document([layer(annotations={names.LAYER_DIGEST_ANNOTATION: "sha256:2"})]),
        json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode(),
        b"{}",
        b"",
    ],
)
def test_other_documents_are_refused(data: bytes) -> None:
    """An image's manifest, an image index and a broken layer digest are InvalidManifest."""
    with pytest.raises(InvalidManifest):
        parse_index(data)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "mediaType": st.sampled_from([names.ZTOC_MEDIA_TYPE, names.PREFETCH_MEDIA_TYPE, "x", 1]),
                "annotations": st.dictionaries(
                    st.sampled_from([names.LAYER_DIGEST_ANNOTATION, names.SPAN_SIZE_ANNOTATION, "x"]),
                    st.sampled_from([str(digest("2")), "7", "", 7, None]),
                ),
                "size": st.integers(),
            },
        ).map(lambda changes: layer(**changes)),
        max_size=4,
    )
)
def test_any_index_parses_or_is_refused(layers: list[dict[str, Any]]) -> None:
    """Whatever the entries are, the outcome is an index whose every entry names a layer, or InvalidManifest."""
    try:
        index = parse_index(document(layers))
    except InvalidManifest:
        return
    for entry in index.layers + index.prefetch:
        assert entry.layer == digest("2")
        assert entry.ztoc.annotations[names.LAYER_DIGEST_ANNOTATION] == entry.layer
    if index.layers:
        assert parse_index(encode_index(index)) == index


def test_zstd_layers_have_a_type_of_their_own() -> None:
    """A zstd layer's zTOC is listed under our media type, which other readers leave out, and comes back with the rest."""
    zstd = Descriptor(OCI_LAYER_ZSTD, sha256_digest(b"zstd layer"), 10)
    gzip = Descriptor(OCI_LAYER_GZIP, sha256_digest(b"gzip layer"), 10)
    entries = tuple(ztoc_entry(layer, sha256_digest(b"ztoc"), 5, 1 << 22) for layer in (zstd, gzip))
    assert [entry.ztoc.media_type for entry in entries] == [
        "application/vnd.sociable.ztoc.v1",
        "application/octet-stream",
    ]
    found = parse_index(encode_index(SociIndex.v2(entries)))
    assert found.layers == entries
    assert found.of_layer(zstd.digest).span_size == 1 << 22
