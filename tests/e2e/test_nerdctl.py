# SPDX-License-Identifier: Apache-2.0
"""The real nerdctl with ``--snapshotter soci``: it pulls, runs and pushes by our services and our ``soci`` command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci_dev import image
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy

NERDCTL = os.environ.get("NERDCTL") or shutil.which("nerdctl")

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(NERDCTL is None, reason="needs nerdctl on PATH, or its path in NERDCTL"),
]

SNAPSHOTTER = "soci"
"""The plugin's name: by it nerdctl knows which labels to send, and that a push is to make an index."""
SMALL = ("--soci-min-layer-size", "0", "--soci-span-size", str(1 << 18))

Nerdctl = Callable[..., str]


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """One of our own, whose containerd knows our snapshotter by nerdctl's name for it."""
    stack = make_stack()
    config = stack.folder / "containerd" / "config.toml"
    plugin = f'[proxy_plugins.{SNAPSHOTTER}]\n  type = "snapshot"\n  address = "{stack.snapshotter_address}"\n'
    stack.stop("containerd")
    config.write_text(config.read_text() + plugin)
    stack.start("containerd")
    return stack


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.registry) as running:
        yield running


@pytest.fixture
def nerdctl(stack: Stack, tmp_path: Path) -> Nerdctl:
    """Runs nerdctl, which finds our ``soci`` on its PATH; what it says on either stream."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "soci"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m soci_cli --root {tmp_path / "root"} "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ.get('PATH', '')}"}
    flags = ["--address", str(stack.containerd_address), "--namespace", stack.namespace]
    flags += ["--data-root", str(tmp_path / "data"), "--insecure-registry"]

    def run(*words: str, snapshotter: str = SNAPSHOTTER) -> str:
        command = [str(NERDCTL), *flags, "--snapshotter", snapshotter, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=lazy.COMMAND_SECONDS, env=environment
        )
        return lazy.good(done) + done.stderr

    return run


def check_lazy(stack: Stack, reference: str, layers: int, found_by: str, index: str) -> None:
    """The first launch of the image came by this index, and all of its layers lazily."""
    launched = lazy.launches(stack, reference)[0]
    assert lazy.modes(launched) == ["lazy"] * layers
    assert (launched["found_by"], launched["index"]) == (found_by, index)


def test_a_pull_and_a_run_are_lazy(stack: Stack, proxy: Proxy, nerdctl: Nerdctl, tmp_path: Path) -> None:
    """An indexed image is shown, not downloaded, and its containers start, read, are changed and end."""
    built = lazy.seeded_image(tmp_path / "image", seed=11)
    reference = lazy.push(built, proxy, "pulled")
    index = lazy.build_index(stack, reference)["index"]
    proxy.reset()
    nerdctl("pull", reference)
    assert proxy.counts.body_bytes < built.size / 2
    assert "hello\n" in nerdctl("run", "--rm", "--net", "none", reference)
    check_lazy(stack, reference, len(built.layers), "v1-referrer", index)

    nerdctl("run", "-d", "--name", "one", "--net", "none", reference, "/bin/busybox", "sleep", "600")
    nerdctl("exec", "one", "/bin/busybox", "touch", "/data/new")
    assert "new" in nerdctl("exec", "one", "/bin/busybox", "ls", "/data").split()
    nerdctl("cp", "one:/data/3", str(tmp_path / "three"))
    assert (tmp_path / "three").read_bytes() == lazy.data_file(11, 3)
    nerdctl("rm", "-f", "one")
    nerdctl("rmi", reference)
    assert stack.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "ls").stdout.count("\n") == 1  # the heading


def test_the_index_that_is_asked_for_is_used(stack: Stack, proxy: Proxy, nerdctl: Nerdctl, tmp_path: Path) -> None:
    """Of two indexes, ``--soci-index-digest`` chooses; with one that is not there the image comes whole."""
    for number in range(2):
        built = lazy.seeded_image(tmp_path / f"image-{number}")
        reference = lazy.push(built, proxy, f"asked-for-{number}")
        indexes = [lazy.build_index(stack, reference, span_size=size)["index"] for size in (1 << 18, 1 << 19)]
        nerdctl("pull", "--soci-index-digest", indexes[number], reference)
        check_lazy(stack, reference, len(built.layers), "explicit", indexes[number])
    built = lazy.seeded_image(tmp_path / "image")
    reference = lazy.push(built, proxy, "not-there")
    lazy.build_index(stack, reference)
    nerdctl("pull", "--soci-index-digest", "sha256:" + "0" * 64, reference)
    assert "lazy" not in lazy.modes(lazy.launches(stack, reference)[0])
    assert "hello\n" in nerdctl("run", "--rm", "--net", "none", reference)


@pytest.mark.parametrize("platform", [(), ("--platform", "linux/amd64"), ("--all-platforms",)])
def test_a_push_makes_and_pushes_the_index(
    stack: Stack, proxy: Proxy, nerdctl: Nerdctl, tmp_path: Path, platform: tuple[str, ...]
) -> None:
    """``nerdctl push`` indexes the image by ``soci create`` and ``soci push``: whoever pulls it then, does so lazily."""
    built = lazy.seeded_image(tmp_path / "image")
    source = image.push(built, stack.registry, "source", "1")
    name = f"pushed{len(platform)}"  # nerdctl names containers after images, and takes no two dashes in a row
    nerdctl("pull", source, snapshotter="overlayfs")
    nerdctl("tag", source, f"{stack.registry}/{name}:1")
    said = nerdctl("push", *SMALL, *platform, f"{stack.registry}/{name}:1")
    index = said.partition("pushed index ")[2].split()[0]
    nerdctl("rmi", source, f"{stack.registry}/{name}:1")
    reference = f"{proxy.address}/{name}:1"
    assert "hello\n" in nerdctl("run", "--rm", "--net", "none", reference)
    check_lazy(stack, reference, len(built.layers), "v1-referrer", index)
