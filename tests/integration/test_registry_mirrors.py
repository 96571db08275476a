# SPDX-License-Identifier: Apache-2.0
"""Mirrors: real registries behind faulty proxies, by the configuration and by containerd's hosts.toml, with TLS."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from aiohttp import web

from soci.digest import Digest, sha256_digest
from soci.errors import InvalidConfig, Mismatch, NotFound, RegistryUnavailable
from soci.oci import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest, encode_manifest
from soci_dev.faults import Corrupt, Delay, Drop, Fault, Seen, Short, Stall, Status
from soci_dev.processes import Daemon, free_port
from soci_dev.proxy import Proxy
from soci_dev.tools import find
from soci_registry import Credentials, HostBook, Login, Mirror, NoCredentials, Registry, RegistrySettings, Repository
from soci_registry.credentials import NONE_REFUSED, Refused
from support.registry import Front, front, running_registry

SETTINGS = RegistrySettings(
    use_environment_proxies=False,
    min_wait=0.01,
    max_wait=0.05,
    tries=3,
    range_max_wait=0.05,
    connect_timeout=1.0,
    stall_timeout=0.5,
    range_deadline=20,
    mirror_aside_min=0.3,
    mirror_aside_max=600.0,
)
BLOB = random.Random(11).randbytes(3_000_000)
BLOB_DIGEST = sha256_digest(BLOB)
ABSENT = Digest("sha256:" + "0" * 64)
CONFIG = b'{"rootfs":{"type":"layers","diff_ids":[]}}'
V1_INDEX = "application/vnd.amazon.soci.index.v1+json"


def manifest(subject: Descriptor | None = None) -> bytes:
    config = Descriptor(OCI_CONFIG, sha256_digest(CONFIG), len(CONFIG))
    layer = Descriptor(OCI_LAYER_GZIP, BLOB_DIGEST, len(BLOB))
    return encode_manifest(Manifest(OCI_MANIFEST, config, (layer,), subject))


async def fill(address: str, *, referrer: bool = False) -> Digest:
    """Put ``team/app:one`` into a registry; with ``referrer``, something that refers to it too."""
    async with Registry(settings=SETTINGS, credentials=NoCredentials()) as it:
        repository = it.repository(f"{address}/team/app")
        await repository.push_blob(BLOB, BLOB_DIGEST)
        await repository.push_blob(CONFIG)
        image = (await repository.push_manifest(manifest(), OCI_MANIFEST, "one")).digest
        if referrer:
            content = manifest(Descriptor(OCI_MANIFEST, image, len(manifest())))
            pushed = await repository.push_manifest(content, OCI_MANIFEST)
            entry = Descriptor(OCI_MANIFEST, pushed.digest, len(content), artifact_type=V1_INDEX)
            await repository.attach_referrer_tag(image, entry)
        return image


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The registry itself, which alone knows what refers to the image."""
    with running_registry(tmp_path_factory.mktemp("origin")) as address:
        asyncio.run(fill(address, referrer=True))
        yield address


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that has the image as well."""
    with running_registry(tmp_path_factory.mktemp("copy")) as address:
        asyncio.run(fill(address))
        yield address


@pytest.fixture(scope="module")
def image(origin: str) -> Digest:
    return sha256_digest(manifest())


@dataclass
class World:
    """A registry and its mirror, each behind a proxy that counts and spoils; ``told`` is what the log would say."""

    mirror: Proxy
    registry: Proxy
    told: list[str] = field(default_factory=list)

    def tell(self, what: str, /, **facts: object) -> None:
        self.told.append(f"{what} {facts.get('repository', '')}".strip())

    def client(
        self, settings: RegistrySettings = SETTINGS, credentials: Credentials | None = None, *more: Mirror
    ) -> Registry:
        """A client that knows the mirror, and ``more`` before it."""
        book = HostBook(mirrors={self.registry.address: [*more, Mirror(f"http://{self.mirror.address}/v2")]})
        return Registry(settings=settings, credentials=credentials or NoCredentials(), hosts=book, tell=self.tell)

    def of(self, client: Registry) -> Repository:
        return client.repository(f"{self.registry.address}/team/app:one")


@pytest.fixture
def world(origin: str, copy: str) -> Iterator[World]:
    with Proxy(copy) as mirror, Proxy(origin) as registry:
        yield World(mirror, registry)


async def everything(repository: Repository, image: Digest) -> None:
    """Read in every way, and compare."""
    assert (await repository.manifest("one")).content == manifest()
    assert (await repository.resolve("one")).digest == image
    assert await repository.manifest_exists(image) == len(manifest())
    assert await repository.blob_exists(BLOB_DIGEST) == len(BLOB)
    assert await repository.blob(BLOB_DIGEST, limit=len(BLOB)) == BLOB
    assert await repository.blob_range(BLOB_DIGEST, 1000, 2_000_000) == BLOB[1000:2_000_000]
    async with aclosing(repository.blob_stream(BLOB_DIGEST)) as chunks:
        assert b"".join([chunk async for chunk in chunks]) == BLOB


# --- the order ------------------------------------------------------------------------------------------------------


async def test_the_mirror_serves_everything(world: World, image: Digest) -> None:
    """A sound mirror is asked once for each thing, and is told for whom it stands; the registry hears nothing."""
    async with world.client() as client:
        await everything(world.of(client), image)
    assert world.registry.counts.requests == 0
    assert world.mirror.counts.requests == 7
    assert world.told == []


async def test_the_mirror_is_told_whom_it_stands_for(world: World, image: Digest) -> None:
    """A mirror's requests carry ``ns``, as containerd's do; the registry's own do not."""

    async def manners(request: web.Request) -> web.Response | None:
        return web.Response(status=404) if "/blobs/" in request.path else None

    async with front(world.mirror.upstream, manners) as mirror, front(world.registry.upstream, _none) as registry:
        book = HostBook(mirrors={registry.address: [Mirror(mirror.address)]})
        async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book) as client:
            await everything(client.repository(f"{registry.address}/team/app:one"), image)
            await client.repository(f"{registry.address}/team/app:one").referrers(image, V1_INDEX)
        assert all(path.partition("?")[2].startswith(f"ns={registry.address}") for _, path, _ in mirror.seen)
        assert registry.seen
        assert not any("ns=" in path for _, path, _ in registry.seen)


