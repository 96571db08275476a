# SPDX-License-Identifier: Apache-2.0
"""Logins from Kubernetes' secrets, against a small API server of the tests' own: lists in pages, watches, and moods.

It speaks the part of the Kubernetes API that is used: chunked lists, watches with bookmarks, 410 Gone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from soci.errors import InvalidConfig, Unavailable
from soci_fetcher.access import BusQuestion, logins
from soci_registry import KubeSecrets, Login
from soci_registry.kube_login import SECRET_TYPE
from soci_registry.kube_secrets import Times
from soci_runtime.config import Config

TIMES = Times(first_list=5.0, kubeconfig_poll=0.05, retry_min=0.02, retry_max=0.2)
TOKEN = "kube-hunter2"


def secret(name: str, password: str, registry: str = "reg.example", version: int = 0, content: str = "") -> Any:
    auth = base64.b64encode(f"ada:{password}".encode()).decode()
    plain = content or json.dumps({"auths": {registry: {"auth": auth}}})
    return {
        "type": SECRET_TYPE,
        "metadata": {"namespace": "team", "name": name, "resourceVersion": str(version)},
        "data": {".dockerconfigjson": base64.b64encode(plain.encode()).decode()},
    }


class ApiServer:
    """Secrets with versions. ``oldest`` is the first version from which a watch can go on."""

    def __init__(self) -> None:
        self.secrets: dict[str, Any] = {}
        self.version = 100
        self.oldest = 100
        self.log: list[tuple[int, dict[str, Any]]] = []
        self.lists = 0
        self.watches: list[str] = []
        self.status = 0
        self.page_size = 2
        self.token: str | None = TOKEN
        self.url = ""
        self.news = asyncio.Condition()
        self.open: set[web.StreamResponse] = set()
        self.cut = False
        self.gone_in_list = 0
        self.raw: list[bytes] = []

    async def put(self, one: Any) -> None:
        await self._change("MODIFIED" if one["metadata"]["name"] in self.secrets else "ADDED", one)

    async def delete(self, name: str) -> None:
        await self._change("DELETED", self.secrets[name])

    async def say(self, line: bytes) -> None:
        """Have every watch say this."""
        self.raw.append(line)
        await self._wake()

    async def hang_up(self) -> None:
        self.cut = True
        await self._wake()

    async def _change(self, kind: str, one: Any) -> None:
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        if kind == "DELETED":
            del self.secrets[one["metadata"]["name"]]
        else:
            self.secrets[one["metadata"]["name"]] = one
        self.log.append((self.version, {"type": kind, "object": one}))
        await self._wake()

    async def _wake(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status"}, status=401)
        if self.status:
            return web.json_response({"kind": "Status"}, status=self.status)
        if request.path != "/api/v1/secrets" or request.query.get("fieldSelector") != f"type={SECRET_TYPE}":
            return web.Response(status=404)
        return await (self._watch(request) if request.query.get("watch") else self._list(request))

    async def _list(self, request: web.Request) -> web.Response:
        self.lists += 1
        start = int(request.query.get("continue", "0"))
        if start and self.gone_in_list:
            self.gone_in_list -= 1
            return web.Response(status=410)
        names = sorted(self.secrets)
        more = str(start + self.page_size) if start + self.page_size < len(names) else ""
        # As the real one: items of a list do not say what kind they are.
        return web.json_response(
            {
                "kind": "SecretList",
                "metadata": {"resourceVersion": str(self.version), "continue": more},
                "items": [self.secrets[name] for name in names[start : start + self.page_size]],
            }
        )

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        self.watches.append(request.query["resourceVersion"])
        if version < self.oldest:
            return web.Response(status=410)
        answer = web.StreamResponse()
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        self.cut = False
        while True:
            for number, event in [pair for pair in self.log if pair[0] > version]:
                await answer.write(json.dumps(event).encode() + b"\n")
                version = number
            while self.raw:
                await answer.write(self.raw.pop(0))
            if self.cut:
                request.transport.abort() if request.transport else None
                return answer
            async with self.news:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 0.2)


@asynccontextmanager
async def api_server(tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[ApiServer]:
    it = ApiServer()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", it.handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        it.url = f"{'https' if tls else 'http'}://localhost:{runner.addresses[0][1]}"
        yield it
    finally:
        await runner.cleanup()


def kubeconfig(path: Path, server: str, cluster: str = "", user: str = f"token: {TOKEN}") -> str:
    path.write_text(
        f"current-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
        f"clusters: [{{name: c, cluster: {{server: '{server}'{cluster and ', ' + cluster}}}}}]\n"
        f"users: [{{name: u, user: {{{user}}}}}]\n"
    )
    return str(path)


class Told:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def __call__(self, what: str, /, **facts: object) -> None:
        self.lines.append((what, facts))

    @property
    def words(self) -> list[str]:
        return [what for what, _ in self.lines]


async def password(source: KubeSecrets, registry: str = "reg.example") -> str | None:
    login = await source.find(registry, "team/app")
    return None if login is None else login.secret


async def until(source: KubeSecrets, wanted: str | None, registry: str = "reg.example") -> None:
    async with asyncio.timeout(10):
        while await password(source, registry) != wanted:
            await asyncio.sleep(0.01)


async def test_secrets_are_listed_in_pages_and_followed(tmp_path: Path) -> None:
    """All pages count; a secret that is added, changed or removed later counts at once, without another list."""
    told = Told()
    async with api_server() as api:
        for number in range(5):
            await api.put(secret(f"s{number}", f"p{number}", f"r{number}.example"))
        path = kubeconfig(tmp_path / "config", api.url)
        async with KubeSecrets(path, tell=told, times=TIMES) as source:
            assert [await password(source, f"r{number}.example") for number in range(6)] == [
                *(f"p{number}" for number in range(5)),
                None,
            ]
            assert api.lists == 3
            await api.put(secret("new", "pn", "new.example"))
            await until(source, "pn", "new.example")
            await api.put(secret("new", "changed", "new.example"))
            await until(source, "changed", "new.example")
            await api.delete("new")
            await until(source, None, "new.example")
            assert await source.find("r1.example", "team/app", (Login("ada", "p1"),)) is None
        assert api.lists == 3
    assert told.words == ["cluster's secrets followed"]


async def test_a_broken_watch_goes_on_where_it_was(tmp_path: Path) -> None:
    """After a broken connection nothing is listed again, and what happened meanwhile is learned."""
    told = Told()
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), tell=told, times=TIMES) as source:
            assert await password(source) == "p1"
            while not api.watches:
                await asyncio.sleep(0.01)
            await api.put(secret("one", "p2"))
            await until(source, "p2")
            for number in range(3, 6):
                await api.hang_up()
                await api.put(secret("one", f"p{number}"))
                await until(source, f"p{number}")
            assert api.lists == 1
            assert len(api.watches) > 1
            assert api.watches == sorted(set(api.watches), key=int)


@pytest.mark.parametrize("how", ["status", "event"])
async def test_an_outdated_watch_lists_again(tmp_path: Path, how: str) -> None:
    """410 Gone, as a status or as an event of the watch, leads to a new list; what was removed is forgotten."""
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        await api.put(secret("two", "p2", "two.example"))
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES) as source:
            assert await password(source) == "p1"
            while not api.watches:
                await asyncio.sleep(0.01)
            del api.secrets["two"]  # without an event: the watch missed it
            api.version += 50
            if how == "status":
                api.oldest = api.version
                await api.hang_up()
            else:
                await api.say(b'{"type":"ERROR","object":{"kind":"Status","code":410}}\n')
            await until(source, None, "two.example")
            assert await password(source) == "p1"
            assert api.lists == 2


async def test_bookmarks_move_the_version(tmp_path: Path) -> None:
    """A bookmark is remembered: the next watch goes on from there."""
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES) as source:
            assert await password(source) == "p1"
            await api.say(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"777"}}}\n')
            await asyncio.sleep(0.3)
            await api.hang_up()
            async with asyncio.timeout(10):
                while "777" not in api.watches:
                    await asyncio.sleep(0.01)


async def test_an_outdated_list_is_begun_again(tmp_path: Path) -> None:
    """410 Gone in the middle of a list: it is begun again, and nothing is half known meanwhile."""
    async with api_server() as api:
        api.gone_in_list = 1
        for number in range(5):
            await api.put(secret(f"s{number}", f"p{number}", f"r{number}.example"))
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES) as source:
            with suppress(Unavailable):
                await password(source)
            await until_known(source, "p4", "r4.example")
            assert await password(source, "r0.example") == "p0"


async def until_known(source: KubeSecrets, wanted: str, registry: str = "reg.example") -> None:
    async with asyncio.timeout(10):
        while True:
            with suppress(Unavailable):
                if await password(source, registry) == wanted:
                    return
            await asyncio.sleep(0.01)


async def test_bad_secrets_are_passed_over(tmp_path: Path) -> None:
    """A secret that cannot be read spoils no other; it is told of once, without its content."""
    told = Told()
    async with api_server() as api:
        await api.put(secret("bad", "", content="hunter2"))
        await api.put(secret("good", "p1"))
        path = kubeconfig(tmp_path / "config", api.url)
        async with KubeSecrets(path, tell=told, times=TIMES) as source:
            assert await password(source) == "p1"
            await api.put(secret("bad", "", content="hunter2 again"))
            await api.put(secret("good", "p2"))
            await until(source, "p2")
            await api.put(secret("bad", "p3", "bad.example"))
            await until(source, "p3", "bad.example")
            await api.put(secret("bad", "", content="hunter2 once more"))
            await until(source, None, "bad.example")
    passed = [facts for what, facts in told.lines if what == "secret passed over"]
    assert len(passed) == 2
    assert "hunter2" not in str(told.lines)


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[1]\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":{"metadata":7}}\n',
        b'{"type":"ODD","object":{"metadata":{"resourceVersion":"1"}}}\n',
        b'{"type":"ERROR","object":{"code":500}}\n',
        b'{"type":"ERROR","object":[]}\n',
        b"\n\n",
        b"x" * 5_000_000,
    ],
)
async def test_strange_events(tmp_path: Path, line: bytes) -> None:
    """Whatever a watch says, what is known stays known, and later secrets are learned."""
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES) as source:
            assert await password(source) == "p1"
            await api.say(line)
            await asyncio.sleep(0.3)
            await api.put(secret("one", "p2"))
            await until(source, "p2")


@pytest.mark.parametrize("status", [401, 403, 500])
async def test_an_api_that_refuses(tmp_path: Path, status: int) -> None:
    """Without a first list the source is away, which is said once; what was learned outlives a later refusal."""
    told = Told()
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        api.status = status
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), tell=told, times=TIMES) as source:
            for _ in range(3):
                with pytest.raises(Unavailable, match=f"status {status}"):
                    await password(source)
                await asyncio.sleep(0.05)
            assert told.words == ["cluster's secrets away"]
            api.status = 0
            await until_known(source, "p1")
            api.status = status
            await api.hang_up()
            await asyncio.sleep(0.3)
            assert await password(source) == "p1"
    assert told.words == ["cluster's secrets away", "cluster's secrets followed", "cluster's secrets away"]
    assert TOKEN not in str(told.lines)


async def test_the_api_goes_and_comes_back(tmp_path: Path) -> None:
    """While the API server is away what was learned holds; once it is back changes are learned again."""
    async with api_server() as api:
        port = int(api.url.rpartition(":")[2])
        await api.put(secret("one", "p1"))
        source = KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES)
        await source.__aenter__()
        assert await password(source) == "p1"
    try:
        await asyncio.sleep(0.2)
        assert await password(source) == "p1"
        async with api_server(port=port) as api:
            api.oldest = api.version = 1000
            await api.put(secret("one", "p2"))
            await until(source, "p2")
    finally:
        await source.__aexit__()


async def test_a_kubeconfig_that_comes_later(tmp_path: Path) -> None:
    """Before there is a kubeconfig there are no logins, and no error; once it is there it is used."""
    told = Told()
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        path = tmp_path / "config"
        async with KubeSecrets(str(path), tell=told, times=TIMES, environment={}) as source:
            assert await password(source) is None
            kubeconfig(path, api.url)
            await until(source, "p1")
    assert told.words == ["kubeconfig awaited"]


async def test_a_broken_kubeconfig_is_an_error_until_it_is_mended(tmp_path: Path) -> None:
    """A kubeconfig that cannot be used is `InvalidConfig`; a mended one is taken without a restart."""
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        path = tmp_path / "config"
        path.write_text("current-context: nowhere")
        async with KubeSecrets(str(path), times=TIMES) as source:
            with pytest.raises(InvalidConfig, match="contexts has no"):
                await password(source)
            kubeconfig(path, api.url)
            async with asyncio.timeout(10):
                while True:
                    with suppress(InvalidConfig):
                        if await password(source) == "p1":
                            break
                    await asyncio.sleep(0.01)


async def test_a_watch_that_ends_at_once_is_no_storm(tmp_path: Path) -> None:
    """A server that ends each watch at once is asked again with growing rests."""
    async with api_server() as api:
        await api.put(secret("one", "p1"))

        async def ends(_request: web.Request) -> web.StreamResponse:
            api.watches.append("")
            return web.Response()

        api._watch = ends  # type: ignore[method-assign,assignment]
        async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES) as source:
            assert await password(source) == "p1"
            await asyncio.sleep(1)
            assert 2 <= len(api.watches) < 15


async def test_the_end_ends_it(tmp_path: Path) -> None:
    """Leaving the block ends the following at once, in a watch or in a wait."""
    async with asyncio.timeout(2):
        async with api_server() as api:
            async with KubeSecrets(kubeconfig(tmp_path / "config", api.url), times=TIMES) as source:
                await password(source)
            async with KubeSecrets(str(tmp_path / "absent"), times=Times(), environment={}) as source:
                await password(source)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
async def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    """An API server with its own authority is reached by client certificate, from files and from data."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name, host in (("server", "kubernetes"), ("me", "me")):
        extra = ("-addext", f"subjectAltName=DNS:{host}", "-keyout", f"{name}.key", "-out", f"{name}.crt")
        openssl("req", "-x509", *key, "-subj", f"/CN={host}", *extra)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    tls.load_verify_locations(tmp_path / "me.crt")
    tls.verify_mode = ssl.CERT_REQUIRED

    def data(name: str) -> str:
        return base64.b64encode((tmp_path / name).read_bytes()).decode()

    name = "tls-server-name: kubernetes"
    by_file = (f"certificate-authority: server.crt, {name}", "client-certificate: me.crt, client-key: me.key")
    by_data = (
        f"certificate-authority-data: {data('server.crt')}, {name}",
        f"client-certificate-data: {data('me.crt')}, client-key-data: {data('me.key')}",
    )
    unchecked = ("insecure-skip-tls-verify: true", by_file[1])
    async with api_server(tls) as api:
        api.token = None
        await api.put(secret("one", "p1"))
        for cluster, user in (by_file, by_data, unchecked):
            async with KubeSecrets(kubeconfig(tmp_path / "config", api.url, cluster, user), times=TIMES) as source:
                assert await password(source) == "p1"
        for cluster, user in ((name, by_file[1]), (by_file[0], "token: none")):
            async with KubeSecrets(kubeconfig(tmp_path / "config", api.url, cluster, user), times=TIMES) as source:
                with pytest.raises(Unavailable):
                    await password(source)


async def test_the_fetcher_follows_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched on in the configuration, secrets are a source of logins behind Docker's file, and end with the rest."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    async with api_server() as api:
        await api.put(secret("one", "p1"))
        config = Config(kube_keychain=True, kubeconfig=kubeconfig(tmp_path / "kubeconfig", api.url))
        async with logins(config, BusQuestion()) as sources:
            assert await sources.find("reg.example", "team/app") == Login("ada", "p1")
            auth = base64.b64encode(b"docker:1").decode()
            (tmp_path / "config.json").write_text(json.dumps({"auths": {"reg.example": {"auth": auth}}}))
            assert await sources.find("reg.example", "team/app") == Login("docker", "1")
            assert await sources.find("reg.example", "team/app", (Login("docker", "1"),)) == Login("ada", "p1")
