# SPDX-License-Identifier: Apache-2.0
"""Logins that are refused, renewed and asked for over the bus, against a real registry that wants them."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from soci.digest import sha256_digest
from soci.errors import BusUnavailable, InvalidConfig, NotFound, Unauthorized
from soci_bus.asks import FindLogin, LoginFound
from soci_bus.face import Context
from soci_bus.memory import MemoryBus
from soci_fetcher.access import BusQuestion, host_book, logins, registry_settings
from soci_registry import Credentials, FirstOf, FixedLogin, Login, NoCredentials, Registry, RegistrySettings
from soci_registry.credentials import NONE_REFUSED, Refused
from soci_runtime.config import Config, MirrorSetting
from support.registry import front, running_registry

SETTINGS = RegistrySettings(use_environment_proxies=False, min_wait=0.01, max_wait=0.05, range_deadline=20)
BLOB = random.Random(12).randbytes(100_000)
DIGEST = sha256_digest(BLOB)
IMAGE = "team/app"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as address:

        async def push() -> None:
            async with Registry(settings=SETTINGS, credentials=NoCredentials()) as it:
                await it.repository(f"{address}/{IMAGE}").push_blob(BLOB)

        asyncio.run(push())
        yield address


class Strict:
    """A registry that takes one password, by Basic or by a token; ``tried`` are the passwords that came."""

    def __init__(self, *, tokens: bool) -> None:
        self.password = "one"
        self.tokens = tokens
        self.tried: list[str] = []
        self.address = ""

    async def manners(self, request: web.Request) -> web.Response | None:
        if request.path == "/token":
            fields = await request.post()
            if "password" not in fields:
                return web.Response(status=401)
            self.tried.append(str(fields["password"]))
            if fields["password"] != self.password:
                return web.Response(status=401)
            return web.json_response({"token": self.password, "expires_in": 300})
        sent = request.headers.get("Authorization", "")
        if self.tokens:
            wanted, challenge = f"Bearer {self.password}", f'Bearer realm="http://{self.address}/token"'
        else:
            wanted = "Basic " + base64.b64encode(f"ada:{self.password}".encode()).decode()
            challenge = 'Basic realm="here"'
            if sent:
                self.tried.append(base64.b64decode(sent[6:]).decode().partition(":")[2])
        return None if sent == wanted else web.Response(status=401, headers={"WWW-Authenticate": challenge})


class Changing:
    """A source that remembers a login until it is refused, and then has the next one."""

    def __init__(self, *passwords: str) -> None:
        self.passwords = list(passwords)

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        assert repository == IMAGE
        while len(self.passwords) > 1 and Login("ada", self.passwords[0]) in refused:
            self.passwords.pop(0)
        return Login("ada", self.passwords[0])


async def read(client: Registry, address: str, at: int = 0) -> None:
    assert await client.repository(f"{address}/{IMAGE}").blob_range(DIGEST, at, at + 10) == BLOB[at : at + 10]


@pytest.fixture(params=[False, True], ids=["basic", "token"])
def strict(request: pytest.FixtureRequest) -> Strict:
    return Strict(tokens=request.param)


async def test_a_refused_login_is_renewed_within_the_request(upstream: str, strict: Strict) -> None:
    """A login that the registry refuses is asked for anew, and the read that met the refusal succeeds."""
    async with front(upstream, strict.manners) as it:
        strict.address = it.address
        async with Registry(settings=SETTINGS, credentials=Changing("zero", "one", "two")) as client:
            await read(client, it.address)
            strict.password = "two"  # half a day later
            await asyncio.gather(*(read(client, it.address, at) for at in range(8)))
            strict.tried.clear()
            await read(client, it.address)
    assert strict.tried in ([], ["two"])


async def test_another_source_has_a_newer_login(upstream: str, strict: Strict) -> None:
    """An old login of an earlier source does not hide a good one of a later source, and is not tried at each read."""
    sources = FirstOf((FixedLogin(Login("ada", "old")), FixedLogin(Login("ada", "one"))))
    async with front(upstream, strict.manners) as it:
        strict.address = it.address
        async with Registry(settings=SETTINGS, credentials=sources) as client:
            for at in range(5):
                await read(client, it.address, at)
    assert strict.tried.count("old") <= 2


async def test_all_refused_is_unauthorized_and_no_dead_end(upstream: str, strict: Strict) -> None:
    """Where every login is refused it is `Unauthorized` after a few tries; a registry that repents is used again."""
    async with front(upstream, strict.manners) as it:
        strict.address = it.address
        strict.password = "nobody's"
        sources = FirstOf((FixedLogin(Login("ada", "one")), FixedLogin(Login("ada", "two"))))
        async with Registry(settings=SETTINGS, credentials=sources) as client:
            for _ in range(3):
                with pytest.raises(Unauthorized) as caught:
                    await read(client, it.address)
                assert "one" not in str(caught.value).replace("none", "")
            assert len(strict.tried) <= 12
            strict.password = "one"
            await read(client, it.address)


async def test_a_source_without_end_is_not_asked_without_end(upstream: str, strict: Strict) -> None:
    """A source that always has another login is asked a few times, not for ever."""

    class Endless:
        number = 0

        async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
            self.number += 1
            return Login("ada", f"wrong{self.number}")

    async with front(upstream, strict.manners) as it:
        strict.address = it.address
        async with Registry(settings=SETTINGS, credentials=Endless()) as client:
            with pytest.raises(Unauthorized):
                await read(client, it.address)
    assert len(strict.tried) <= 5


async def test_a_login_that_has_aged_is_looked_up_again(upstream: str) -> None:
    """A login for Basic is looked up anew after its time, whether it is the same still or another."""
    strict = Strict(tokens=False)
    source = Changing("one")
    async with front(upstream, strict.manners) as it:
        settings = replace(SETTINGS, login_seconds=0.05)
        async with Registry(settings=settings, credentials=source) as client:
            for _ in range(3):
                await read(client, it.address)
                await asyncio.sleep(0.1)
            source.passwords = ["two"]
            strict.password = "two"
            await read(client, it.address)
            assert strict.tried == ["one", "one", "one", "two"]


# --- the fetcher's own sources --------------------------------------------------------------------------------------


def plugin(folder: Path, passwords: Path) -> Config:
    """A kubelet's configuration with one plugin, which says what stands in ``passwords``."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "rotating"
    said = {
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": "Registry",
        "cacheDuration": "12h",
        "auth": {"127.0.0.1:PORT": {"username": "ada", "password": "PASSWORD"}},
    }
    port = "$(sed 's/.*127.0.0.1:\\([0-9]*\\).*/\\1/')"
    script.write_text(
        f"#!/bin/sh\nport={port}\necho '{json.dumps(said)}' | sed \"s/PORT/$port/; s/PASSWORD/$(cat {passwords})/\"\n"
    )
    script.chmod(0o755)
    provider = {
        "name": "rotating",
        "matchImages": ["127.0.0.*"],
        "defaultCacheDuration": "12h",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
    }
    (folder / "config.json").write_text(
        json.dumps(
            {
                "kind": "CredentialProviderConfig",
                "apiVersion": "kubelet.config.k8s.io/v1",
                "providers": [{**provider, "matchImages": ["127.0.0.1:*"]}, {**provider, "name": "unused"}],
            }
        )
    )
    return Config(kubelet_credential_config=str(folder / "config.json"), kubelet_credential_bin_dir=str(folder / "bin"))