async def _none(_request: web.Request) -> None:
    return None


async def test_without_mirrors_nothing_is_added(world: World, image: Digest) -> None:
    """Where no mirror is configured for a registry, each read is one request, as ever."""
    async with world.client() as client:
        await everything(client.repository(f"{world.mirror.address}/team/app:one"), image)
    assert world.mirror.counts.requests == 7


async def test_pushes_go_to_the_registry(world: World, image: Digest) -> None:
    """What is pushed goes past the mirror."""
    async with world.client() as client:
        assert await world.of(client).push_blob(f"new {random.random()}".encode()) is True
    assert world.mirror.counts.requests == 0


async def test_what_nobody_has(world: World) -> None:
    """What neither has is `NotFound` or None, of which the registry's word is the last, and nobody is left aside."""
    async with world.client() as client:
        repository = world.of(client)
        assert await repository.blob_exists(ABSENT) is None
        assert await repository.manifest_exists("two") is None
        with pytest.raises(
            NotFound, match=f"{world.registry.address}.*404.*before that: http://{world.mirror.address}"
        ):
            await repository.blob(ABSENT, limit=10)
        with pytest.raises(NotFound):
            await repository.blob_range(ABSENT, 0, 10)
        with pytest.raises(NotFound):
            await anext(repository.blob_stream(ABSENT))
        assert await repository.referrers(ABSENT, V1_INDEX) == []
    assert world.told == []


async def test_referrers_that_the_mirror_lacks(world: World, image: Digest) -> None:
    """A mirror without the list of referrers hides nothing, and is not left aside for it."""
    async with world.client() as client:
        repository = world.of(client)
        assert len(await repository.referrers(image, V1_INDEX)) == 1
        world.registry.reset()
        assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
    assert world.registry.counts.requests == 0
    assert world.told == []


# --- health ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Status(503), Status(429), Drop(), Stall(30, keep=10), Status(404), Status(403)])
async def test_a_failing_mirror_costs_no_read(world: World, image: Digest, fault: Fault) -> None:
    """Whatever a mirror does, all reads are right; after the first failure it is left aside, and that is said once."""
    world.mirror.hook = lambda _seen: fault
    async with world.client(replace(SETTINGS, mirror_aside_min=60)) as client:
        await everything(world.of(client), image)
    lacks = isinstance(fault, Status) and fault.code in {403, 404}
    assert world.told == [f"host left aside{' team/app' if lacks else ''}"]
    assert world.mirror.counts.requests <= 2


