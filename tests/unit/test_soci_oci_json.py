# SPDX-License-Identifier: Apache-2.0
"""JSON of registries: canonical writing, and documents of any content."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci import oci
from soci.errors import InvalidInput, InvalidManifest
from soci.oci import encode_json, encode_manifest, parse_config, parse_manifest

DIGEST = "sha256:" + "a" * 64


def test_canonical_json() -> None:
    """Compact, members in the order given, and escaped as Go's encoder escapes."""
    value: dict[str, Any] = {
        "b": '"\\\n\r\t\b\f\x01\x1f\x7f',
        "a": "<>&\u2028\u2029é😀/'",
        "n": [1, True, None, [], {}],
        "s": "x\udcffy\ud800",
    }
    assert encode_json(value) == (
        b'{"b":"\\"\\\\\\n\\r\\t\\b\\f\\u0001\\u001f\x7f",'
        b'"a":"\\u003c\\u003e\\u0026\\u2028\\u2029' + "é😀/'".encode() + b'",'
        b'"n":[1,true,null,[],{}],'
        b'"s":"x\\ufffdy\\ufffd"}'
    )


def test_what_json_cannot_hold_is_refused() -> None:
    """A value outside JSON is InvalidInput, whatever it is."""
    endless: list[Any] = []
    endless.append(endless)
    for value in (float("nan"), object(), b"x", {b"x": 1}, endless):
        with pytest.raises(InvalidInput):
            encode_json(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_canonical_json_is_json(value: object) -> None:
    """Another reader gets back the value that was written."""
    assert json.loads(encode_json(value)) == value


MEMBERS = [
    "schemaVersion",
    "mediaType",
    "config",
    "layers",
    "manifests",
    "subject",
    "annotations",
    "artifactType",
    "digest",
    "size",
    "urls",
    "data",
    "platform",
    "os",
    "architecture",
    "variant",
    "os.version",
    "os.features",
    "rootfs",
    "type",
    "diff_ids",
    "Env",
    "Cmd",
    "Labels",
    "User",
]
SCALARS = st.sampled_from([2, 1, "layers", oci.OCI_MANIFEST, oci.OCI_INDEX, DIGEST, "x", -1, True, None, 0.5, ""])
documents = st.recursive(
    SCALARS | json_values,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), children, max_size=6),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(documents | st.dictionaries(st.sampled_from(MEMBERS), documents).map(lambda d: {"schemaVersion": 2} | d))
def test_any_json_is_a_document_or_refused(document: object) -> None:
    """Whatever the JSON, parsing gives a value that can be written and read again, or InvalidManifest."""
    for data in (
        json.dumps(document).encode(),
        json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"),
    ):
        try:
            parsed = parse_manifest(data)
        except InvalidManifest:
            pass
        else:
            assert parse_manifest(encode_manifest(parsed)) == parsed
        with suppress(InvalidManifest):
            parse_config(data)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_refused(data: bytes) -> None:
    """Whatever the bytes, nothing but InvalidManifest is raised."""
    for parse in (parse_manifest, parse_config):
        with pytest.raises(InvalidManifest):
            parse(data)  # sixty bytes cannot hold a digest