async def test_an_image_can_be_read_after_its_login_has_expired(
    upstream: str, strict: Strict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kubelet plugin, a rotated password costs no read: the plugin is asked once more, and no oftener."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("soci_registry.kubelet.REFUSED_PAUSE_SECONDS", 0.0)
    passwords = tmp_path / "password"
    passwords.write_text("one")
    async with front(upstream, strict.manners) as it:
        strict.address = it.address
        config = plugin(tmp_path, passwords)
        document = (tmp_path / "config.json").read_text().replace("127.0.0.1:*", it.address)
        (tmp_path / "config.json").write_text(document)
        async with (
            logins(config, BusQuestion()) as sources,
            Registry(settings=SETTINGS, credentials=sources) as client,
        ):
            await read(client, it.address)
            strict.password = "two"
            passwords.write_text("two")
            await asyncio.gather(*(read(client, it.address, at) for at in range(8)))


async def test_logins_of_the_image_service(
    upstream: str, strict: Strict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the snapshotter was handed with a pull is asked for over the bus, for the repository and its host."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    asked: list[FindLogin] = []

    async def found(ask: FindLogin, _context: Context) -> LoginFound:
        asked.append(ask)
        if ask.repository != IMAGE:
            raise NotFound("no login came for it")
        return LoginFound("ada", "one")

    question = BusQuestion()
    async with (
        front(upstream, strict.manners) as it,
        logins(Config(cri_keychain=True), question) as sources,
        Registry(settings=SETTINGS, credentials=sources) as client,
    ):
        strict.address = it.address
        with pytest.raises(BusUnavailable):
            await question(it.address, IMAGE)
        with pytest.raises(Unauthorized):  # away, and passed over: nobody else knows a login
            await read(client, it.address)
        question.bus = bus = MemoryBus("node")
        await bus.serve(FindLogin, found)
        await read(client, it.address)
        with pytest.raises(Unauthorized):
            await client.repository(f"{it.address}/team/other").blob_range(DIGEST, 0, 1)
        assert asked == [FindLogin(it.address, IMAGE), FindLogin(it.address, "team/other")]


def test_the_configuration_s_limits() -> None:
    """The reference's times and tries hold; ranges go on for their time unless the file says how often."""
    settings = registry_settings(Config())
    assert (settings.connect_timeout, settings.tries, settings.min_wait) == (3.0, 9, 0.03)
    assert settings.range_tries == RegistrySettings().range_tries
    config = Config(
        dial_timeout=1, response_timeout=2, request_timeout=4, max_retries=0, max_wait=5, blob_max_retries=1,
        blob_min_wait=0.2, blob_max_wait=0.5, fetching_timeout=6, auth_client_ttl=7, plain_http=("reg.example",),
    )  # fmt: skip
    settings = registry_settings(config)
    assert (settings.connect_timeout, settings.header_timeout, settings.total_timeout) == (1, 2, 4)
    assert (settings.tries, settings.max_wait, settings.range_tries, settings.range_max_wait) == (1, 5, 2, 0.5)
    assert (settings.range_deadline, settings.login_seconds) == (6, 7)
    assert (settings.range_retry.min_wait, settings.retry.min_wait) == (0.2, 0.03)
    assert settings.plain_http == {"reg.example"}


def test_the_configuration_s_hosts(tmp_path: Path) -> None:
    """Mirrors and folders come out of the configuration; a mirror that is none is refused."""
    (tmp_path / "b" / "reg.example").mkdir(parents=True)
    (tmp_path / "b" / "reg.example" / "hosts.toml").write_text('[host."https://m.example"]')
    mirrors = (("docker.io", (MirrorSetting("hub.example", insecure=True),)),)
    book = host_book(Config(resolver_hosts=mirrors, hosts_dir=f"{tmp_path}/a:{tmp_path}/b"))
    assert [host.base for host in book.hosts("docker.io")] == ["http://hub.example", "https://registry-1.docker.io"]
    assert [host.base for host in book.hosts("reg.example")] == ["https://m.example", "https://reg.example"]
    assert book.hosts("other.example") == ()
    with pytest.raises(InvalidConfig):
        host_book(Config(resolver_hosts=(("docker.io", (MirrorSetting("ftp://x"),)),)))


def a_source_is_a_source(source: Changing) -> Credentials:
    """For the type checker."""
    return source
