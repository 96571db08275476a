# SPDX-License-Identifier: Apache-2.0
"""Nodes of a cluster share what the registry sends: real NATS, real registry behind a counting proxy, real sockets."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from soci.span import Spans
from soci_bus.events import PeerLied, SpanRejected
from soci_bus.notices import PeerTold
from soci_cache.compressed import FILE
from soci_cache.tidy import Wish, tidy
from soci_dev.faults import Corrupt, Seen, Status
from soci_dev.proxy import Proxy
from soci_fetcher import peers_client, peers_door, peers_members, peers_ring, peers_source
from soci_fetcher.peers_auth import Asked, new_nonce, read_secret, sign_notice
from soci_fetcher.peers_door import path_of
from soci_fetcher.peers_members import VERSION
from support.bus import until
from support.fetching import push_layer
from support.images import noise
from support.mounter_layers import Made, everything, item, make
from support.peers import Node, acquainted, cluster, everywhere, joined, owners


@pytest.fixture(scope="module")
def made() -> Made:
    """A gzip layer of some twenty spans."""
    return make([*everything(), item("text", noise(5, 2_000_000))], span_size=1 << 17)


@pytest.fixture(autouse=True)
def blocks_of_a_few_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small layer has several blocks, which several nodes own."""
    monkeypatch.setattr(peers_ring, "BLOCK_BYTES", 256 << 10)


@pytest.fixture
async def reference(registry: str, proxy: Proxy, made: Made) -> str:
    """The layer in the registry, seen through the proxy, whose counts are at zero."""
    name = await push_layer(registry, made)
    proxy.reset()
    return f"{proxy.address}/{name}:1"


def names(count: int) -> list[str]:
    """Nodes that no other test has."""
    mark = secrets.token_hex(3)
    return [f"n{number}-{mark}" for number in range(count)]


def layer_bytes(proxy: Proxy, made: Made) -> int:
    """Bytes of the layer's blob that the registry gave."""
    return sum(count.body_bytes for path, count in proxy.counts.paths.items() if path.endswith(made.layer))


def extent(made: Made) -> int:
    """Bytes of all spans."""
    return made.ztoc.compressed_size - Spans.of(made.ztoc).compressed(0)[0]


@pytest.mark.parametrize("why", ["miss", "read-ahead"])
async def test_each_span_comes_once(
    tmp_path: Path, nats_url: str, proxy: Proxy, reference: str, made: Made, why: str
) -> None:
    """Four nodes bring a layer at once: the registry gives each byte once (but those that two blocks share)."""
    async with cluster(tmp_path, names(4), nats_url) as nodes:
        assert len(owners(made, nodes[0])) > 1
        await everywhere(nodes, reference, made, why)
        for node in nodes:
            assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert extent(made) <= layer_bytes(proxy, made) <= extent(made) + 64
        assert proxy.counts.blob_bytes - layer_bytes(proxy, made) == len(made.ztoc_bytes)


async def test_several_fetchers_of_a_node(
    tmp_path: Path, nats_url: str, proxy: Proxy, reference: str, made: Made
) -> None:
    """Two fetchers of one node, with one cache, and another node: still each byte comes once."""
    one, two = names(2)
    async with cluster(tmp_path, [one, one, two], nats_url) as nodes:
        await until(lambda: all(len(node.source._members.all()) == 3 for node in nodes), "three processes")
        await everywhere(nodes, reference, made)
        for node in nodes:
            assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert extent(made) <= layer_bytes(proxy, made) <= extent(made) + 64


def spoil(node: Node, made: Made) -> None:
    """Whatever a node keeps for others is wrong from now on."""
    file = node.store.directory(made.layer, made.ztoc_digest) / FILE
    file.write_bytes(bytes(byte ^ 0xFF for byte in file.read_bytes()))