async def test_a_mirror_that_is_not_there(world: World, image: Digest) -> None:
    """A mirror without a listener is left aside at once; the next mirror serves."""
    async with world.client(SETTINGS, None, Mirror("127.0.0.1:1")) as client:
        await everything(world.of(client), image)
    assert world.registry.counts.requests == 0
    assert world.told[0] == "host left aside"


async def test_a_mirror_comes_back(world: World, image: Digest) -> None:
    """A mirror that failed is tried again after its time, by one request of many, and used again."""
    world.mirror.hook = lambda _seen: Status(503)
    async with world.client() as client:
        repository = world.of(client)
        assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
        assert world.mirror.counts.requests == 1
        await asyncio.sleep(0.35)
        world.mirror.reset()
        await asyncio.gather(*(repository.blob_range(BLOB_DIGEST, at, at + 10) for at in range(100, 110)))
        assert world.mirror.counts.requests == 1  # the others did not wait for it
        await asyncio.sleep(0.35)
        world.mirror.hook = None
        world.mirror.reset()
        await repository.blob_range(BLOB_DIGEST, 200, 210)
        assert world.mirror.counts.requests == 0  # left aside for twice as long
        await asyncio.sleep(0.35)
        world.registry.reset()
        for at in range(300, 310):
            await repository.blob_range(BLOB_DIGEST, at, at + 10)
        assert (world.mirror.counts.requests, world.registry.counts.requests) == (10, 0)
    assert world.told == ["host left aside", "host left aside", "host used again"]


async def test_a_mirror_that_asks_to_wait_is_not_waited_for(world: World, image: Digest) -> None:
    """After a 429 with Retry-After from a mirror the registry serves, also those who stood in line at the mirror."""
    world.mirror.hook = lambda _seen: Status(429, {"Retry-After": "30"})
    settings = replace(SETTINGS, connections_per_host=1, mirror_aside_min=0.1)
    async with asyncio.timeout(10), world.client(settings) as client:
        repository = world.of(client)
        for _ in range(2):
            await asyncio.gather(*(repository.blob_range(BLOB_DIGEST, at, at + 10) for at in range(8)))
            await everything(repository, image)
            await asyncio.sleep(0.2)
    assert world.mirror.counts.requests == 1


async def test_a_lacking_mirror_serves_other_repositories(world: World, image: Digest) -> None:
    """A mirror without one repository is left aside for that alone."""
    world.mirror.hook = lambda seen: Status(404) if "team/app" in seen.path else None
    async with world.client() as client:
        await world.of(client).blob_range(BLOB_DIGEST, 0, 10)
        world.mirror.reset()
        other = client.repository(f"{world.registry.address}/team/other")
        assert await other.blob_exists(BLOB_DIGEST) is None
    assert world.mirror.counts.requests == 1


async def test_all_are_away_for_a_while(world: World, image: Digest) -> None:
    """A read outlives an outage of registry and mirror, whichever of them is back first."""
    for first in (world.mirror, world.registry):
        for proxy in (world.mirror, world.registry):
            proxy.hook = lambda _seen: Status(503)
        async with world.client(replace(SETTINGS, mirror_aside_min=60)) as client:
            read = asyncio.create_task(world.of(client).blob_range(BLOB_DIGEST, 0, 10))
            await asyncio.sleep(0.5)
            first.hook = None
            assert await read == BLOB[:10]


async def test_a_registry_away_behind_a_lacking_mirror(world: World) -> None:
    """What the mirror lacks while the registry is away is no `NotFound`: nobody knows; later questions do not wait."""
    world.registry.hook = lambda _seen: Status(503)
    async with world.client(replace(SETTINGS, mirror_aside_min=60)) as client:
        repository = world.of(client)
        with pytest.raises(RegistryUnavailable, match="503"):
            await repository.manifest("two")
        world.registry.reset()
        with pytest.raises(RegistryUnavailable, match="503"):
            await repository.manifest("two")
        assert world.registry.counts.requests == 1
        world.mirror.hook = lambda seen: Status(404) if seen.is_blob else None
        read = asyncio.create_task(repository.blob_range(BLOB_DIGEST, 0, 10))
        await asyncio.sleep(0.5)
        world.registry.hook = None  # a read waits for it all the same
        assert await read == BLOB[:10]


