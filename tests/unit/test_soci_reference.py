# SPDX-License-Identifier: Apache-2.0
"""Image references."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soci.digest import Digest
from soci.errors import InvalidReference
from soci.reference import MAX_REFERENCE, Reference, parse_reference

DIGEST = Digest("sha256:" + "a" * 64)


@pytest.mark.parametrize(
    ("text", "whole", "familiar"),
    [
        ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
        ("user/app", "docker.io/user/app:latest", "user/app:latest"),
        ("a/b/c", "docker.io/a/b/c:latest", "a/b/c:latest"),
        ("library/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
        ("docker.io/localhost/a", "docker.io/localhost/a:latest", "docker.io/localhost/a:latest"),
        ("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest", "localhost:5000/app:latest"),
        ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000"),
        ("registry:5000/app:v1", "registry:5000/app:v1", "registry:5000/app:v1"),
        ("registry/app", "docker.io/registry/app:latest", "registry/app:latest"),
        ("REGISTRY/app", "REGISTRY/app:latest", "REGISTRY/app:latest"),
        ("ghcr.io/a/b", "ghcr.io/a/b:latest", "ghcr.io/a/b:latest"),
        ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest", "127.0.0.1:5000/x:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("[2001:db8::1]/x:t", "[2001:db8::1]/x:t", "[2001:db8::1]/x:t"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}", f"alpine@{DIGEST}"),
        (f"ghcr.io/a:v1@{DIGEST}", f"ghcr.io/a:v1@{DIGEST}", f"ghcr.io/a:v1@{DIGEST}"),
        ("a.b/c--d__e.f_g", "a.b/c--d__e.f_g:latest", "a.b/c--d__e.f_g:latest"),
        ("x/" + "a" * 64, "docker.io/x/" + "a" * 64 + ":latest", "x/" + "a" * 64 + ":latest"),
    ],
)
def test_references_are_completed(text: str, whole: str, familiar: str) -> None:
    """Every way to write a reference has one whole form and one familiar form, and both mean the same."""
    reference = parse_reference(text)
    assert str(reference) == whole
    assert reference.familiar == familiar
    assert parse_reference(whole) == reference
    assert parse_reference(familiar) == reference


def test_the_parts() -> None:
    """Registry, repository, tag and digest come out apart; the digest is what to fetch, else the tag."""
    reference = parse_reference(f"localhost:5000/a/b:v1@{DIGEST}")
    assert reference == Reference("localhost:5000", "a/b", "v1", DIGEST)
    assert (reference.name, reference.target) == ("localhost:5000/a/b", DIGEST)
    assert parse_reference("alpine").target == "latest"
    assert parse_reference("alpine").with_digest(DIGEST) == parse_reference(f"alpine:latest@{DIGEST}")
    assert parse_reference(f"alpine@{DIGEST}").tag is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "repository is missing"),
        ("ghcr.io/", "repository is missing"),
        ("https://ghcr.io/a", "scheme"),
        ("docker://alpine", "scheme"),
        ("Alpine", "lower case"),
        ("ghcr.io/User/app", "lower case"),
        ("alpine:", "not a tag"),
        ("alpine:-x", "not a tag"),
        ("alpine:" + "a" * 129, "not a tag"),
        ("a:b:c", "not part of a repository"),
        (" alpine", "not part of a repository"),
        ("alpine\n", "not part of a repository"),
        ("alpine:x\n", "not a tag"),
        ("a//b", "not part of a repository"),
        ("/a", "not part of a repository"),
        ("a/", "not part of a repository"),
        ("a..b/../c", "not a registry"),
        ("x/../etc", "not part of a repository"),
        ("a___b", "not part of a repository"),
        ("-a", "not part of a repository"),
        ("é", "not part of a repository"),
        ("a.-b/c", "not a registry"),
        ("ghcr.io:port/a", "not a registry"),
        ("ghcr.io:123456/a", "not a registry"),
        ("user@ghcr.io/a", "not a sha256"),
        ("alpine@sha256:abc", "not a sha256"),
        (f"alpine@{DIGEST}@{DIGEST}", "not a sha256"),
        ("alpine@", "not a sha256"),
        ("a" * 64, "image id"),
        ("a" * 256, "longer than 255"),
        ("a" * (MAX_REFERENCE + 1), "characters"),
    ],
)
def test_bad_references_are_refused(text: str, why: str) -> None:
    """The message says what is wrong and shows a bounded part of what was given."""
    with pytest.raises(InvalidReference, match=why) as caught:
        parse_reference(text)
    assert len(str(caught.value)) < 500


words = st.text("abAB01._-:/@[] \n", max_size=30) | st.text(max_size=10)


@settings(max_examples=500)
@given(words | words.map(lambda text: f"{text}@{DIGEST}"))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    """A reference has one whole form, which parses to itself and has no way out of a URL's path; or InvalidReference."""
    try:
        reference = parse_reference(text)
    except InvalidReference:
        return
    assert parse_reference(str(reference)) == reference
    assert parse_reference(reference.familiar) == reference
    assert ".." not in reference.repository.split("/")
    assert not set(str(reference)) & set(" \n?#%\\")
