# SPDX-License-Identifier: Apache-2.0
"""The private stack and the proxy, for real: NATS, a registry, containerd and runc."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from soci.errors import FailedPrecondition
from soci_dev import image, leftovers
from soci_dev.faults import (
    Corrupt,
    Drop,
    Endless,
    Fault,
    IgnoreRange,
    Raw,
    ShiftRange,
    Short,
    Slow,
    Stall,
    Status,
    always,
    first,
)
from soci_dev.processes import Daemon
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_dev.tarball import member
from support.images import busybox_image, noise, torture_image

BODY = noise(3, 700_000)

CRASHING = """\
import sys
from pathlib import Path
from soci_dev import image
from soci_dev.stack import Stack

stack = Stack(Path(sys.argv[1]), services=()).__enter__()
reference = image.push(image.read_image(Path(sys.argv[2])), stack.registry, "busybox")
stack.ctr("images", "pull", "--plain-http", reference)
stack.ctr("run", "--detach", reference, "sleeper", "/bin/busybox", "sleep", "1000")
print("running", *(daemon.pid for daemon in stack.daemons.values()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def blob_url(registry: str, proxy: Proxy, tmp_path: Path) -> str:
    layer = image.add_layer(tmp_path, [member("body", content=BODY)], gzip=False)
    image.push(image.write_image(tmp_path, [layer]), registry, "faults")
    return f"http://{proxy.address}/v2/faults/blobs/{layer.digest}"


def get(url: str, **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=20) as client:
        return client.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.root
def test_pull_and_run(bare_stack: Stack) -> None:
    """A pushed image is pulled by ctr onto overlayfs and its container prints what it should."""
    reference = image.push(busybox_image(), bare_stack.registry, "busybox")
    bare_stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
    assert bare_stack.ctr("run", "--rm", reference, "hello").stdout.splitlines()[0] == "hello"


@pytest.mark.root
def test_containerd_unpacks_the_torture_image(bare_stack: Stack) -> None:
    """containerd takes every layer of the torture image, and its changes show."""
    reference = image.push(torture_image(), bare_stack.registry, "torture")
    bare_stack.ctr("images", "pull", "--plain-http", reference)
    script = "b=/bin/busybox; cd /; $b cat restored elsewhere/hard; $b ls -A opaque; $b stat -c %a modes/sub/deep"
    out = bare_stack.ctr("run", "--rm", reference, "torture", "/bin/sh", "-c", script)
    assert out.stdout == "back againone inode, several names510\n"


@pytest.mark.root
def test_crashed_stack_is_cleaned(stack_folder: Callable[[], Path]) -> None:
    """After kill -9 of its owner, the next use of the folder ends daemons, containers and mounts of the crashed one."""
    folder = stack_folder()
    command = [sys.executable, "-c", CRASHING, str(folder), str(busybox_image().folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        words = owner.stdout.readline().split()
        assert words[0] == "running"
        with pytest.raises(FailedPrecondition, match="used by another"), Stack(folder, services=()):
            pass
        owner.kill()
    pids = [int(word) for word in words[1:]]
    shims = leftovers.shims_of(folder / "c.sock")
    assert shims
    assert leftovers.mounts_below(folder)
    assert all(leftovers.start_time(pid) for pid in pids)
    with Stack(folder, services=(), containerd=False):
        assert not [pid for pid in pids + shims if leftovers.start_time(pid)]
        assert leftovers.mounts_below(folder) == []
    assert not folder.exists()


@pytest.mark.root
def test_failed_start_leaves_nothing(stack_folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that does not come up ends the others, and its log is kept and named."""
    folder = stack_folder()
    started: dict[str, Daemon] = {}
    real = Stack._plan_containerd

    def broken(self: Stack) -> None:
        real(self)
        (self.folder / "containerd/config.toml").write_text("not = [toml")
        started.update(self.daemons)

    monkeypatch.setattr(Stack, "_plan_containerd", broken)
    with pytest.raises(Exception, match=r"containerd\.log"), Stack(folder, services=()):
        pass
    assert started
    assert all(daemon.returncode is not None for daemon in started.values())
    assert [path.name for path in folder.iterdir()] == ["log"]


def test_restart(make_stack: Callable[..., Stack]) -> None:
    """A daemon can be killed and started again on the same port."""
    stack = make_stack(registries=1, services=(), containerd=False)
    stack.kill("registry")
    with pytest.raises(httpx.ConnectError):
        get(f"http://{stack.registry}/v2/")
    stack.start("registry")
    assert get(f"http://{stack.registry}/v2/").status_code == 200
    assert stack.stop("nats") in {0, 1}


def test_proxy_counts(proxy: Proxy, blob_url: str) -> None:
    """Requests by method, body bytes by path, and a reset."""
    assert BODY in get(blob_url).content
    httpx.head(blob_url, trust_env=False)
    got = get(blob_url, Range="bytes=512-1535")
    assert (got.status_code, got.content) == (206, BODY[:1024])
    counts = proxy.counts
    assert (counts.get, counts.head, counts.other) == (2, 1, 0)
    path = next(iter(counts.paths))
    assert counts.paths[path].requests == 3
    assert counts.body_bytes == counts.blob_bytes == counts.paths[path].body_bytes
    assert counts.peak == 1
    proxy.reset()
    assert proxy.counts.requests == 0


def test_push_through_the_proxy(proxy: Proxy, tmp_path: Path) -> None:
    """Uploads pass, are counted, and the registry's Location headers lead back through the proxy."""
    layer = image.add_layer(tmp_path, [member("pushed", content=os.urandom(100_000))])
    image.push(image.write_image(tmp_path, [layer]), proxy.address, "pushed")
    assert proxy.counts.uploaded_bytes > layer.size
    got = get(f"http://{proxy.address}/v2/pushed/manifests/latest", Accept=image.MANIFEST)
    assert got.json()["layers"][0]["digest"] == layer.digest


def test_proxy_corrupts_one_byte(proxy: Proxy, blob_url: str) -> None:
    """Exactly the byte asked for is wrong."""
    sound = get(blob_url).content
    proxy.hook = first(1, Corrupt(300_000))
    spoiled = get(blob_url).content
    assert [at for at in range(len(sound)) if sound[at] != spoiled[at]] == [300_000]
    assert hashlib.sha256(get(blob_url).content).digest() == hashlib.sha256(sound).digest()


@pytest.mark.parametrize(
    "fault",
    [Drop(), Short(1000), Stall(0.05, keep=1000), Raw(b"\x00\xff\r\n\r\n"), Raw(b"HTTP/1.1 200 OK\r\nCon", reset=True)],
    ids=["drop", "short", "stall", "garbage", "reset"],
)
def test_proxy_breaks_connections(proxy: Proxy, blob_url: str, fault: Fault) -> None:
    """The client sees a broken connection, and the next request is sound."""
    proxy.hook = first(1, fault)
    with pytest.raises(httpx.TransportError):
        get(blob_url)
    assert get(blob_url).status_code == 200


def test_proxy_answers_in_the_registrys_place(proxy: Proxy, blob_url: str) -> None:
    """A status and headers of ours, without a request to the registry."""
    proxy.hook = always(Status(429, {"Retry-After": "7"}, b"later"))
    got = get(blob_url)
    assert (got.status_code, got.headers["retry-after"], got.content) == (429, "7", b"later")


def test_proxy_ignores_ranges(proxy: Proxy, blob_url: str) -> None:
    """A range asked for is answered with 200 and the whole, as some registries do."""
    proxy.hook = always(IgnoreRange())
    got = get(blob_url, Range="bytes=0-9")
    assert (got.status_code, len(got.content) > len(BODY)) == (200, True)


def test_proxy_shifts_ranges(proxy: Proxy, blob_url: str) -> None:
    """Another range than the one asked for comes, and says which it is."""
    proxy.hook = always(ShiftRange(2))
    got = get(blob_url, Range="bytes=512-1535")
    assert (got.status_code, got.content) == (206, BODY[2:1026])
    assert got.headers["content-range"].startswith("bytes 514-1537/")


def test_proxy_sends_slowly_and_for_ever(proxy: Proxy, blob_url: str) -> None:
    """A slow answer is sound; one without end goes on beyond the blob until the client has enough."""
    proxy.hook = first(1, Slow(8 << 20))
    assert BODY in get(blob_url).content
    proxy.hook = always(Endless())
    came = 0
    with httpx.Client(trust_env=False, timeout=20) as client, client.stream("GET", blob_url) as got:
        assert "content-length" not in got.headers
        for piece in got.iter_raw():
            came += len(piece)
            if came > 3 * len(BODY):
                break
    proxy.hook = None
    assert get(blob_url).status_code == 200
