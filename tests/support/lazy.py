# SPDX-License-Identifier: Apache-2.0
"""Driving a whole stack: images of one's own, launches as JSON, root file systems mounted for looking."""

from __future__ import annotations

import json
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soci.oci import chain_ids, parse_config
from soci_dev import image
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_dev.tarball import member
from support.images import _busybox, noise

COMMAND_SECONDS = 90.0
MOUNT_SECONDS = 20.0
DATA_FILES = 8
DATA_BYTES = 1 << 20


def seeded_image(folder: Path, *, seed: int | None = None, files: int = DATA_FILES) -> image.Image:
    """Two gzip layers that no other test has: busybox with a mark, and some files of noise in ``/data``."""
    seed = secrets.randbits(32) if seed is None else seed

    def base() -> Iterator[Any]:
        yield member("seed", content=str(seed).encode())
        yield from _busybox()

    def data() -> Iterator[Any]:
        yield member("data", b"5", mode=0o755)
        for number in range(files):
            yield member(f"data/{number}", content=noise(seed + number, DATA_BYTES))

    layers = [image.add_layer(folder, base()), image.add_layer(folder, data())]
    return image.write_image(folder, layers, cmd=["/bin/sh", "/hello"])


def data_file(seed: int, number: int) -> bytes:
    """The content of ``/data/<number>`` in the image of that seed."""
    return noise(seed + number, DATA_BYTES)


def soci(stack: Stack, *words: str, timeout: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run ``soci`` whatever its exit status."""
    command = stack.soci_command(*words)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def good(done: subprocess.CompletedProcess[str]) -> str:
    """The standard output of a command that must have succeeded."""
    assert done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_index(stack: Stack, reference: str, *, span_size: int = 1 << 18) -> dict[str, Any]:
    """Have the indexer index every layer; the JSON of the command."""
    words = ("index", "build", "--json", "--min-layer-size", "0", "--span-size", str(span_size), reference)
    made: dict[str, Any] = json.loads(good(soci(stack, *words)))
    return made


def launches(stack: Stack, reference: str) -> list[dict[str, Any]]:
    """All launches of an image, the oldest first."""
    found = json.loads(good(soci(stack, "launch", "ls", "--json", "-n", "1000")))
    return [launch for launch in reversed(found) if launch["image"] == reference]


def launch(stack: Stack, launch_id: str) -> dict[str, Any]:
    """Everything of one launch."""
    shown: dict[str, Any] = json.loads(good(soci(stack, "launch", "show", "--json", launch_id)))
    return shown


def modes(launched: dict[str, Any]) -> list[str]:
    """How the launch's layers came, in their order."""
    return [layer["mode"] for layer in launched["layers"]]


@contextmanager
def rootfs(stack: Stack, snapshotter: str, chain: str) -> Iterator[Path]:
    """The image's root file system, writable, as a container would have it."""
    key = f"look-{secrets.token_hex(4)}"
    target = Path(tempfile.mkdtemp(prefix="rootfs-"))
    words = ("snapshots", "--snapshotter", snapshotter)
    script = stack.ctr(*words, "prepare", "--target", str(target), key, chain).stdout
    try:
        subprocess.run(["sh", "-ec", script], check=True, timeout=MOUNT_SECONDS, capture_output=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", "-l", str(target)], check=True, timeout=MOUNT_SECONDS)
    finally:
        stack.ctr(*words, "rm", key)
        target.rmdir()


def top_chain(built: image.Image) -> str:
    """The chain id of the image's topmost layer."""
    digest = built.manifest["config"]["digest"].removeprefix("sha256:")
    config = parse_config((built.folder / "blobs" / "sha256" / digest).read_bytes())
    return chain_ids(config.diff_ids)[-1]


def push(built: image.Image, proxy: Proxy, name: str) -> str:
    """Push around the proxy, so that its counts begin at zero; the reference goes through it."""
    image.push(built, proxy.upstream, name, "1")
    return f"{proxy.address}/{name}:1"
