# SPDX-License-Identifier: Apache-2.0
"""The kubelet's way with a private image: PullImage with a login, through our socket, before containerd's own CRI."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from aiohttp import web

from soci_containerd import connect
from soci_dev import image
from soci_dev.stack import Stack
from soci_proto.cri.runtime.v1 import api_pb2 as cri
from soci_proto.cri.runtime.v1 import api_pb2_grpc as cri_rpc
from support import lazy
from support.registry import front
from support.snapshotter import Calls, mounted

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

PULL_SECONDS = 60.0
NAMESPACE = "k8s.io"
SEED = secrets.randbits(32)
SECRET = "correct-horse-battery"
WRONG = "not-the-password"
BASIC = "Basic " + base64.b64encode(f"kubelet:{SECRET}".encode()).decode()


@pytest.fixture(scope="module")
def private_stack(stack_folder: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything, with the CRI keychain on, and no docker config to be found."""
    folder = stack_folder()
    nowhere = tmp_path_factory.mktemp("docker")
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text(
        f'[cri_keychain]\nenable_keychain = true\nimage_service_path = "unix://{folder / "c.sock"}"\n'
        "[sociable]\nno_regret = false\n"
    )
    words = ["--config", str(config), "--strict", "--log-level", "debug"]
    flags = dict.fromkeys(("snapshotter", "fetcher", "mounter"), words)
    with Stack(folder, cri=True, flags=flags, environment={"DOCKER_CONFIG": str(nowhere)}) as running:
        yield running


async def demands_login(request: web.Request) -> web.Response | None:
    """A registry that wants basic authentication for everything."""
    if request.headers.get("Authorization") == BASIC:
        return None
    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="private"'})


def prepared(stack: Stack, tmp_path: Path, name: str, seed: int) -> image.Image:
    """An indexed image, put into the registry behind the one that demands a login."""
    built = lazy.seeded_image(tmp_path, seed=seed)
    image.push(built, stack.registry, name, "1")
    lazy.build_index(stack, f"{stack.registry}/{name}:1")
    return built


def asked(reference: str, password: str | None) -> cri.PullImageRequest:
    auth = None if password is None else cri.AuthConfig(username="kubelet", password=password)
    return cri.PullImageRequest(image=cri.ImageSpec(image=reference), auth=auth)


def ours(stack: Stack) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"unix:{stack.snapshotter_address}")


def read_data(stack: Stack, chain: str) -> list[bytes]:
    """The files of the image's upper layer, through a snapshot of our own on it."""
    with closing(Calls(stack.snapshotter_address)) as calls:
        (parent,) = [one.name for one in calls.list() if one.labels.get("containerd.io/snapshot.ref") == chain]
        key = f"look-{secrets.token_hex(4)}"
        try:
            with mounted(calls.view(key, parent)) as target:
                return [(target / "data" / str(number)).read_bytes() for number in range(lazy.DATA_FILES)]
        finally:
            calls.remove(key)


def logs(stack: Stack) -> str:
    return "".join(
        file.read_text(errors="replace") for file in stack.logs.glob("*.log") if "containerd" not in file.name
    )


async def test_a_private_image_comes_lazily(private_stack: Stack, tmp_path: Path) -> None:
    """Both layers are lazy; what is read later is fetched with the login that came with the pull; nothing shows it."""
    stack = private_stack
    built = prepared(stack, tmp_path, "private", SEED)
    async with front(stack.registry, demands_login) as registry, ours(stack) as channel:
        reference = f"{registry.address}/private:1"
        images = cri_rpc.ImageServiceStub(channel)
        pulled = await images.PullImage(asked(reference, SECRET), timeout=PULL_SECONDS)
        (launched,) = lazy.launches(stack, reference)
        assert lazy.modes(launched) == ["lazy", "lazy"]
        before = len(registry.requests("GET", "/blobs/"))
        read = await asyncio.to_thread(read_data, stack, lazy.top_chain(built))
        assert read == [lazy.data_file(SEED, number) for number in range(lazy.DATA_FILES)]
        assert len(registry.requests("GET", "/blobs/")) > before, "not all of it was here"

        async with connect(str(stack.containerd_address), NAMESPACE) as client:
            top = await client.snapshots("sociable").stat(lazy.top_chain(built))
        assert top.labels["containerd.io/snapshot/remote"] == "remote snapshot"

        status = await images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=reference)), timeout=10)
        assert status.image.id == pulled.image_ref
        listed = await images.ListImages(cri.ListImagesRequest(), timeout=10)
        assert pulled.image_ref in {one.id for one in listed.images}
        usage = await images.ImageFsInfo(cri.ImageFsInfoRequest(), timeout=10)
        assert usage.image_filesystems

        removed = cri.RemoveImageRequest(image=cri.ImageSpec(image=pulled.image_ref))
        await images.RemoveImage(removed, timeout=PULL_SECONDS)
        said = logs(stack) + repr(lazy.launch(stack, launched["id"]))
    assert '"level": "debug"' in said or '"level": "info"' in said
    assert SECRET not in said
    assert BASIC.removeprefix("Basic ") not in said


async def test_without_a_login_it_is_refused(private_stack: Stack, tmp_path: Path) -> None:
    """As by containerd itself, with its own error; a wrong login leaves none behind for the next pull."""
    stack = private_stack
    prepared(stack, tmp_path, "refused", SEED + 1000)
    async with front(stack.registry, demands_login) as registry, ours(stack) as channel:
        images = cri_rpc.ImageServiceStub(channel)
        reference = f"{registry.address}/refused:1"
        for password in (None, WRONG, None):
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await images.PullImage(asked(reference, password), timeout=PULL_SECONDS)
            assert WRONG not in str(told.value)
        await images.PullImage(asked(reference, SECRET), timeout=PULL_SECONDS)
        assert lazy.modes(lazy.launches(stack, reference)[-1]) == ["lazy", "lazy"]
    assert WRONG not in logs(stack)


async def test_health_is_told_beside_it(private_stack: Stack) -> None:
    """The kubelet may probe the same socket."""
    async with ours(private_stack) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"\x0a\x17runtime.v1.ImageService", timeout=10) == b"\x08\x01"
