# SPDX-License-Identifier: Apache-2.0
"""Containers with user namespaces over lazy and whole layers: containerd, runc, FUSE, overlayfs and maps, all real."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from soci.oci import parse_config
from soci_cli.spec import Wish, encode_spec, make_spec
from soci_containerd import Container, Mount, connect
from soci_dev import image
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_dev.tarball import member
from soci_snapshotter.idmap import GIDS, UIDS
from support import lazy
from support.images import _DIR, _SYM, _busybox, noise
from support.snapshotter import Calls, code_of, mounted

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SNAPSHOTTER = "sociable"
FIRST, SECOND = 100_000, 400_000
LENGTH = 65_536
WAIT_SECONDS = 30.0
SCRIPT = """
cd /owned
/bin/busybox stat -c '%n %u %g %a' of-root of-app setuid nobodys link /data/1
/bin/busybox sha256sum /data/1 | /bin/busybox cut -d ' ' -f 1
echo new > /owned/made && /bin/busybox stat -c '%n %u %g' made
echo more >> of-root && /bin/busybox stat -c '%n %u %g' of-root
echo x 2>/dev/null >> nobodys || echo refused
/bin/busybox chown 1000:1000 /data/2 && /bin/busybox stat -c '%u %g' /data/2
"""
INSIDE = """of-root 0 0 644
of-app 1000 1001 640
setuid 1000 0 4755
nobodys 65534 65534 644
link 1000 1000 777
/data/1 0 0 644
"""


def owned_image(folder: Path) -> image.Image:
    """Two large layers and a small one, which comes whole, with files of several owners."""
    seed = secrets.randbits(32)
    data = [member(f"data/{number}", content=noise(seed + number, lazy.DATA_BYTES)) for number in range(3)]
    owned = [
        member("owned", _DIR, mode=0o777),
        member("owned/of-root", content=b"root's\n"),
        member("owned/of-app", content=b"the app's\n", mode=0o640, uid=1000, gid=1001),
        member("owned/setuid", content=b"#!/bin/sh\n", mode=0o4755, uid=1000),
        member("owned/nobodys", content=b"nobody's\n", uid=3_000_000, gid=3_000_000),
        member("owned/link", _SYM, linkname="of-app", mode=0o777, uid=1000, gid=1000),
    ]
    base = [member("seed", content=str(seed).encode()), *_busybox()]  # no other test has pulled it
    layers = [image.add_layer(folder, iter(one)) for one in (base, data, owned)]
    return image.write_image(folder, layers, cmd=["/bin/sh", "/hello"])


def namespaces_of(stack: Stack) -> tuple[str, str]:
    return stack.namespace, f"{stack.namespace}-2"


def labels(host: int) -> dict[str, str]:
    return {UIDS: f"0:{host}:{LENGTH}", GIDS: f"0:{host}:{LENGTH}"}


def spec(built: image.Image, container: str, namespace: str, host: int, command: Sequence[str]) -> bytes:
    """What `soci run` would run, in a user namespace."""
    digest = built.manifest["config"]["digest"].removeprefix("sha256:")
    config = parse_config((built.folder / "blobs" / "sha256" / digest).read_bytes())
    made: dict[str, Any] = make_spec(config, Wish(tuple(command)), container, namespace)
    ids = [{"containerID": 0, "hostID": host, "size": LENGTH}]
    made["linux"]["namespaces"].append({"type": "user"})
    made["linux"]["uidMappings"] = made["linux"]["gidMappings"] = ids
    return encode_spec(made)


@pytest.fixture(scope="module")
def reachable(stack: Stack) -> Stack:
    """The stack, its folders open for passing through: a container's root is a stranger on the host."""
    for folder in (stack.folder, *stack.folder.parents):
        folder.chmod(folder.stat().st_mode | 0o111)
    return stack


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.registry) as running:
        yield running


@contextmanager
def second_namespace(stack: Stack, reference: str) -> Iterator[str]:
    name = namespaces_of(stack)[1]
    lazy.good(lazy.soci(stack, "--namespace", name, "pull", "--plain-http", reference))
    try:
        yield name
    finally:
        stack.ctr("--namespace", name, "images", "rm", "--sync", reference)
        stack.ctr("namespaces", "rm", name, check=False)