async def test_a_slow_mirror_is_used(world: World, image: Digest) -> None:
    """Slowness within the limits is no failure."""
    world.mirror.hook = lambda _seen: Delay(0.3)
    async with world.client() as client:
        assert await world.of(client).blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
    assert world.registry.counts.requests == 0


# --- going on where one stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Short(700_000), Stall(30, keep=700_000)])
async def test_a_range_goes_on_at_the_next_host(world: World, image: Digest, fault: Fault) -> None:
    """A range that breaks off at a mirror goes on at the registry from the byte where it stopped."""
    seen: list[str] = []

    def hook(one: Seen) -> None:
        seen.append(one.range)

    world.mirror.hook = lambda _seen: fault
    world.registry.hook = hook
    async with world.client() as client:
        assert await world.of(client).blob_range(BLOB_DIGEST, 1000, 2_900_000) == BLOB[1000:2_900_000]
    tries = world.mirror.counts.requests
    assert seen == [f"bytes={1000 + 700_000 * tries}-2899999"]


async def test_a_stream_goes_on_at_the_next_host(world: World, image: Digest) -> None:
    """A whole blob that breaks off at a mirror goes on at the registry, and is proved as one."""
    world.mirror.hook = lambda _seen: Short(700_000)
    ranges: list[str] = []
    world.registry.hook = lambda one: ranges.append(one.range)
    async with (
        world.client() as client,
        aclosing(world.of(client).blob_stream(BLOB_DIGEST)) as chunks,
    ):
        assert b"".join([chunk async for chunk in chunks]) == BLOB
    assert ranges == [f"bytes={700_000 * world.mirror.counts.requests}-"]


# --- wrong bytes ----------------------------------------------------------------------------------------------------


async def test_wrong_bytes_of_a_mirror(world: World, image: Digest) -> None:
    """A mirror that spoils content is left aside for the repository; what has a digest comes from the registry."""
    world.mirror.hook = lambda _seen: Corrupt(5)
    async with world.client(replace(SETTINGS, mirror_aside_min=60)) as client:
        repository = world.of(client)
        assert await repository.blob(BLOB_DIGEST, limit=len(BLOB)) == BLOB
        assert (await repository.manifest(image)).content == manifest()
    assert world.told == ["host left aside team/app"]
    assert world.mirror.counts.requests == 1


async def test_a_range_asked_for_again_comes_from_elsewhere(world: World, image: Digest) -> None:
    """Who asks again for bytes that came says that they were wrong: the next ones come from the registry."""
    world.mirror.hook = lambda _seen: Corrupt(5)
    async with world.client(replace(SETTINGS, mirror_aside_min=60)) as client:
        repository = world.of(client)
        assert await repository.blob_range(BLOB_DIGEST, 0, 100) != BLOB[:100]
        assert await repository.blob_range(BLOB_DIGEST, 90, 200) != BLOB[90:200]  # others beside: says nothing
        assert await repository.blob_range(BLOB_DIGEST, 0, 50) == BLOB[:50]
    assert world.told == ["host left aside team/app"]


async def test_a_spoiled_stream(world: World, image: Digest) -> None:
    """A stream that a mirror spoiled is `Mismatch` at its end; the next one comes from the registry."""
    world.mirror.hook = lambda _seen: Corrupt(5)
    async with world.client(replace(SETTINGS, mirror_aside_min=60)) as client:
        repository = world.of(client)
        with pytest.raises(Mismatch):
            async for _ in repository.blob_stream(BLOB_DIGEST):
                pass
        async with aclosing(repository.blob_stream(BLOB_DIGEST)) as chunks:
            assert b"".join([chunk async for chunk in chunks]) == BLOB


async def test_distrust_by_name(world: World, image: Digest) -> None:
    """Whoever finds later that a blob was wrong can say so: the mirror that gave of it is left aside."""
    async with world.client() as client:
        repository = world.of(client)
        for at in range(0, 1000, 100):
            await repository.blob_range(BLOB_DIGEST, at, at + 100)
        repository.distrust(BLOB_DIGEST)
        await repository.blob_range(BLOB_DIGEST, 5000, 5100)
    assert world.told == ["host left aside team/app"]
    assert world.registry.counts.requests == 1