async def test_a_peer_that_lies(tmp_path: Path, nats_url: str, proxy: Proxy, reference: str, made: Made) -> None:
    """Its bytes are found out, told with its name, and never used; it is not asked again, and the right ones come."""
    async with cluster(tmp_path, names(2), nats_url) as (liar, node):
        await liar.prepare(reference, made)
        await node.prepare(reference, made)
        await liar.fetch(reference, made)
        spoil(liar, made)
        assert liar.name in owners(made, node)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        lies = node.told(PeerLied)
        assert {(lie.node, lie.url, lie.layer) for lie in lies} == {(liar.name, liar.mine.url, made.layer)}
        assert node.told(SpanRejected)
        assert not node.source.aside.allows(liar.mine, time.monotonic())
        other = make([item("other", noise(6, 2_000_000))], span_size=1 << 17)
        elsewhere = f"{proxy.address}/{await push_layer(proxy.upstream, other)}:1"
        await node.prepare(elsewhere, other)
        await node.fetch(elsewhere, other)
        assert node.check(other) == list(range(len(other.ztoc.span_digests)))
        assert not liar.store.directory(other.layer, other.ztoc_digest).exists()
        assert len(node.told(PeerLied)) == len(lies) == 1


async def test_wrong_bytes_of_our_own(tmp_path: Path, nats_url: str, reference: str, made: Made) -> None:
    """What we keep for others and got spoiled on our disk is found out as a peer's lie is, and asked of the registry."""
    async with cluster(tmp_path, names(1), nats_url) as (node,):
        await node.bus.tell(fake_notice(tmp_path, "http://127.0.0.1:1", "gone"))  # whom we stand in for
        await until(lambda: "gone" in node.source._members.nodes, "it is taken in")
        await node.prepare(reference, made)
        spans = Spans.of(made.ztoc)
        start, end = spans.compressed(0)[0], spans.compressed(5)[1]
        await node.source.read(reference, made.layer, made.ztoc_digest, start, end, "miss")
        spoil(node, made)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert node.told(SpanRejected)
        assert node.told(PeerLied) == []


Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Spans], Awaitable[None]]


def saying(answer: bytes) -> Behaviour:
    """Answers every request with these bytes."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _spans: Spans) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(answer)
            await writer.drain()

    return behave


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter, _spans: Spans) -> None:
    """Takes everything and says nothing."""
    await reader.read()


async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spans: Spans) -> None:
    """Promises the right number of bytes, and sends one now and then."""
    head = await reader.readuntil(b"\r\n\r\n")
    run = re.match(rb"GET /v1/spans/\S+/(\d+)-(\d+) ", head)
    size = spans.compressed(int(run[2]))[1] - spans.compressed(int(run[1]))[0] if run else 100_000
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def endless_head(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _spans: Spans) -> None:
    """Sends headers for ever."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Header: %s\r\n" % (b"x" * 1000))
        await writer.drain()