async def run(stack: Stack, container: Container, namespace: str, mounts: Sequence[Any], output: Path) -> int:
    """Run a container's program to its end."""
    async with connect(str(stack.containerd_address), namespace) as client:
        await client.containers.create(container)
        try:
            root = [Mount(one.type, one.source, tuple(one.options)) for one in mounts]
            await client.tasks.create(container.id, root, stdout=f"file://{output}", stderr=f"file://{output}")
            await client.tasks.start(container.id)
            status = await client.tasks.wait(container.id)
            await client.tasks.delete(container.id)
            return status
        finally:
            await client.containers.delete(container.id)


def until_gone(stack: Stack, mark: str) -> None:
    """containerd collects what nobody needs, in its own time."""
    end = time.monotonic() + WAIT_SECONDS
    places = (stack.root / "mounts", stack.root / "snapshotter/snapshots")
    while any(mark in one.name for place in places for one in place.iterdir()):
        assert time.monotonic() < end, [one.name for place in places for one in place.iterdir()]
        time.sleep(0.2)


async def test_containers_of_two_namespaces_share_an_image(reachable: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """The second namespace's pull brings nothing again; a container in each, mapped to other users, sees the image's
    owners inside and its own users' outside; what one fetched the other reads; in the end all of it is gone."""
    stack = reachable
    built = owned_image(tmp_path)
    reference = lazy.push(built, proxy, "owned")
    lazy.good(lazy.soci(stack, "index", "build", "--min-layer-size", "65536", "--span-size", "262144", reference))
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    (launched,) = lazy.launches(stack, reference)
    assert lazy.modes(launched) == ["lazy", "lazy", "whole"]
    before = len(list((stack.root / "mounts").iterdir()))
    proxy.reset()
    with second_namespace(stack, reference) as other:
        assert len(list((stack.root / "mounts").iterdir())) == before
        assert not [path for path in proxy.counts.paths if "/blobs/" in path and built.layers[1]["digest"] in path]
        chain = lazy.top_chain(built)
        for host, namespace in ((FIRST, stack.namespace), (SECOND, other)):
            key = f"mapped-{secrets.token_hex(3)}"
            output = tmp_path / key
            output.touch()
            with closing(Calls(stack.containerd_address, SNAPSHOTTER, namespace)) as calls:
                mounts = calls.prepare(key, chain, labels(host))
                container = Container(
                    key, "", spec(built, key, namespace, host, ["/bin/sh", "-c", SCRIPT]), SNAPSHOTTER, key
                )
                fetched = proxy.counts.body_bytes
                status = await run(stack, container, namespace, mounts, output)
                said = output.read_text()
                assert status == 0, said
                assert said.startswith(INSIDE), said
                rest = said.removeprefix(INSIDE).split("\n")
                assert rest[1:] == ["made 0 0", "of-root 0 0", "refused", "1000 1000", ""], said
                if namespace == other:
                    assert proxy.counts.body_bytes == fetched, "all that it read was here"
                check_outside(calls.mounts(key), host)
                calls.remove(key)
    until_gone(stack, "_")


def patiently(calls: Calls, key: str) -> Sequence[Any]:
    """A snapshot's mounts, once containerd has found its snapshotter's new socket."""
    end = time.monotonic() + WAIT_SECONDS
    while code_of(lambda: calls.mounts(key)) == "UNAVAILABLE":
        assert time.monotonic() < end
        time.sleep(0.2)
    return calls.mounts(key)


def check_outside(mounts: Sequence[Any], host: int) -> None:
    """The container's root file system as the host sees it."""
    with mounted(mounts) as root:
        seen = {
            name: (root / name).lstat() for name in ("owned/of-root", "owned/of-app", "owned/made", "data/2", "data/1")
        }
        assert {name: (one.st_uid - host, one.st_gid - host) for name, one in seen.items()} == {
            "owned/of-root": (0, 0),
            "owned/of-app": (1000, 1001),
            "owned/made": (0, 0),
            "data/2": (1000, 1000),
            "data/1": (0, 0),
        }
        assert (root / "owned/setuid").stat().st_mode & 0o7777 == 0o4755
        assert (root / "owned/nobodys").stat().st_uid == 65_534


async def test_a_mapped_container_survives_the_services(reachable: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Snapshotter and mounter are killed between Prepare and the task: Mounts gives the same, and the program runs."""
    stack = reachable
    built = owned_image(tmp_path)
    reference = lazy.push(built, proxy, "survives")
    lazy.good(lazy.soci(stack, "index", "build", "--min-layer-size", "65536", "--span-size", "262144", reference))
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    key = f"mapped-{secrets.token_hex(3)}"
    output = tmp_path / key
    output.touch()
    with closing(Calls(stack.containerd_address, SNAPSHOTTER, stack.namespace)) as calls:
        before = calls.prepare(key, lazy.top_chain(built), labels(FIRST))
        for name in ("mounter", "snapshotter"):
            stack.kill(name)
            stack.start(name)
        again = patiently(calls, key)
        assert [list(one.options) for one in again] == [list(one.options) for one in before]
        container = Container(
            key, "", spec(built, key, stack.namespace, FIRST, ["/bin/sh", "-c", SCRIPT]), SNAPSHOTTER, key
        )
        assert await run(stack, container, stack.namespace, again, output) == 0, output.read_text()
        assert output.read_text().startswith(INSIDE)
        calls.remove(key)
    until_gone(stack, "_")


def test_ctr_runs_a_container_with_other_owners(reachable: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """``ctr run --remap-labels`` leaves the owners to us: the image's inside, and its layers stay lazy."""
    stack = reachable
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "remap")
    lazy.build_index(stack, reference)
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    proxy.reset()
    name = f"remap-{secrets.token_hex(3)}"
    words = ("run", "--rm", "--snapshotter", SNAPSHOTTER, "--remap-labels")
    maps = ("--uidmap", f"0:{FIRST}:{LENGTH}", "--gidmap", f"0:{FIRST}:{LENGTH}")
    said = stack.ctr(*words, *maps, reference, name, "/bin/busybox", "stat", "-c", "%u %g", "/data/1", "/hello").stdout
    assert said.split("\n")[:2] == ["0 0", "0 0"]
    assert proxy.counts.body_bytes < built.size / 2
    (launched,) = lazy.launches(stack, reference)
    missed = {miss["path"] for miss in lazy.launch(stack, launched["id"])["misses"]}
    assert "bin/busybox" in missed, "reads through the mapped layers belong to the launch"
    stack.ctr("images", "rm", "--sync", reference)
    until_gone(stack, "_")


def test_what_containerd_maps_itself(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """A newer containerd that was not told that we map makes a copy of its own, and sends the labels too: owners are
    right all the same, not mapped twice."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "itself")
    lazy.build_index(stack, reference)
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    copy = f"{lazy.top_chain(built)}-{FIRST}-{FIRST}"
    with closing(Calls(stack.containerd_address, SNAPSHOTTER, stack.namespace)) as calls:
        with mounted(calls.prepare(f"{copy}-remap", lazy.top_chain(built))) as root:
            os.chown(root / "hello", FIRST, FIRST)
        calls.commit(copy, f"{copy}-remap")
        with mounted(calls.prepare("itself", copy, labels(FIRST))) as root:
            assert (root / "hello").stat().st_uid == FIRST
            assert (root / "hello").read_bytes().startswith(b"echo")
        calls.remove("itself")
        calls.remove(copy)


def test_usage_is_what_is_on_disk(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """A lazy layer takes what was fetched of it, and no less than that; a view takes nothing."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "usage")
    lazy.build_index(stack, reference)
    lazy.good(lazy.soci(stack, "pull", "--plain-http", reference))
    chain = lazy.top_chain(built)
    with closing(Calls(stack.containerd_address, SNAPSHOTTER, stack.namespace)) as calls:
        first, inodes = calls.usage(chain)
        assert inodes == 6  # the folder, layer.tar, ztoc, spans, journal, diff_ids
        assert 0 < first < 2 * lazy.DATA_BYTES  # of 8 MB; its zTOC alone takes one
        with lazy.rootfs(stack, SNAPSHOTTER, chain) as root:
            (root / "data/3").read_bytes()
        assert calls.usage(chain)[0] >= first + lazy.DATA_BYTES
        calls.view("look", chain)
        assert calls.usage("look") == (0, 0)
        calls.remove("look")