# --- logins and tokens ----------------------------------------------------------------------------------------------


class Guarded:
    """A registry with a token server of its own and one login."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self.asked = 0
        self.address = ""

    async def manners(self, request: web.Request) -> web.Response | None:
        if request.path == "/token":
            await asyncio.sleep(0.05)
            self.asked += 1
            fields = await request.post()
            if (fields.get("username"), fields.get("password")) != (self.login.username, self.login.secret):
                return web.Response(status=401)
            return web.json_response({"token": f"token-of-{self.login.username}", "expires_in": 300})
        if request.headers.get("Authorization") == f"Bearer token-of-{self.login.username}":
            return None
        return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="http://{self.address}/token"'})


class ByHost:
    """Logins by host; ``asked`` are the questions."""

    def __init__(self, logins: dict[str, Login]) -> None:
        self.logins = logins
        self.asked: list[tuple[str, str]] = []

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        self.asked.append((registry, repository))
        return self.logins.get(registry)


def secrets_seen(it: Front) -> str:
    return json.dumps([(path, headers) for _, path, headers in it.seen])


async def test_secrets_never_cross_hosts(world: World, image: Digest) -> None:
    """Each host gets its own login and token and never the other's, also when one takes over from the other."""
    at_mirror, at_registry = Guarded(Login("mirror", "m-secret")), Guarded(Login("origin", "o-secret"))
    async with (
        front(world.mirror.upstream, at_mirror.manners) as mirror,
        front(world.registry.upstream, at_registry.manners) as registry,
    ):
        at_mirror.address, at_registry.address = mirror.address, registry.address
        logins = ByHost({mirror.address: at_mirror.login, registry.address: at_registry.login})
        book = HostBook(mirrors={registry.address: [Mirror(mirror.address)]})
        async with Registry(settings=SETTINGS, credentials=logins, hosts=book) as client:
            repository = client.repository(f"{registry.address}/team/app:one")
            await everything(repository, image)
            assert registry.seen == []
            at_mirror.login = Login("other", "other-secret")  # the mirror takes the old login no longer
            await everything(repository, image)
        assert set(logins.asked) == {(mirror.address, "team/app"), (registry.address, "team/app")}
        assert "origin" not in secrets_seen(mirror)
        assert "o-secret" not in secrets_seen(mirror)
        assert "mirror" not in secrets_seen(registry)
        assert any("token-of-origin" in headers.get("authorization", "") for _, _, headers in registry.seen)


async def test_one_token_for_all_layers(world: World, image: Digest) -> None:
    """However many ranges, blobs and manifests of a repository are wanted at once, each host gives one token."""
    at_mirror, at_registry = Guarded(Login("mirror", "m")), Guarded(Login("origin", "o"))

    async def lacking(request: web.Request) -> web.Response | None:
        answer = await at_mirror.manners(request)
        return web.Response(status=404) if answer is None and "/blobs/" in request.path else answer

    async with (
        front(world.mirror.upstream, lacking) as mirror,
        front(world.registry.upstream, at_registry.manners) as registry,
    ):
        at_mirror.address, at_registry.address = mirror.address, registry.address
        logins = ByHost({mirror.address: at_mirror.login, registry.address: at_registry.login})
        for mirrors, expected in (({}, (0, 1)), ({registry.address: [Mirror(mirror.address)]}, (1, 2))):
            book = HostBook(mirrors=mirrors)
            async with Registry(settings=SETTINGS, credentials=logins, hosts=book) as client:

                def repository(client: Registry = client) -> Repository:
                    return client.repository(f"{registry.address}/team/app:one")

                async def stream() -> bytes:
                    async with aclosing(repository().blob_stream(BLOB_DIGEST)) as chunks:
                        return b"".join([chunk async for chunk in chunks])

                await asyncio.gather(
                    *(repository().blob_range(BLOB_DIGEST, at, at + 10) for at in range(12)),
                    *(repository().blob(sha256_digest(CONFIG), limit=1000) for _ in range(6)),
                    *(repository().manifest("one") for _ in range(3)),
                    *(stream() for _ in range(3)),
                    repository().blob_exists(BLOB_DIGEST),
                )
            assert (at_mirror.asked, at_registry.asked) == expected


# --- hosts.toml and TLS ---------------------------------------------------------------------------------------------