HOSTILE = {
    "silent": silent,
    "dripping": dripping,
    "endless head": endless_head,
    "coming for ever": saying(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"),
    "coming, endless": saying(b"HTTP/1.1 202 Accepted\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 100_000),
    "empty": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "too long": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx"),
    "chunked": saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFF\r\nx"),
    "redirect": saying(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
    "no HTTP": saying(b"\x00\xff" * 100),
    "busy": saying(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"),
    "refusing": saying(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"),
    "ask the registry": saying(b"HTTP/1.1 424 No\r\nContent-Length: 0\r\n\r\n"),
}


def fake_notice(folder: Path, url: str, name: str) -> PeerTold:
    """The proven notice of a process that is none of ours."""
    made = PeerTold(name, url, secrets.token_hex(16), VERSION, 1, 60.0, time.time(), leaving=False, mac="")
    return replace(made, mac=sign_notice(read_secret(str(folder / "secret")), made))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits for peers are short."""
    monkeypatch.setattr(peers_client, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(peers_client, "SENDING_SECONDS", 0.3)
    monkeypatch.setattr(peers_client, "COMING_SECONDS", 0.5)
    monkeypatch.setattr(peers_source, "COMING_SECONDS", 0.5)
    monkeypatch.setattr(peers_client, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(peers_source, "HEDGE_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("kind", "why"),
    [(kind, "miss") for kind in HOSTILE] + [(kind, "read-ahead") for kind in ("silent", "dripping", "busy", "no HTTP")],
)
async def test_a_hostile_peer(tmp_path: Path, nats_url: str, reference: str, made: Made, kind: str, why: str) -> None:
    """Whatever a peer that owns most blocks does, the right bytes come, and no error."""
    await beside_a_hostile_peer(tmp_path, nats_url, reference, made, kind, why)


@pytest.mark.parametrize("kind", ["silent", "dripping", "coming for ever"])
async def test_the_registry_is_asked_too(
    tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made, kind: str
) -> None:
    """A miss does not wait until a peer has failed by its own clock: it gets the registry's bytes meanwhile."""
    for name in ("SILENT_SECONDS", "SENDING_SECONDS", "COMING_SECONDS"):
        monkeypatch.setattr(peers_client, name, 3600.0)
    monkeypatch.setattr(peers_source, "HEDGE_SECONDS", 0.1)
    monkeypatch.setattr(peers_source, "COMING_SECONDS", 0.1)
    await beside_a_hostile_peer(tmp_path, nats_url, reference, made, kind, "miss")


async def beside_a_hostile_peer(folder: Path, nats_url: str, reference: str, made: Made, kind: str, why: str) -> None:
    """Bring a layer where most blocks are owned by what is none of ours."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await HOSTILE[kind](reader, writer, Spans.of(made.ztoc))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with cluster(folder, names(1), nats_url) as (node,):
            for number in range(4):
                notice = fake_notice(folder, f"http://127.0.0.1:{port}", f"bad-{number}")
                await node.bus.tell(replace(notice, node=notice.node))
            await until(lambda: len(node.source._members.nodes) == 5, "the fakes are taken in")
            await node.prepare(reference, made)
            assert owners(made, node) - {node.name}
            await node.fetch(reference, made, why=why)
            assert node.check(made) == list(range(len(made.ztoc.span_digests)))
            assert node.told(PeerLied) == []
    finally:
        server.close()


@pytest.mark.usefixtures("impatient")
async def test_a_peer_that_is_gone(tmp_path: Path, nats_url: str, reference: str, made: Made) -> None:
    """Nobody listens where a notice points to: it is left aside after the first try, and all comes."""
    async with cluster(tmp_path, names(1), nats_url) as (node,):
        notice = fake_notice(tmp_path, "http://127.0.0.1:1", "gone")
        await node.bus.tell(notice)
        await until(lambda: "gone" in node.source._members.nodes, "it is taken in")
        await node.prepare(reference, made)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        (gone,) = [member for member in node.source._members.all() if member.node == "gone"]
        assert not node.source.aside.allows(gone, time.monotonic())


async def test_another_secret(tmp_path: Path, nats_url: str, made: Made) -> None:
    """Nodes of other clusters on the same bus are not heard, nor let in; nor is a request that came before."""
    (tmp_path / "theirs").mkdir()
    async with (
        cluster(tmp_path, names(2), nats_url) as (one, two),
        cluster(tmp_path / "theirs", names(1), nats_url) as (stranger,),
    ):
        await stranger.bus.tell(fake_notice(tmp_path / "theirs", stranger.mine.url, stranger.name))
        await acquainted([one, two])
        assert set(one.source._members.nodes) == {one.name, two.name}
        key = (made.layer, made.ztoc_digest)
        path = path_of(key, range(3))
        asked = Asked("GET", path, two.name, one.mine.start, f"{time.time():.3f}", new_nonce(), "r/i:1", "7", "miss")
        ours, theirs = (read_secret(str(folder / "secret")) for folder in (tmp_path, tmp_path / "theirs"))
        async with aiohttp.ClientSession() as session:

            async def status(headers: dict[str, str], changed: str = path) -> int:
                async with session.get(one.mine.url + changed, headers=headers) as answer:
                    return answer.status

            assert await status({}) == 401
            assert await status(asked.headers(theirs)) == 401
            assert await status(replace(asked, to=two.mine.start).headers(ours)) == 401
            assert await status(asked.headers(ours), path_of(key, range(4))) == 401
            assert await status(replace(asked, at="1").headers(ours)) == 401
            good = replace(asked, image="no image").headers(ours)
            assert await status(good) == 424
            assert await status(good) == 401
            bad = "/v1/spans/sha256:1/sha256:2/0-1"
            assert await status(replace(asked, path=bad, nonce=new_nonce()).headers(ours), bad) == 400
            backwards = f"/v1/spans/{made.layer}/{made.ztoc_digest}/3-1"
            assert await status(replace(asked, path=backwards, nonce=new_nonce()).headers(ours), backwards) == 400
            for unknown in ("/", "/v1/spans", f"{path}/../x", "/v1/spans/a/b/c-d"):
                assert await status({}, unknown) == 404


async def test_an_owner_whom_the_registry_refuses(
    tmp_path: Path, nats_url: str, proxy: Proxy, reference: str, made: Made
) -> None:
    """The one who asked it goes to the registry itself, and does not hold it against the owner."""
    async with cluster(tmp_path, names(2), nats_url) as (refused, node):

        def refuse(seen: Seen) -> Status | None:
            return Status(403) if seen.headers.get("user-agent") == refused.name else None

        proxy.hook = refuse
        await node.prepare(reference, made)
        assert refused.name in owners(made, node)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert node.source.aside.allows(refused.mine, time.monotonic())


async def test_an_owner_that_gets_wrong_bytes(
    tmp_path: Path, nats_url: str, proxy: Proxy, reference: str, made: Made
) -> None:
    """It serves none of them; the one who asked gets the right ones, and nobody is called a liar."""
    async with cluster(tmp_path, names(2), nats_url) as (unlucky, node):

        def spoiled(seen: Seen) -> Corrupt | None:
            return Corrupt(100) if seen.headers.get("user-agent") == unlucky.name and seen.range else None

        await unlucky.prepare(reference, made)
        proxy.hook = spoiled
        await node.prepare(reference, made)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert node.told(PeerLied) == []
        assert node.told(SpanRejected) == []


async def test_a_node_that_is_alone(tmp_path: Path, nats_url: str, reference: str, made: Made) -> None:
    """It keeps nothing for others, and asks the registry as if there were no peers."""
    async with cluster(tmp_path, names(1), nats_url) as (node,):
        await node.prepare(reference, made)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert not (node.store.directory(made.layer, made.ztoc_digest) / FILE).exists()


async def test_who_leaves_and_who_comes(
    tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made
) -> None:
    """A node that leaves is gone at once for all others, and what it owned is another one's; one that comes is there."""
    monkeypatch.setattr(peers_members, "LIVES", 3600.0)  # nobody is missed
    first, second, third = names(3)
    async with cluster(tmp_path, [first, second], nats_url) as (one, two):
        async with AsyncExitStack() as stack:
            three = await stack.enter_async_context(joined(tmp_path, third, nats_url))
            await acquainted([one, two, three])
            await everywhere([one, two, three], reference, made)
        await until(lambda: third not in one.source._members.nodes, "it said that it leaves")
        assert third not in owners(made, one)
        assert one.source.aside.allows(three.mine, time.monotonic())


async def test_a_folder_that_goes_away(tmp_path: Path, nats_url: str, reference: str, made: Made) -> None:
    """Where an owner's folder of the layer is freed, it makes it anew from the registry when it is asked again."""
    async with cluster(tmp_path, names(2), nats_url) as (owner, node):
        await node.prepare(reference, made)
        await node.fetch(reference, made, 0, 9)
        folder = owner.store.directory(made.layer, made.ztoc_digest)
        assert folder.exists()
        shutil.rmtree(folder)
        await node.fetch(reference, made)
        assert node.check(made) == list(range(len(made.ztoc.span_digests)))


async def test_what_is_kept_for_others_stays(tmp_path: Path, nats_url: str, reference: str, made: Made) -> None:
    """A layer that no snapshot of a node uses is not freed while other nodes ask for it, and is some time later."""
    async with cluster(tmp_path, names(2), nats_url) as (owner, node):
        await node.prepare(reference, made)
        await node.fetch(reference, made)
        folder = owner.store.directory(made.layer, made.ztoc_digest)
        cache = folder.parents[2]
        nothing = Wish(frozenset(), budget=1 << 50, grace=0.0)
        tidy(cache, nothing)
        assert folder.exists()
        for layer in owner.source._owned._open.values():
            layer.until = 0.0
        owner.source._owned.sweep()
        tidy(cache, nothing)
        assert not folder.exists()


def certificates(folder: Path) -> dict[str, str]:
    """Settings for TLS: an authority and a certificate of it, for a server on 127.0.0.1 and for clients."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")
    openssl("req", "-x509", *key, "ca.key", "-days", "2", "-subj", "/CN=ca", "-out", "ca.crt")
    openssl("req", *key, "node.key", "-subj", "/CN=node", "-out", "node.csr")
    (folder / "node.ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "node.ext")
    openssl("x509", "-req", "-in", "node.csr", *signed, "-out", "node.crt")
    files = {"peer_tls_cert": "node.crt", "peer_tls_key": "node.key", "peer_tls_ca": "ca.crt"}
    return {setting: str(folder / name) for setting, name in files.items()}


async def test_tls(tmp_path: Path, nats_url: str, proxy: Proxy, reference: str, made: Made) -> None:
    """With certificates all goes by TLS, each byte comes once, and who shows no certificate is not let in."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    settings = certificates(tmp_path)
    async with cluster(tmp_path, names(3), nats_url, **settings) as nodes:
        await everywhere(nodes, reference, made)
        for node in nodes:
            assert node.check(made) == list(range(len(made.ztoc.span_digests)))
            assert node.mine.url.startswith("https://")
        assert extent(made) <= layer_bytes(proxy, made) <= extent(made) + 64
        trusting = ssl.create_default_context(cafile=settings["peer_tls_ca"])
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                async with session.get(nodes[0].mine.url, ssl=trusting) as answer:
                    await answer.read()


async def test_connections_that_ask_nothing(
    tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch, reference: str, made: Made
) -> None:
    """They are closed after a while, and those beyond the limit at once; who asks is served meanwhile."""
    monkeypatch.setattr(peers_door, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(peers_door, "CONNECTIONS_MAX", 3)
    async with cluster(tmp_path, names(1), nats_url) as (node,):
        host, port = node.mine.url.removeprefix("http://").split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        idle[0][1].write(b"GET /v1/spans HTTP/1.1\r\nHost:")
        await asyncio.sleep(0.05)  # the server has its turn
        idle.append(await asyncio.open_connection(host, int(port)))
        assert await idle[-1][0].read() == b""
        for reader, writer in idle:
            await reader.read()  # ends
            writer.close()
        await node.prepare(reference, made)
        await node.fetch(reference, made)


async def test_a_crowd_is_told_to_come_again(
    tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch, proxy: Proxy, reference: str, made: Made
) -> None:
    """With more askers than are answered at a time, all have all, and the registry is asked once."""
    monkeypatch.setattr(peers_door, "REQUESTS_MAX", 1)
    async with cluster(tmp_path, names(5), nats_url) as nodes:
        await everywhere(nodes, reference, made)
        for node in nodes:
            assert node.check(made) == list(range(len(made.ztoc.span_digests)))
        assert layer_bytes(proxy, made) <= extent(made) + 64
