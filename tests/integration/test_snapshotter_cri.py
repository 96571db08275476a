# SPDX-License-Identifier: Apache-2.0
"""CRI's image service on our socket: what passes through, what is learned from it, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from soci.errors import NotFound
from soci_bus.asks import FindLogin, LoginFound
from soci_bus.memory import MemoryBus
from soci_proto.cri.runtime.v1 import api_pb2 as pb
from soci_runtime.logs import configure_logs
from soci_snapshotter import cri, grpc_door
from soci_snapshotter.cri import MOST_CALLS, SERVICE, keychain

LIMIT = 10.0
UNKNOWN_FIELD = b"\xa2\x06\x01x"  # field 100, which no message of ours names
SECRET = "hunter2"

SIZES = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]
Answers = Callable[[str, bytes, Any], Awaitable[bytes]]


class Backend(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """An image service that answers as a test says, and keeps what it was sent."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.seen: list[tuple[str, bytes]] = []
        self.metadata: dict[str, str] = {}

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]

        async def call(request: bytes, context: Any) -> bytes:
            self.seen.append((name, request))
            self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
            return await self.answers(name, request, context)

        return grpc.unary_unary_rpc_method_handler(call)


@asynccontextmanager
async def serving(path: Path, backend: Backend) -> AsyncIterator[None]:
    """The image service on a socket."""
    server = grpc.aio.server(handlers=[backend], options=SIZES)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


class Door:
    """Our own socket with the proxy behind it, and a client of it."""

    def __init__(self, channel: Any, bus: MemoryBus) -> None:
        self.channel = channel
        self.bus = bus

    async def call(self, name: str, request: bytes = b"", **options: Any) -> bytes:
        return bytes(await self.channel.unary_unary(f"/{SERVICE}/{name}")(request, timeout=LIMIT, **options))

    async def login(self, registry: str, repository: str) -> LoginFound:
        return await self.bus.ask(FindLogin(registry, repository), timeout=LIMIT)


@asynccontextmanager
async def door(folder: Path, backend: Backend | None) -> AsyncIterator[Door]:
    async with AsyncExitStack() as stack:
        if backend is not None:
            await stack.enter_async_context(serving(folder / "b.sock", backend))
        bus = MemoryBus("n1")
        proxy = await stack.enter_async_context(keychain(str(folder / "b.sock"), bus))
        address = str(folder / "s.sock")
        await stack.enter_async_context(grpc_door.listening(address, cast("Any", None), proxy=proxy))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{address}", options=SIZES))
        yield Door(channel, bus)


async def echo(name: str, request: bytes, context: Any) -> bytes:
    del context
    return f"{name}:".encode() + request


def pull(image: str, **auth: str) -> bytes:
    return pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=pb.AuthConfig(**auth)).SerializeToString()


@pytest.mark.parametrize("name", ["ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo"])
async def test_bytes_pass_unchanged(tmp_path: Path, name: str) -> None:
    """Both ways, with fields that we do not know, and with the trace they belong to."""
    backend = Backend(echo)
    request = pull("r/a:1", username="me", password=SECRET) + UNKNOWN_FIELD if name == "PullImage" else UNKNOWN_FIELD
    async with door(tmp_path, backend) as it:
        trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
        answer = await it.call(name, request, metadata=(("traceparent", trace), ("other", "x")))
    assert backend.seen == [(name, request)]
    assert answer == f"{name}:".encode() + request
    assert backend.metadata["traceparent"] == trace
    assert "other" not in backend.metadata


async def test_large_messages_pass(tmp_path: Path) -> None:
    """As large as containerd's own limit lets them be, almost."""
    backend = Backend(echo)
    request = b"\xa2\x06" + b"\x80\x80\xc0\x07" + bytes(15 << 20)  # field 100 of 15 MiB
    async with door(tmp_path, backend) as it:
        assert len(await it.call("ListImages", request)) == len(request) + len("ListImages:")


