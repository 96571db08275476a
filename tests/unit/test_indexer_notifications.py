# SPDX-License-Identifier: Apache-2.0
"""What a registry's notification is taken for: images that want an index, or nothing, or nonsense."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidInput
from soci.oci import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST
from soci_indexer.notifications import MAX_BODY_BYTES, MAX_EVENTS, parse_notification
from support.notifications import DIGEST, body, event


@pytest.mark.parametrize("kind", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_a_pushed_image_is_named_by_digest_and_tag(kind: str) -> None:
    """The digest pins what was pushed: the tag may have moved when the job is done."""
    told = parse_notification(body(event(mediaType=kind)))
    assert [one.image for one in told.pushed] == [f"registry.example:5000/team/app:v1@{DIGEST}"]
    assert told.ignored == 0


def test_a_manifest_without_a_tag_is_named_by_its_digest() -> None:
    """The platforms of an image index are pushed so."""
    told = parse_notification(body(event(tag=None)))
    assert [one.image for one in told.pushed] == [f"registry.example:5000/team/app@{DIGEST}"]


def test_the_configured_registry_counts_before_the_event_s_host() -> None:
    """Nodes may reach the registry by another name than who pushed."""
    told = parse_notification(body(event(host="10.0.0.1:5000")), "registry.example")
    assert told.pushed[0].image.startswith("registry.example/team/app:v1@")


def test_repeated_notifications_are_one_job() -> None:
    """The same manifest in the same repository has one job id, whichever tag and however often it is told."""
    first = parse_notification(body(event(), event(tag="latest"), event(tag=None)))
    again = parse_notification(body(event()))
    assert len(first.pushed) == 1
    assert first.pushed[0].job_id == again.pushed[0].job_id
    for other in (event(repository="team/other"), event(digest="sha256:" + "b" * 64), event(host="other.example")):
        assert parse_notification(body(other)).pushed[0].job_id != again.pushed[0].job_id


IGNORED = [
    event("pull"),
    event("mount"),
    event("delete"),
    event("something-new"),
    event(mediaType="application/octet-stream", tag=None),
    event(mediaType=OCI_LAYER_GZIP, tag=None),
    event(mediaType="application/vnd.amazon.soci.prefetch.v1+json", tag=None),
    event(mediaType=OCI_INDEX),
    event(mediaType=DOCKER_LIST),
    event(tag="sha256-" + "a" * 64),
    event(mediaType=None),
    {"action": "push"},
    {},
]


@pytest.mark.parametrize("one", IGNORED, ids=range(len(IGNORED)))
def test_what_is_no_image_is_passed_over(one: dict[str, Any]) -> None:
    """Blobs, other actions, image indexes, fallback tags of referrers, and kinds that nobody knows yet."""
    told = parse_notification(body(one, event()))
    assert len(told.pushed) == 1
    assert told.ignored == 1


BAD = [
    (b"", "not JSON"),
    (b"[]", "not an object"),
    (b'{"events": 1}', "not a list"),
    (b'{"events": [1]}', "not an object"),
    (b'{"events": [], "events": []}', "two members of one name"),
    (b"[" * 100_000, "JSON"),
    (body(event(digest="sha256:xyz")), "digest"),
    (body(event(digest=None)), "digest"),
    (body(event(repository="../../x")), "not an image reference"),
    (body(event(repository="UPPER")), "lower case"),
    (body(event(host="")), "set webhook_registry"),
    (body(event(host="registry")), "set webhook_registry"),
    (body(event(host="evil.example/path")), "set webhook_registry"),
    (body(event(host="user:secret@evil.example")), "no image"),
    (body(event(host="http://evil.example")), "no image"),
    (body(*[event()] * (MAX_EVENTS + 1)), "over the limit"),
    (b" " * (MAX_BODY_BYTES + 1), "over the limit"),
]


@pytest.mark.parametrize(("content", "words"), BAD, ids=range(len(BAD)))
def test_nonsense_is_refused_in_clear_words(content: bytes, words: str) -> None:
    """Whoever set the registry up has only this answer to go by."""
    with pytest.raises(InvalidInput, match=words):
        parse_notification(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["events", "target", "action"]), inner),
    max_leaves=20,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_nothing_but_our_own_error_comes_out(content: bytes) -> None:
    """A stranger's bytes are a notification, or refused."""
    with suppress(InvalidInput):
        parse_notification(content)