@dataclass
class Authority:
    """A certificate authority of one's own, with certificates for a server on localhost and for a client."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._openssl("req", "-x509", *self._key("ca"), "-days", "2", "-subj", "/CN=ca", "-out", "ca.crt")
        self.certificate("server", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        self.certificate("client", "extendedKeyUsage=clientAuth")

    def _key(self, name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")

    def certificate(self, name: str, extension: str) -> None:
        self._openssl("req", *self._key(name), "-subj", f"/CN={name}", "-out", f"{name}.csr")
        (self.folder / f"{name}.ext").write_text(extension)
        words = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext")
        self._openssl("x509", "-req", "-in", f"{name}.csr", *words, "-out", f"{name}.crt")

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)

    def file(self, name: str) -> str:
        return str(self.folder / name)


@contextmanager
def tls_registry(folder: Path, authority: Authority, *, want_client: bool) -> Iterator[str]:
    """Debian's docker-registry with TLS; yields ``localhost:port``. It may want a client's certificate."""
    folder.mkdir()
    port = free_port()
    tls = {"certificate": authority.file("server.crt"), "key": authority.file("server.key")}
    settings = {
        "version": "0.1",
        "log": {"level": "error"},
        "http": {
            "addr": f"127.0.0.1:{port}",
            "tls": {**tls, **({"clientcas": [authority.file("ca.crt")]} if want_client else {})},
        },
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
    }
    config = folder / "registry.json"
    config.write_text(json.dumps(settings))
    daemon = Daemon("tls", [find("docker-registry"), "serve", config], folder / "log", {"PATH": "/usr/bin"}, folder)
    context = ssl.create_default_context(cafile=authority.file("ca.crt"))
    context.load_cert_chain(authority.file("client.crt"), authority.file("client.key"))

    def answers() -> bool:
        try:
            with urlopen(f"https://localhost:{port}/v2/", timeout=1, context=context) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        daemon.wait(answers, "answering", 20.0)
        yield f"localhost:{port}"
    finally:
        daemon.stop()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def locked(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real registry with TLS that wants a client's certificate, holding the image."""
    folder = tmp_path_factory.mktemp("locked")
    with tls_registry(folder / "registry", authority, want_client=True) as address:
        host(folder / "fill" / address, address, f"ca = '{authority.file('ca.crt')}'\n{client_of(authority)}")

        async def push() -> None:
            book = HostBook(folders=[folder / "fill"])
            async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book) as it:
                repository = it.repository(f"{address}/team/app")
                await repository.push_blob(BLOB, BLOB_DIGEST)
                await repository.push_blob(CONFIG)
                await repository.push_manifest(manifest(), OCI_MANIFEST, "one")

        asyncio.run(push())
        yield address


def host(folder: Path, mirror: str, more: str) -> None:
    """A folder whose only mirror is ``https://<mirror>``; where it is the registry itself, as its server."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == mirror:
        (folder / "hosts.toml").write_text(f'server = "https://{mirror}"\n{more}')
    else:
        (folder / "hosts.toml").write_text(f'[host."https://{mirror}"]\n{more}')


def client_of(authority: Authority) -> str:
    return f"client = [['{authority.file('client.crt')}', '{authority.file('client.key')}']]"


@pytest.mark.parametrize(
    ("more", "served"),
    [
        ("ca = '{ca}'\n{client}", True),
        ("skip_verify = true\n{client}", True),
        ("ca = '{ca}'", False),  # no certificate of ours
        ("{client}", False),  # the server's is not trusted
        ("", False),
    ],
)
async def test_tls_of_a_mirror(
    world: World, image: Digest, authority: Authority, locked: str, tmp_path: Path, more: str, *, served: bool
) -> None:
    """Authorities, client certificates and the lack of a check hold for the host that they stand beside, alone."""
    text = more.format(ca=authority.file("ca.crt"), client=client_of(authority))
    host(tmp_path / world.registry.address, locked, text)
    book = HostBook(folders=[tmp_path])
    async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book, tell=world.tell) as client:
        await everything(client.repository(f"{world.registry.address}/team/app:one"), image)
    assert (world.registry.counts.requests == 0) is served
    assert world.told == ([] if served else ["host left aside"])


async def test_a_renewed_certificate_is_used(
    world: World, image: Digest, authority: Authority, locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that is put in place later counts without a restart."""
    monkeypatch.setattr("soci_registry.hosts.FRESH_SECONDS", 0.0)
    shutil.copy(authority.file("server.crt"), tmp_path / "ca.pem")  # not the authority
    host(tmp_path / world.registry.address, locked, f"ca = '{tmp_path}/ca.pem'\n{client_of(authority)}")
    book = HostBook(folders=[tmp_path])
    async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book) as client:
        image_name = f"{world.registry.address}/team/app:one"
        assert await client.repository(image_name).blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
        assert world.registry.counts.requests == 1
        shutil.copy(authority.file("ca.crt"), tmp_path / "ca.pem")
        await asyncio.sleep(0.35)
        assert await client.repository(image_name).blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
        assert world.registry.counts.requests == 1