async def test_calls_we_do_not_know_are_unimplemented(tmp_path: Path) -> None:
    """Of the image service and of others, whatever the service behind us could do."""
    async with door(tmp_path, Backend(echo)) as it:
        for method in (f"/{SERVICE}/Newer", "/runtime.v1.RuntimeService/Version", "/runtime.v1alpha2.ImageService/X"):
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await it.channel.unary_unary(method)(b"", timeout=LIMIT)
            assert told.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_status_passes_as_it_came(tmp_path: Path) -> None:
    """Code, text and details; the client sees no difference to asking directly."""

    async def refuse(name: str, request: bytes, context: Any) -> bytes:
        del name, request
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such image", (("grpc-status-details-bin", b"\x01\xff"),))
        raise AssertionError

    async with door(tmp_path, Backend(refuse)) as it:
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await it.call("ImageStatus")
    assert (told.value.code(), told.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such image")
    assert dict(told.value.trailing_metadata() or ())["grpc-status-details-bin"] == b"\x01\xff"


async def test_before_the_service_is_there(tmp_path: Path) -> None:
    """Each call says so, and the first one after it came is answered; a later absence is the service's own."""
    async with door(tmp_path, None) as it:
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await it.call("ImageFsInfo")
        assert told.value.code() == grpc.StatusCode.UNAVAILABLE
        assert told.value.details() == f"server is not initialized yet: nobody answers on {tmp_path / 'b.sock'}"
        async with serving(tmp_path / "b.sock", Backend(echo)):
            async with asyncio.timeout(LIMIT):
                while True:
                    try:
                        assert await it.call("ImageFsInfo") == b"ImageFsInfo:"
                        break
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await it.call("ImageFsInfo")
        assert told.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "initialized" not in str(told.value.details())


async def test_a_login_is_there_during_the_pull_and_after(tmp_path: Path) -> None:
    """The bus is told it as soon as the pull has begun, for layers are read before it ends."""
    during: list[LoginFound] = []

    async def look(name: str, request: bytes, context: Any) -> bytes:
        del name, request, context
        during.append(await it.login("r:5000", "a"))
        return pb.PullImageResponse(image_ref="sha256:1").SerializeToString()

    async with door(tmp_path, Backend(look)) as it:
        with pytest.raises(NotFound, match="r:5000/a"):
            await it.login("r:5000", "a")
        await it.call("PullImage", pull("r:5000/a:1", username="me", password=SECRET))
        assert during == [LoginFound("me", SECRET)]
        assert await it.login("r:5000", "a") == LoginFound("me", SECRET)
        with pytest.raises(NotFound):
            await it.login("other:5000", "a")


async def test_a_failed_pull_leaves_no_login(tmp_path: Path) -> None:
    """Nor does one whose client went away; one that came before stays."""
    entered = asyncio.Event()

    async def fail(name: str, request: bytes, context: Any) -> bytes:
        del name
        if b"good" in request:
            return b""
        if b"slow" in request:
            entered.set()
            await asyncio.sleep(LIMIT)
        await context.abort(grpc.StatusCode.UNKNOWN, "401")
        raise AssertionError

    async with door(tmp_path, Backend(fail)) as it:
        with pytest.raises(grpc.aio.AioRpcError):
            await it.call("PullImage", pull("r/a:1", username="bad", password="x"))
        with pytest.raises(NotFound):
            await it.login("r", "a")
        await it.call("PullImage", pull("r/a:1", username="good", password="x"))
        slow = it.channel.unary_unary(f"/{SERVICE}/PullImage")(pull("r/a:2", username="slow", password="x"))
        async with asyncio.timeout(LIMIT):
            await entered.wait()
        assert (await it.login("r", "a")).username == "slow"
        slow.cancel()
        async with asyncio.timeout(LIMIT):
            while (await it.login("r", "a")).username != "good":
                await asyncio.sleep(0.01)


async def test_a_removed_image_is_forgotten(tmp_path: Path) -> None:
    """By the id that the pull answered, as the kubelet names it; not where the service refused to remove it."""

    async def answer(name: str, request: bytes, context: Any) -> bytes:
        if name == "RemoveImage" and b"refused" in request:
            await context.abort(grpc.StatusCode.UNKNOWN, "in use")
        return pb.PullImageResponse(image_ref="sha256:1").SerializeToString()

    def remove(image: str) -> bytes:
        return pb.RemoveImageRequest(image=pb.ImageSpec(image=image)).SerializeToString()

    async with door(tmp_path, Backend(answer)) as it:
        await it.call("PullImage", pull("r/refused:1", username="me", password="x"))
        with pytest.raises(grpc.aio.AioRpcError):
            await it.call("RemoveImage", remove("r/refused:1"))
        assert (await it.login("r", "refused")).username == "me"
        await it.call("RemoveImage", remove("sha256:1"))
        with pytest.raises(NotFound):
            await it.login("r", "refused")


@pytest.mark.parametrize("name", ["PullImage", "RemoveImage"])
async def test_what_is_no_message_is_refused(tmp_path: Path, name: str) -> None:
    """Bytes that cannot be read are not passed on."""
    backend = Backend(echo)
    async with door(tmp_path, backend) as it:
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await it.call(name, b"\xff\xff")
    assert told.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert backend.seen == []


async def test_so_many_calls_at_a_time(tmp_path: Path) -> None:
    """More than the limit are refused, so that the calls that pulls need themselves still find room."""
    go_on = asyncio.Event()

    async def wait(name: str, request: bytes, context: Any) -> bytes:
        del name, request, context
        await go_on.wait()
        return b""

    backend = Backend(wait)
    async with door(tmp_path, backend) as it, asyncio.TaskGroup() as tasks:
        held = [tasks.create_task(it.call("PullImage", pull(f"r/a:{number}"))) for number in range(MOST_CALLS)]
        async with asyncio.timeout(LIMIT):
            while len(backend.seen) < MOST_CALLS:
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await it.call("ImageStatus")
        assert told.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        go_on.set()
        assert await asyncio.gather(*held) == [b""] * MOST_CALLS
        assert await it.call("ImageStatus") == b""


async def test_no_log_line_has_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the lowest level, whether a pull succeeds, fails, is unreadable, or finds nobody."""

    async def mixed(name: str, request: bytes, context: Any) -> bytes:
        del name
        if b"bad" in request:
            await context.abort(grpc.StatusCode.UNKNOWN, "refused")
        return b""

    configure_logs("debug", "test")
    async with door(tmp_path, None) as it:
        with pytest.raises(grpc.aio.AioRpcError):
            await it.call("PullImage", pull("r/a:1", username="me", password=SECRET))
    async with door(tmp_path, Backend(mixed)) as it:
        await it.call("PullImage", pull("r/good:1", username="me", password=SECRET))
        for request in (pull("r/bad:1", username="me", password=SECRET), b"\xff" + SECRET.encode()):
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await it.call("PullImage", request)
            assert SECRET not in str(told.value)
        found = await it.login("r", "good")
        with pytest.raises(NotFound) as none:
            await it.login("r", "bad")
    said = capsys.readouterr()
    assert [json.loads(line)["msg"] for line in said.out.splitlines()] == ["the image service is not reached"]
    assert SECRET not in said.out + said.err + repr(found) + str(none.value)
    assert cri.SERVICE == SERVICE
