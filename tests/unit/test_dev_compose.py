# SPDX-License-Identifier: Apache-2.0
"""What compose.yaml, the Dockerfile and containerd's snippet promise, as far as their text shows it."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from soci.errors import NotFound
from soci_dev.compose import named_base, named_images
from soci_dev.folders import CHECKOUT

COMPOSE = (CHECKOUT / "compose.yaml").read_text()
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text()


def test_the_stages_of_the_image_begin_from_one_base() -> None:
    """The proof makes one base image, so the Dockerfile must name exactly one."""
    assert named_base(DOCKERFILE) == "debian:bookworm-slim"


@pytest.mark.parametrize("text", ["", "FROM a:1 AS build\nFROM b:1\n"])
def test_no_base_or_two_are_refused(text: str) -> None:
    """A Dockerfile without one base is not guessed at."""
    with pytest.raises(NotFound):
        named_base(text)


def test_a_stage_is_no_base() -> None:
    """A stage built from an earlier one adds no image."""
    assert named_base("FROM a:1 AS one\nFROM one AS two\nFROM a:1\n") == "a:1"


def test_images_are_found_by_the_last_part_of_their_names() -> None:
    """A registry's or user's prefix and the tag do not belong to the name."""
    assert named_images("x:\n  image: a/b/c:1\ny:\n    image: d\n") == {"c": "a/b/c:1", "d": "d"}


def test_compose_names_the_images_that_the_proof_makes() -> None:
    """Each of them has a tag, so that a proof and a pull mean the same."""
    images = named_images(COMPOSE)
    assert {"nats", "registry", "all-in-one", "sociable"} == set(images)
    assert all(":" in reference for reference in images.values())


def test_ports_are_published_on_the_loopback_address_only() -> None:
    """Bus and registry ask for no password: they must not be reachable from outside."""
    published = re.findall(r'^\s+- "(\S*:\d+)"$', COMPOSE, re.MULTILINE)
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:${SOCIABLE_") for port in published)


def test_the_state_folder_has_one_path_on_both_sides() -> None:
    """containerd mounts the paths that the snapshotter answers, so source and target must be the same."""
    pairs = re.findall(r"source: (\S+)\n\s+target: (\S+)", COMPOSE)
    assert len(pairs) == 3
    assert all(source == target for source, target in pairs)


def test_no_step_of_the_image_takes_a_package_without_a_hash() -> None:
    """Every pip command either checks hashes or may not use an index at all."""
    joined = DOCKERFILE.replace("\\\n", " ")
    commands = [words for line in joined.splitlines() for words in _pip_commands(line)]
    assert len(commands) == 4
    for words in commands:
        assert "--require-hashes" in words or "--no-index" in words, words


def test_the_image_has_what_the_project_is_built_from() -> None:
    """Every path that the Dockerfile copies from the checkout is let through by .dockerignore."""
    let_through = {line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == let_through


def test_containerd_s_snippet_is_toml_with_our_socket() -> None:
    """The address is the snapshotter's default one."""
    settings = tomllib.loads((CHECKOUT / "deploy/containerd/config.toml").read_text())
    plugin = settings["proxy_plugins"]["sociable"]
    assert (plugin["type"], plugin["address"]) == (
        "snapshot",
        "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock",
    )


def _pip_commands(line: str) -> list[list[str]]:
    if not line.startswith("RUN "):
        return []
    parts = (shlex.split(part) for part in line.removeprefix("RUN ").split("&&"))
    return [words for words in parts if words and words[0].endswith("/pip")]