async def test_unusable_certificates_are_named(world: World, image: Digest, locked: str, tmp_path: Path) -> None:
    """A mirror whose certificates cannot be read is passed over; alone, it is an error that names the file."""
    (tmp_path / "ca.pem").write_text("nothing")
    host(tmp_path / world.registry.address, locked, f"ca = '{tmp_path}/ca.pem'")
    host(tmp_path / locked, locked, f"ca = '{tmp_path}/ca.pem'")
    book = HostBook(folders=[tmp_path])
    async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book, tell=world.tell) as client:
        await everything(client.repository(f"{world.registry.address}/team/app:one"), image)
        with pytest.raises(InvalidConfig, match=r"ca\.pem"):
            await client.repository(f"{locked}/team/app").manifest("one")
    assert world.told


async def test_a_mirror_below_a_path_with_headers(world: World, image: Digest, tmp_path: Path) -> None:
    """A mirror's path replaces /v2, its headers go to it alone and not to where it redirects."""
    stored: list[dict[str, str]] = []

    async def at_store(request: web.Request) -> web.Response | None:
        stored.append({name.lower(): value for name, value in request.headers.items()})
        return None

    async with front(world.mirror.upstream, at_store) as store:

        async def at_mirror(request: web.Request) -> web.Response:
            if request.headers.get("X-Key") != "k-secret" or not request.path.startswith("/hub/team/app/"):
                return web.Response(status=400)
            target = f"http://{store.address.replace('127.0.0.1', 'localhost')}/v2{request.path.removeprefix('/hub')}"
            return web.Response(status=307, headers={"Location": target})

        async with front("", at_mirror) as mirror:
            folder = tmp_path / world.registry.address.replace(":", "_").join(("", "_"))
            folder.mkdir()
            (folder / "hosts.toml").write_text(
                f'[host."http://{mirror.address}/hub"]\noverride_path = true\n'
                f'[host."http://{mirror.address}/hub".header]\nX-Key = "k-secret"\n'
            )
            book = HostBook(folders=[tmp_path])
            async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book) as client:
                await everything(client.repository(f"{world.registry.address}/team/app:one"), image)
    assert stored
    assert not any("x-key" in headers for headers in stored)
    assert world.registry.counts.requests == 0


async def test_what_a_host_may_be_asked(world: World, image: Digest, tmp_path: Path) -> None:
    """A mirror for pulling alone is trusted with no tag; a registry that only resolves gives no content."""
    folder = tmp_path / "_default"
    folder.mkdir()
    (folder / "hosts.toml").write_text(
        f'server = "http://{world.registry.address}"\ncapabilities = ["resolve"]\n'
        f'[host."http://{world.mirror.address}"]\ncapabilities = ["pull"]\n'
    )
    book = HostBook(folders=[tmp_path])
    async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=book) as client:
        await everything(client.repository(f"{world.registry.address}/team/app:one"), image)
    assert world.registry.counts.requests == 2  # the two questions by tag
    assert set(world.mirror.counts.paths) == {f"/v2/team/app/blobs/{BLOB_DIGEST}", f"/v2/team/app/manifests/{image}"}


async def test_a_broken_hosts_toml_is_an_error(world: World, tmp_path: Path) -> None:
    """A file that cannot be used fails the pull with its name: silently asking elsewhere could leak what is private."""
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text("host = ")
    async with Registry(settings=SETTINGS, credentials=NoCredentials(), hosts=HostBook(folders=[tmp_path])) as client:
        with pytest.raises(InvalidConfig, match=r"hosts\.toml"):
            client.repository(f"{world.registry.address}/team/app:one")
