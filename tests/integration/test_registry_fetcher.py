# SPDX-License-Identifier: Apache-2.0
"""The fetcher as a process: mirrors and logins out of its configuration file, asked for over a real NATS."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from soci.digest import Digest, sha256_digest
from soci.errors import NotFound, Unauthorized
from soci.oci import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest, encode_manifest
from soci_bus.asks import FindLogin, ImageConfig, LoginFound, ReadImageConfig
from soci_bus.events import Event, SpanRejected
from soci_bus.face import Context
from soci_bus.nats import connect
from soci_cache import LayerStore
from soci_dev.faults import Corrupt, Seen, Status
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_fetcher.links import Links
from soci_fetcher.source import RegistrySource
from soci_fetcher.spans import SpanFetcher
from soci_registry import HostBook, Mirror, NoCredentials, Registry, RegistrySettings
from soci_runtime.flights import Flights
from support.fetching import CONTEXT, check, push_layer, spans_of
from support.images import noise
from support.mounter_layers import everything, item, make

SECRET = "hunter2-of-the-kubelet"
WANTED = "Basic " + base64.b64encode(f"node:{SECRET}".encode()).decode()


class Node:
    """A fetcher, a registry that wants a login, and a mirror of it that wants none."""

    def __init__(self, make_stack: Callable[..., Stack], folder: Path, registry: Proxy, mirror: Proxy) -> None:
        self.registry, self.mirror = registry, mirror
        self.config = folder / "config.toml"
        self.config.write_text(
            f"""
            [cri_keychain]
            enable_keychain = true
            [[resolver.host."{registry.address}".mirrors]]
            host = "http://{mirror.address}"
            insecure = true
            [sociable]
            hosts_dir = "{folder}/absent:{folder}/hosts"
            """
        )
        self.hosts = folder / "hosts"
        flags = {"fetcher": ["--config", str(self.config)]}
        environment = {"DOCKER_CONFIG": str(folder / "none")}
        self.stack = make_stack(
            registries=2, services=("fetcher",), containerd=False, flags=flags, environment=environment
        )
        registry.upstream, mirror.upstream = self.stack.registries
        registry.hook = self._guard

    @staticmethod
    def _guard(seen: Seen) -> Status | None:
        if seen.headers.get("authorization") == WANTED:
            return None
        return Status(401, {"WWW-Authenticate": 'Basic realm="registry"'})

    async def push(self, name: str) -> Digest:
        """Put an image into both registries, around the proxies; its manifest's digest."""
        config = json.dumps({"name": name, "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64]}}).encode()
        layer = Descriptor(OCI_LAYER_GZIP, sha256_digest(b"a layer"), 7)
        about = Descriptor(OCI_CONFIG, sha256_digest(config), len(config))
        content = encode_manifest(Manifest(OCI_MANIFEST, about, (layer,)))
        async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as client:
            for address in self.stack.registries:
                repository = client.repository(f"{address}/{name}")
                await repository.push_blob(config)
                await repository.push_blob(b"a layer")
                await repository.push_manifest(content, OCI_MANIFEST)
        return sha256_digest(content)

    @property
    def log(self) -> str:
        return (self.stack.logs / "fetcher-1.log").read_text()


@pytest.fixture(scope="module")
def node(make_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with ExitStack() as open_now:
        registry, mirror = (open_now.enter_context(Proxy("127.0.0.1:1")) for _ in range(2))
        yield Node(make_stack, tmp_path_factory.mktemp("fetcher"), registry, mirror)


async def test_the_fetcher_uses_mirrors_and_logins(node: Node) -> None:
    """The mirror of the file serves; when it fails, the registry does, with a login asked for over the bus; a change
    is one line in the log, which never shows the secret."""
    asked: list[FindLogin] = []
    knows = asyncio.Event()

    async def found(ask: FindLogin, _context: Context) -> LoginFound:
        asked.append(ask)
        if not knows.is_set():
            raise NotFound("no login came with a pull")
        return LoginFound("node", SECRET)

    async with connect(node.stack.nats_url, node=node.stack.node, name="test") as bus:
        await bus.serve(FindLogin, found)

        async def read(name: str) -> ImageConfig:
            digest = await node.push(name)
            return await bus.ask(ReadImageConfig(f"{node.registry.address}/{name}:1", digest), timeout=20)

        assert (await read("team/one")).layers == (sha256_digest(b"a layer"),)
        assert node.registry.counts.requests == 0
        assert asked == []
        node.mirror.hook = lambda _seen: Status(503)
        with pytest.raises(Unauthorized):
            await read("team/two")
        knows.set()
        assert (await read("team/three")).layers == (sha256_digest(b"a layer"),)
        assert {ask.registry for ask in asked} == {node.registry.address}
        assert asked[-1].repository == "team/three"
    lines = [json.loads(line) for line in node.log.splitlines()]
    assert [line["host"] for line in lines if line["msg"] == "host left aside"] == [f"http://{node.mirror.address}"]
    assert SECRET not in node.log
    assert WANTED not in node.log


async def test_the_fetcher_reads_hosts_toml(node: Node) -> None:
    """A folder of containerd's that is made while the fetcher runs is used, for a registry that has no mirror yet."""
    name = "never.example:5000"
    node.mirror.hook = None
    (node.hosts / name).mkdir(parents=True)
    (node.hosts / name / "hosts.toml").write_text(f'[host."http://{node.mirror.address}"]\n')
    digest = await node.push("team/four")
    async with connect(node.stack.nats_url, node=node.stack.node, name="test") as bus:
        found = await bus.ask(ReadImageConfig(f"{name}/team/four:1", digest), timeout=20)
    assert found.layers == (sha256_digest(b"a layer"),)


async def test_spans_that_a_mirror_spoils(daemons: Stack, tmp_path: Path) -> None:
    """Spans that a mirror spoils are asked for again, come right from the registry, and the mirror is left aside."""
    made = make([*everything(), item("noise", noise(6, 1_000_000))], span_size=1 << 17)
    name = await push_layer(daemons.registries[0], made)
    told: list[str] = []

    def tell(what: str, /, **facts: object) -> None:
        told.append(f"{what} {facts.get('repository', '')}")

    with Proxy(daemons.registries[1]) as mirror:
        async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as client:
            await client.repository(f"{daemons.registries[1]}/{name}").push_blob(made.blob)
        mirror.hook = lambda seen: Corrupt(50_000) if seen.is_blob else None
        book = HostBook(mirrors={daemons.registries[0]: [Mirror(mirror.address)]})
        events: list[Event] = []
        async with (
            Registry(settings=RegistrySettings(), credentials=NoCredentials(), hosts=book, tell=tell) as client,
            Flights() as flights,
        ):
            spans = SpanFetcher(
                LayerStore(tmp_path), RegistrySource(client, Links()), events.append, flights, attempts=2
            )
            made.put(tmp_path)
            last = len(made.ztoc.span_digests) - 1
            await spans.fetch(spans_of(f"{daemons.registries[0]}/{name}:1", made, 0, last), CONTEXT)
            spans.close()
    assert check(LayerStore(tmp_path), made) == list(range(last + 1))
    assert len([event for event in events if isinstance(event, SpanRejected)]) == 1
    assert told == [f"host left aside {name}"]
