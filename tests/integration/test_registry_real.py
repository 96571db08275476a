# SPDX-License-Identifier: Apache-2.0
"""libs/registry against a real registry: directly, through a faulty proxy, and behind tokens and redirects."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from soci.digest import Digest, sha256_digest
from soci.errors import (
    DeadlineExceeded,
    InvalidConfig,
    LimitExceeded,
    Mismatch,
    NotFound,
    RegistryUnavailable,
    SociError,
    Unauthorized,
)
from soci.oci import OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor, Manifest, encode_manifest
from soci_dev.faults import Corrupt, Drop, IgnoreRange, Seen, Short, Stall, Status
from soci_dev.proxy import Proxy
from soci_registry import Credentials, FixedLogin, Login, NoCredentials, Registry, RegistrySettings, Repository
from soci_registry.policy import TOO_MANY_SECONDS
from soci_registry.route import Route
from soci_registry.urls import Place
from support.registry import Manners, front, running_registry

SETTINGS = RegistrySettings(
    use_environment_proxies=False,
    min_wait=0.01,
    max_wait=0.05,
    range_max_wait=0.05,
    stall_timeout=0.3,
    range_deadline=20,
)
BLOB = random.Random(7).randbytes(3 * 1024 * 1024)
BLOB_DIGEST = sha256_digest(BLOB)
ABSENT = Digest("sha256:" + "0" * 64)
CONFIG = b'{"rootfs":{"type":"layers","diff_ids":[]}}'
V1_INDEX = "application/vnd.amazon.soci.index.v1+json"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def image(upstream: str) -> Digest:
    """The manifest digest of ``team/app:one``, pushed by the library itself."""

    async def push() -> Digest:
        async with registry() as it:
            repository = it.repository(f"{upstream}/team/app")
            await repository.push_blob(BLOB, BLOB_DIGEST)
            await repository.push_blob(CONFIG)
            return (await repository.push_manifest(manifest(), OCI_MANIFEST, "one")).digest

    return asyncio.run(push())


class Ranges:
    """Over which wire ranges go in this test: our own, unless it says otherwise."""

    raw = True


BOTH_WIRES = pytest.mark.parametrize("wire", [True, False], ids=["raw", "aiohttp"], indirect=True)


@pytest.fixture(autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranges, "raw", getattr(request, "param", True))


def registry(settings: RegistrySettings = SETTINGS, credentials: Credentials | None = None) -> Registry:
    settings = replace(settings, raw_ranges=Ranges.raw)
    return Registry(settings=settings, credentials=credentials or NoCredentials())


def manifest(subject: Descriptor | None = None) -> bytes:
    config = Descriptor(OCI_CONFIG, sha256_digest(CONFIG), len(CONFIG))
    layer = Descriptor(OCI_LAYER_GZIP, BLOB_DIGEST, len(BLOB))
    return encode_manifest(Manifest(OCI_MANIFEST, config, (layer,), subject))


# --- the registry as it is ------------------------------------------------------------------------------------------


async def test_manifest_by_tag_and_by_digest(upstream: str, image: Digest) -> None:
    """A manifest comes back byte for byte, with its digest and media type, by tag and by digest."""
    async with registry() as it:
        repository = it.repository(f"{upstream}/team/app:one")
        by_tag = await repository.manifest("one")
        assert by_tag.content == manifest()
        assert (by_tag.media_type, by_tag.digest) == (OCI_MANIFEST, image)
        assert await repository.manifest(image) == by_tag
        assert await repository.manifest_exists("one") == len(manifest())
        assert (await repository.resolve("one")).digest == image


async def test_absent_things_are_not_found(upstream: str, image: Digest) -> None:
    """What the registry does not have is `NotFound`, or None from the questions for existence."""
    async with registry() as it:
        repository = it.repository(f"{upstream}/team/app")
        assert await repository.blob_exists(ABSENT) is None
        assert await repository.manifest_exists("two") is None
        for asked in (
            repository.manifest("two"),
            repository.blob(ABSENT, limit=10),
            repository.blob_range(ABSENT, 0, 1),
            anext(repository.blob_stream(ABSENT)),
        ):
            with pytest.raises(NotFound, match="404"):
                await asked


@BOTH_WIRES
async def test_blob_whole_in_a_stream_and_in_ranges(upstream: str, image: Digest) -> None:
    """A blob's bytes are the same by each way of reading, at both ends and in the middle."""
    size = len(BLOB)
    async with registry() as it:
        repository = it.repository(f"{upstream}/team/app")
        assert await repository.blob_exists(BLOB_DIGEST) == size
        assert await repository.blob(BLOB_DIGEST, limit=size) == BLOB
        async with aclosing(repository.blob_stream(BLOB_DIGEST)) as chunks:
            assert b"".join([chunk async for chunk in chunks]) == BLOB
        for start, end in ((0, 1), (0, size), (size - 1, size), (100_000, 2_500_000), (5, 5)):
            assert await repository.blob_range(BLOB_DIGEST, start, end) == BLOB[start:end]


async def test_blob_above_its_limit_is_refused(upstream: str, image: Digest) -> None:
    """A blob larger than the caller allows is `LimitExceeded`, as is a range longer than the settings allow."""
    async with registry(replace(SETTINGS, range_max=1000)) as it:
        repository = it.repository(f"{upstream}/team/app")
        with pytest.raises(LimitExceeded):
            await repository.blob(BLOB_DIGEST, limit=len(BLOB) - 1)
        with pytest.raises(LimitExceeded, match="range_max"):
            await repository.blob_range(BLOB_DIGEST, 0, 1001)


async def test_range_beyond_the_end_is_an_error(upstream: str, image: Digest) -> None:
    """A range that the blob does not have is never answered with fewer bytes."""
    async with registry(replace(SETTINGS, range_bad_answer_tries=2)) as it:
        repository = it.repository(f"{upstream}/team/app")
        with pytest.raises(RegistryUnavailable, match="Content-Range"):
            await repository.blob_range(BLOB_DIGEST, len(BLOB) - 10, len(BLOB) + 10)
        with pytest.raises(RegistryUnavailable, match="416"):
            await repository.blob_range(BLOB_DIGEST, len(BLOB), len(BLOB) + 10)


async def test_push_of_a_file_and_of_what_is_there(upstream: str, tmp_path: Path) -> None:
    """A file is uploaded once; a second push of it, or of the same bytes, uploads nothing."""
    content = random.Random(8).randbytes(2_500_000)
    (tmp_path / "layer").write_bytes(content)
    digest = sha256_digest(content)
    async with registry() as it:
        repository = it.repository(f"{upstream}/push/file")
        assert await repository.push_blob_file(tmp_path / "layer", digest) is True
        assert await repository.push_blob_file(tmp_path / "layer", digest) is False
        assert await repository.push_blob(content) is False
        assert await repository.blob(digest, limit=len(content)) == content


async def test_push_of_wrong_bytes_is_refused(upstream: str, tmp_path: Path) -> None:
    """Bytes that are not their digest never enter a registry under it."""
    (tmp_path / "layer").write_bytes(b"other")
    async with registry() as it:
        repository = it.repository(f"{upstream}/push/wrong")
        with pytest.raises(Mismatch):
            await repository.push_blob(b"some", ABSENT)
        with pytest.raises(Mismatch):
            await repository.push_manifest(manifest(), OCI_MANIFEST, ABSENT)
        with pytest.raises(RegistryUnavailable, match="DIGEST_INVALID"):
            await repository.push_blob_file(tmp_path / "layer", ABSENT)
        assert await repository.blob_exists(ABSENT) is None


async def test_referrers_by_the_fallback_tag(upstream: str, image: Digest) -> None:
    """A registry without the referrers API keeps them under a tag: appended once each, filtered when read."""
    async with registry() as it:
        repository = it.repository(f"{upstream}/team/app")
        assert await repository.referrers(image, V1_INDEX) == []
        attached = []
        for number, kind in enumerate((V1_INDEX, "application/other", V1_INDEX)):
            subject = Descriptor(OCI_MANIFEST, image, len(manifest()), {"number": str(number)})
            content = manifest(subject)
            pushed = await repository.push_manifest(content, OCI_MANIFEST)
            assert not pushed.subject_handled
            entry = Descriptor(OCI_MANIFEST, pushed.digest, len(content), {"n": str(number)}, artifact_type=kind)
            assert await repository.attach_referrer_tag(image, entry) is True
            assert await repository.attach_referrer_tag(image, entry) is False
            attached.append(entry)
        assert await repository.referrers(image, V1_INDEX) == [attached[0], attached[2]]
        assert (await repository.manifest(image.replace(":", "-"))).media_type == OCI_INDEX


# --- faults ---------------------------------------------------------------------------------------------------------


@BOTH_WIRES
@pytest.mark.parametrize("fault", [Short(1000), Drop(), Status(500), Status(503), IgnoreRange(), Stall(30, keep=10)])
async def test_every_second_range_goes_wrong(
    upstream: str, image: Digest, fault: Status | Drop | Short | Stall
) -> None:
    """Ranges are exact though every second answer is broken, and cost at most one more request each."""
    spans = [(at, at + 100_000) for at in range(0, 600_000, 100_000)]
    with Proxy(upstream, hook=lambda seen: fault if seen.is_blob and seen.number % 2 else None) as proxy:
        async with registry() as it:
            repository = it.repository(f"{proxy.address}/team/app")
            for start, end in spans:
                assert await repository.blob_range(BLOB_DIGEST, start, end) == BLOB[start:end]
        assert proxy.counts.get <= 2 * len(spans)


@pytest.mark.parametrize("fault", [Short(1_000_000), Short(1), Stall(30, keep=500_000), Drop(), Status(502)])
async def test_stream_goes_on_from_the_last_byte(
    upstream: str, image: Digest, fault: Status | Drop | Short | Stall
) -> None:
    """A broken stream is resumed by Range, not begun again, and what arrives is the blob."""
    ranges: list[str] = []

    def hook(seen: Seen) -> Status | Drop | Short | Stall | None:
        if seen.is_blob:
            ranges.append(seen.range)
        return fault if seen.is_blob and len(ranges) <= 2 else None

    with Proxy(upstream, hook=hook) as proxy:
        async with (
            registry() as it,
            aclosing(it.repository(f"{proxy.address}/team/app").blob_stream(BLOB_DIGEST)) as chunks,
        ):
            assert b"".join([chunk async for chunk in chunks]) == BLOB
    assert len(ranges) == 3
    assert ranges[0] == ""
    if isinstance(fault, Short | Stall):
        assert ranges[1:] == [f"bytes={fault.keep}-", f"bytes={2 * fault.keep}-"]


async def test_corrupt_content_is_never_returned_whole(upstream: str, image: Digest) -> None:
    """A changed bit is `Mismatch` for blob, stream and manifest, after another try, which heals where it can."""
    with Proxy(upstream) as proxy:
        async with registry(replace(SETTINGS, bad_answer_tries=3)) as it:
            repository = it.repository(f"{proxy.address}/team/app")
            proxy.hook = lambda seen: Corrupt(5) if seen.number == 1 else None
            assert await repository.blob(BLOB_DIGEST, limit=len(BLOB)) == BLOB
            proxy.hook = lambda _seen: Corrupt(5)
            with pytest.raises(Mismatch, match="3 tries"):
                await repository.blob(BLOB_DIGEST, limit=len(BLOB))
            with pytest.raises(Mismatch):
                await repository.manifest(image)
            with pytest.raises(Mismatch):
                async for _ in repository.blob_stream(BLOB_DIGEST):
                    pass


@pytest.mark.parametrize(("asks", "seconds"), [({"Retry-After": "1"}, 1.0), ({}, TOO_MANY_SECONDS)])
async def test_too_many_requests_hold_back_every_range(
    upstream: str, image: Digest, asks: dict[str, str], seconds: float
) -> None:
    """After a 429 nothing is asked of that host before the time is over, by no range."""
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def manners(request: web.Request) -> web.Response | None:
        times.append(loop.time())
        return web.Response(status=429, headers=asks) if len(times) == 1 else None

    async with front(upstream, manners) as it, registry() as client:
        repository = client.repository(f"{it.address}/team/app")
        first = asyncio.create_task(repository.blob_range(BLOB_DIGEST, 0, 10))
        while not times:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the 429 is there
        second = asyncio.create_task(repository.blob_range(BLOB_DIGEST, 10, 20))
        assert [await first, await second] == [BLOB[:10], BLOB[10:20]]
    assert len(times) == 3
    assert min(times[1:]) - times[0] >= seconds


@BOTH_WIRES
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"Content-Range": "bytes 0-99/3145728"}, "Content-Range is 0-99"),
        ({"Content-Range": "bytes 100-199/*", "Content-Encoding": "gzip"}, "encoded"),
        ({}, "without a valid Content-Range"),
        ({"Content-Range": "bytes 100-199/150"}, "without a valid Content-Range"),
        ({"Content-Range": "bytes 100-199/200", "Content-Type": "multipart/byteranges; boundary=x"}, "multipart"),
    ],
)
async def test_lying_partial_answers_are_refused(
    upstream: str, image: Digest, wrong: dict[str, str], says: str
) -> None:
    """A 206 that is not exactly the range asked for is tried again, and its bytes are never returned."""

    async def manners(_request: web.Request) -> web.Response:
        return web.Response(status=206, headers=wrong, body=b"x" * 100)

    async with front(upstream, manners) as it, registry(replace(SETTINGS, range_bad_answer_tries=3)) as client:
        with pytest.raises(RegistryUnavailable, match=says):
            await client.repository(f"{it.address}/team/app").blob_range(BLOB_DIGEST, 100, 200)
        assert len(it.seen) == 3


@BOTH_WIRES
@pytest.mark.parametrize("size", [99, 101])
async def test_partial_body_of_another_length_is_refused(upstream: str, image: Digest, size: int) -> None:
    """A 206 with the right Content-Range and one byte too few or too many is refused, whatever its framing."""

    async def manners(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(status=206, headers={"Content-Range": "bytes 100-199/3145728"})
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        await answer.write(b"x" * size)
        await answer.write_eof()
        return answer

    async with (
        front(upstream, manners) as it,
        registry(replace(SETTINGS, range_tries=3, range_bad_answer_tries=3)) as c,
    ):
        with pytest.raises(RegistryUnavailable, match=r"99 of 100|more than the 100"):
            await c.repository(f"{it.address}/team/app").blob_range(BLOB_DIGEST, 100, 200)


@pytest.mark.parametrize("fault", [Short(700_000), Stall(30, keep=700_000)])
async def test_range_goes_on_from_the_last_byte(upstream: str, image: Digest, fault: Short | Stall) -> None:
    """A range that breaks off is asked for again from the byte where it stopped, not from its beginning."""
    ranges: list[str] = []

    def hook(seen: Seen) -> Short | Stall | None:
        ranges.append(seen.range)
        return fault if len(ranges) <= 2 else None

    with Proxy(upstream, hook=hook) as proxy:
        async with registry() as it:
            got = await it.repository(f"{proxy.address}/team/app").blob_range(BLOB_DIGEST, 1000, 2_000_000)
    assert got == BLOB[1000:2_000_000]
    assert ranges == ["bytes=1000-1999999", "bytes=701000-1999999", "bytes=1401000-1999999"]


@BOTH_WIRES
async def test_whole_blob_for_a_distant_range_is_refused(upstream: str, image: Digest) -> None:
    """A server that ignores Range is not read through further than the settings allow."""
    with Proxy(upstream, hook=lambda _seen: IgnoreRange()) as proxy:
        async with registry(replace(SETTINGS, range_skip_max=1000, range_bad_answer_tries=2)) as it:
            repository = it.repository(f"{proxy.address}/team/app")
            assert await repository.blob_range(BLOB_DIGEST, 1000, 1100) == BLOB[1000:1100]
            with pytest.raises(RegistryUnavailable, match="ignores Range"):
                await repository.blob_range(BLOB_DIGEST, 1001, 1100)


@BOTH_WIRES
async def test_trickling_body_is_given_up(upstream: str, image: Digest) -> None:
    """A body that never stalls but trickles is given up after a window, and another connection is tried."""
    count = 0

    async def manners(request: web.Request) -> web.StreamResponse | None:
        nonlocal count
        count += 1
        if count > 1:
            return None
        answer = web.StreamResponse(status=206, headers={"Content-Range": "bytes 0-99999/3145728"})
        answer.content_length = 100_000
        await answer.prepare(request)
        for at in range(1000):
            await answer.write(BLOB[at : at + 1])
            await asyncio.sleep(0.05)
        return answer

    async with front(upstream, manners) as it, registry() as client:
        repository = client.repository(f"{it.address}/team/app")
        assert await repository.blob_range(BLOB_DIGEST, 0, 100_000) == BLOB[:100_000]
    assert count == 2


async def test_deadline_ends_the_tries(upstream: str, image: Digest) -> None:
    """A range whose registry stays away ends at the caller's deadline and says why; later ones work again."""
    with Proxy(upstream, hook=lambda _seen: Status(503)) as proxy:
        async with registry() as it:
            repository = it.repository(f"{proxy.address}/team/app")
            with pytest.raises(DeadlineExceeded, match=r"not within 1 s; the last of \d+ tries: status 503"):
                await repository.blob_range(BLOB_DIGEST, 0, 10, deadline=1)
            proxy.hook = None
            assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]


async def test_registry_that_is_away() -> None:
    """No listener is `RegistryUnavailable` after the allowed tries, not an exception of the HTTP client."""
    async with registry(replace(SETTINGS, tries=3)) as it:
        repository = it.repository("127.0.0.1:1/team/app")
        with pytest.raises(RegistryUnavailable, match=r"no connection.*3 tries"):
            await repository.manifest("one")
        with pytest.raises(RegistryUnavailable, match=r"no connection.*3 tries"):
            await repository.blob(BLOB_DIGEST, limit=1)


@BOTH_WIRES
async def test_connections_a_host_are_bounded(upstream: str, image: Digest) -> None:
    """However many ranges are asked for at once, a host sees no more than the settings' connections."""
    with Proxy(upstream, rtt_s=0.01) as proxy:
        async with registry(replace(SETTINGS, connections_per_host=3)) as it:
            repository = it.repository(f"{proxy.address}/team/app")
            spans = [(at * 1000, at * 1000 + 1000) for at in range(30)]
            got = await asyncio.gather(*(repository.blob_range(BLOB_DIGEST, *span) for span in spans))
        assert got == [BLOB[start:end] for start, end in spans]
        assert proxy.counts.peak <= 3


# --- tokens ---------------------------------------------------------------------------------------------------------


class TokenServer:
    """Bearer tokens as the distribution specification has them; ``accepted`` is what the registry takes now."""

    def __init__(self, login: Login | None = None, *, knows_post: bool = True) -> None:
        self.login = login
        self.knows_post = knows_post
        self.asked: list[dict[str, str]] = []
        self.accepted = ""
        self.expires_in = 300
        self.address = ""

    async def manners(self, request: web.Request) -> web.Response | None:
        if request.path == "/token":
            return await self._token(request)
        if request.headers.get("Authorization") == f"Bearer {self.accepted}" and self.accepted:
            return None
        realm = f'Bearer realm="http://{self.address}/token",service="tests",scope="repository:x:pull"'
        return web.json_response(
            {"errors": [{"code": "UNAUTHORIZED"}]}, status=401, headers={"WWW-Authenticate": realm}
        )

    async def _token(self, request: web.Request) -> web.Response:
        await asyncio.sleep(0.05)  # long enough for others to be refused meanwhile
        fields = {**dict(request.query), **{key: str(value) for key, value in (await request.post()).items()}}
        self.asked.append({"method": request.method, **fields})
        if request.method == "POST" and not self.knows_post:
            return web.Response(status=405)
        if self.login is not None:
            basic = base64.b64encode(f"{self.login.username}:{self.login.secret}".encode()).decode()
            by_form = (fields.get("username"), fields.get("password")) == (self.login.username, self.login.secret)
            if not by_form and request.headers.get("Authorization") != f"Basic {basic}":
                return web.Response(status=401)
        self.accepted = f"token-{len(self.asked)}"
        return web.json_response({"access_token": self.accepted, "expires_in": self.expires_in})


@pytest.fixture
def tokens() -> TokenServer:
    return TokenServer()


async def test_anonymous_token_is_asked_for_once(upstream: str, image: Digest, tokens: TokenServer) -> None:
    """However many ranges are refused at once, one token is asked for, with the repository's scope."""
    async with front(upstream, tokens.manners) as it, registry() as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        got = await asyncio.gather(*(repository.blob_range(BLOB_DIGEST, at, at + 10) for at in range(12)))
        assert got == [BLOB[at : at + 10] for at in range(12)]
        assert (await repository.manifest("one")).digest == image
    assert tokens.asked == [{"method": "GET", "service": "tests", "scope": "repository:team/app:pull"}]


async def test_revoked_token_is_replaced_once(upstream: str, image: Digest, tokens: TokenServer) -> None:
    """A token that the registry suddenly refuses is replaced by one new token, whatever the concurrency."""
    async with front(upstream, tokens.manners) as it, registry() as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        for expected in (1, 2, 3):
            await asyncio.gather(*(repository.blob_range(BLOB_DIGEST, at, at + 10) for at in range(8)))
            assert len(tokens.asked) == expected
            tokens.accepted = "another"


async def test_expired_token_is_renewed_without_a_refusal(upstream: str, image: Digest, tokens: TokenServer) -> None:
    """A token past its ``expires_in`` is not sent again: the next is asked for first."""
    tokens.expires_in = 1
    async with front(upstream, tokens.manners) as it, registry() as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        await repository.manifest("one")
        await asyncio.sleep(1.0)
        await repository.manifest("one")
        assert len(it.requests("GET", "/manifests/")) == 3  # one refusal in all
    assert len(tokens.asked) == 2


@pytest.mark.parametrize("knows_post", [True, False])
async def test_login_goes_to_the_token_server_alone(upstream: str, image: Digest, *, knows_post: bool) -> None:
    """A password reaches the token server, by POST or else by GET with Basic, and the registry sees only the token."""
    login = Login("ada", "s3cret:with colon")
    tokens = TokenServer(login, knows_post=knows_post)
    async with front(upstream, tokens.manners) as it, registry(credentials=FixedLogin(login)) as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        await repository.push_blob(f"pushed with a token, {knows_post}".encode())
        assert [asked["method"] for asked in tokens.asked][:2] == (["POST", "POST"] if knows_post else ["POST", "GET"])
        assert {asked["scope"] for asked in tokens.asked} == {
            "repository:team/app:pull",
            "repository:team/app:pull,push",
        }
        sent = {headers.get("authorization", "") for _, path, headers in it.seen if path.startswith("/v2/")}
        assert all(value == "" or value.startswith("Bearer ") for value in sent)


async def test_wrong_login_is_unauthorized(upstream: str, image: Digest) -> None:
    """Refused or missing credentials are `Unauthorized` at once, and no message holds the secret."""
    tokens = TokenServer(Login("ada", "right"))
    for credentials in (FixedLogin(Login("ada", "wr0ng")), NoCredentials()):
        async with front(upstream, tokens.manners) as it, registry(credentials=credentials) as client:
            tokens.address = it.address
            repository = client.repository(f"{it.address}/team/app")
            for asked in (repository.manifest("one"), repository.blob_range(BLOB_DIGEST, 0, 1)):
                with pytest.raises(Unauthorized) as caught:
                    await asked
                assert "wr0ng" not in str(caught.value)


async def test_refusal_is_shared(upstream: str, image: Digest) -> None:
    """Requests that wait for one token share its refusal: the token server is not asked again by each of them."""
    tokens = TokenServer(Login("ada", "right"))
    async with front(upstream, tokens.manners) as it, registry(credentials=FixedLogin(Login("ada", "wr0ng"))) as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        ranges = [repository.blob_range(BLOB_DIGEST, at, at + 1) for at in range(8)]
        got = await asyncio.gather(*ranges, return_exceptions=True)
    assert {type(one) for one in got} == {Unauthorized}
    assert [asked["method"] for asked in tokens.asked] == ["POST", "GET"]


async def test_basic_challenge(upstream: str, image: Digest) -> None:
    """A registry that wants Basic gets it after its challenge; a wrong password is `Unauthorized`."""
    wanted = "Basic " + base64.b64encode(b"ada:pw").decode()

    async def manners(request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") == wanted:
            return None
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="here"'})

    async with front(upstream, manners) as it:
        async with registry(credentials=FixedLogin(Login("ada", "pw"))) as client:
            assert (await client.repository(f"{it.address}/team/app").manifest("one")).digest == image
        assert "authorization" not in it.seen[0][2]
        async with registry(credentials=FixedLogin(Login("ada", "no"))) as client:
            with pytest.raises(Unauthorized, match="refuses the credentials"):
                await client.repository(f"{it.address}/team/app").manifest("one")


async def test_forbidden_once_then_challenged(upstream: str, image: Digest, tokens: TokenServer) -> None:
    """A range that is first forbidden and then challenged is served."""
    refused = False

    async def manners(request: web.Request) -> web.Response | None:
        nonlocal refused
        if not refused:
            refused = True
            return web.Response(status=403)
        return await tokens.manners(request)

    async with front(upstream, manners) as it, registry() as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]


async def test_token_server_that_fails_for_a_while(upstream: str, image: Digest, tokens: TokenServer) -> None:
    """A range outlives an outage of the token server within its deadline."""
    failures = 0

    async def manners(request: web.Request) -> web.Response | None:
        nonlocal failures
        if request.path == "/token" and failures < 8:
            failures += 1
            return web.Response(status=502)
        return await tokens.manners(request)

    async with front(upstream, manners) as it, registry() as client:
        tokens.address = it.address
        repository = client.repository(f"{it.address}/team/app")
        assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]


# --- redirects ------------------------------------------------------------------------------------------------------


class Redirecting:
    """A registry that keeps its blobs at a store of another origin, under URLs with signatures that expire."""

    def __init__(self, store: str) -> None:
        self.store = store
        self.signature = 1
        self.valid = 1

    async def at_registry(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") != "Basic YWRhOnB3":
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="here"'})
        if "/blobs/" in request.path:
            location = f"http://{self.store}{request.path}?X-Signature=secret{self.signature}"
            return web.Response(status=307, headers={"Location": location})
        return None

    def at_store(self, status: int, headers: dict[str, str], body: bytes) -> Manners:
        async def manners(request: web.Request) -> web.Response | None:
            if request.query.get("X-Signature") != f"secret{self.valid}":
                return web.Response(status=status, headers=headers, body=body)
            return None

        return manners


EXPIRED = b"<Error><Code>ExpiredToken</Code><Token-0>secret-of-s3</Token-0></Error>"


@BOTH_WIRES
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [(401, {}, b""), (403, {}, b""), (404, {}, b""), (400, {"Content-Type": "application/xml"}, EXPIRED)],
)
async def test_redirect_target_is_remembered_and_refreshed(
    upstream: str, image: Digest, status: int, headers: dict[str, str], body: bytes
) -> None:
    """The store gets no Authorization; its URL is used again until it is refused, then asked for anew, once."""
    redirecting = Redirecting("")
    async with (
        front(upstream, redirecting.at_store(status, headers, body)) as store,
        front(upstream, redirecting.at_registry) as it,
        registry(credentials=FixedLogin(Login("ada", "pw"))) as client,
    ):
        redirecting.store = store.address.replace("127.0.0.1", "localhost")
        repository = client.repository(f"{it.address}/team/app")
        for at in range(5):
            assert await repository.blob_range(BLOB_DIGEST, at, at + 10) == BLOB[at : at + 10]
        assert len(it.requests("GET", "/blobs/")) == 2  # the refusal, and the redirect
        redirecting.signature = redirecting.valid = 2
        assert await repository.blob_range(BLOB_DIGEST, 7, 17) == BLOB[7:17]
        assert len(it.requests("GET", "/blobs/")) == 3
        redirecting.valid = 3  # the registry goes on giving a signature that the store refuses
        with pytest.raises((Unauthorized, NotFound, RegistryUnavailable)) as caught:
            await repository.blob_range(BLOB_DIGEST, 7, 17)
        assert len(it.requests("GET", "/blobs/")) == 4
        assert "secret" not in str(caught.value)
        assert all("authorization" not in headers for _, _, headers in store.seen)
        redirecting.signature = 3
        assert await repository.blob_range(BLOB_DIGEST, 7, 17) == BLOB[7:17]
        async with aclosing(repository.blob_stream(BLOB_DIGEST)) as chunks:
            assert hashlib.sha256(b"".join([chunk async for chunk in chunks])).hexdigest() == BLOB_DIGEST[7:]


@pytest.mark.parametrize("status", [401, 403])
async def test_many_ranges_ask_for_one_new_target(upstream: str, image: Digest, status: int) -> None:
    """When a signature runs out under many ranges at once, one of them asks the registry for the new one."""
    redirecting = Redirecting("")
    async with (
        front(upstream, redirecting.at_store(status, {}, b"")) as store,
        front(upstream, redirecting.at_registry) as it,
        registry(replace(SETTINGS, connections_per_host=40), FixedLogin(Login("ada", "pw"))) as client,
    ):
        redirecting.store = store.address.replace("127.0.0.1", "localhost")
        repository = client.repository(f"{it.address}/team/app")
        assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
        before = len(it.requests("GET", "/blobs/"))
        for _ in range(3):
            redirecting.signature = redirecting.valid = redirecting.valid + 1
            got = await asyncio.gather(*(repository.blob_range(BLOB_DIGEST, at, at + 10) for at in range(20)))
            assert got == [BLOB[at : at + 10] for at in range(20)]
        assert len(it.requests("GET", "/blobs/")) == before + 3


async def test_a_target_that_says_its_end_is_replaced_before_it(upstream: str, image: Digest) -> None:
    """A signature that tells its lifetime is not used beyond it: the store never refuses."""
    redirecting = Redirecting("")

    async def at_registry(request: web.Request) -> web.Response | None:
        found = await redirecting.at_registry(request)
        if found is not None and "Location" in found.headers:
            found.headers["Location"] += "&X-Amz-Expires=1"
        return found

    async with (
        front(upstream, redirecting.at_store(403, {}, b"")) as store,
        front(upstream, at_registry) as it,
        registry(credentials=FixedLogin(Login("ada", "pw"))) as client,
    ):
        redirecting.store = store.address
        repository = client.repository(f"{it.address}/team/app")
        for at in range(3):
            assert await repository.blob_range(BLOB_DIGEST, at, at + 10) == BLOB[at : at + 10]
        assert (len(it.requests("GET", "/blobs/")), len(store.seen)) == (2, 3)
        await asyncio.sleep(1)
        redirecting.signature = redirecting.valid = 2
        assert await repository.blob_range(BLOB_DIGEST, 7, 17) == BLOB[7:17]
        assert (len(it.requests("GET", "/blobs/")), len(store.seen)) == (3, 4)


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/?token=secret",
        "http://[fe80::1]/x",
        "http://[::ffff:169.254.169.254]/x",
        "http://user:secret@localhost/x",
        "gopher://localhost/",
        "http://local host/",
        "",
    ],
)
async def test_dangerous_redirects_are_refused(upstream: str, image: Digest, location: str) -> None:
    """No redirect leads to files, link-local addresses or other schemes; it fails at once, without its secrets."""

    async def manners(_request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": location})

    async with front(upstream, manners) as it, registry() as client:
        repository = client.repository(f"{it.address}/team/app")
        for asked in (repository.blob_range(BLOB_DIGEST, 0, 1), repository.manifest("one")):
            with pytest.raises(RegistryUnavailable, match="redirect") as caught:
                await asked
            assert "secret" not in str(caught.value)
        assert len(it.seen) == 2


async def test_redirect_loop_ends(upstream: str, image: Digest) -> None:
    """A loop of redirects is `RegistryUnavailable` after ten hops, shown without its query's values."""

    async def manners(_request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "?again=secret"})

    async with front(upstream, manners) as it, registry() as client:
        with pytest.raises(RegistryUnavailable, match=r"more than 10 redirects.*\?again=redacted"):
            await client.repository(f"{it.address}/team/app").blob_range(BLOB_DIGEST, 0, 1)
        assert len(it.seen) == 11


async def test_upload_to_another_host_gets_no_authorization(upstream: str, image: Digest) -> None:
    """An upload's Location at another origin receives the bytes, but not the registry's credentials."""
    received: list[tuple[str | None, bytes]] = []

    async def at_store(request: web.Request) -> web.Response:
        received.append((request.headers.get("Authorization"), await request.read()))
        return web.Response(status=201)

    async with front(upstream, at_store) as store:

        async def at_registry(request: web.Request) -> web.Response | None:
            if request.headers.get("Authorization") != "Basic YWRhOnB3":
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="here"'})
            if request.method == "POST":
                return web.Response(status=202, headers={"Location": f"http://{store.address}/up?x=1"})
            return None

        async with front(upstream, at_registry) as it, registry(credentials=FixedLogin(Login("ada", "pw"))) as client:
            assert await client.repository(f"{it.address}/team/app").push_blob(b"elsewhere") is True
    assert received == [(None, b"elsewhere")]


async def test_manifest_by_tag_is_checked_against_the_registrys_own_digest(upstream: str, image: Digest) -> None:
    """A manifest whose bytes are not what Docker-Content-Digest says is `Mismatch`."""

    async def manners(_request: web.Request) -> web.Response:
        headers = {"Docker-Content-Digest": ABSENT, "Content-Type": OCI_MANIFEST}
        return web.Response(body=json.dumps({}).encode(), headers=headers)

    async with front(upstream, manners) as it, registry() as client:
        with pytest.raises(Mismatch):
            await client.repository(f"{it.address}/team/app").manifest("one")


# --- strange servers ------------------------------------------------------------------------------------------------


@BOTH_WIRES
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 206 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxxxx",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        b"HTTP/1.1 206 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nxxxx",
        b"HTTP/1.1 307 Go\r\nLocation: \xff\xfe\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 307 Go\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 307 Go\r\nLocation: http://0xa9fea9fe/\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="\xff"\r\nContent-Length: 0\r\n\r\n',
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_strange_answers_are_errors_of_ours(answer: bytes) -> None:
    """Whatever a server says, callers see an error of the tree, never one of an HTTP client."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    settings = replace(SETTINGS, tries=2, bad_answer_tries=2, range_tries=2, range_bad_answer_tries=2)
    async with server, registry(settings) as it:
        repository = it.repository(f"127.0.0.1:{server.sockets[0].getsockname()[1]}/team/app")
        for asked in (
            repository.manifest(ABSENT),
            repository.blob_range(BLOB_DIGEST, 0, 10),
            repository.blob(BLOB_DIGEST, limit=1000),
            anext(repository.blob_stream(BLOB_DIGEST)),
            repository.referrers(ABSENT, V1_INDEX),
            repository.push_blob(b"x"),
        ):
            with pytest.raises(SociError):
                await asked


@BOTH_WIRES
async def test_loopback_needs_no_proxy(upstream: str, image: Digest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's proxy is not asked for this machine's own registries."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with registry(replace(SETTINGS, use_environment_proxies=True)) as it:
        repository = it.repository(f"{upstream}/team/app")
        assert (await repository.manifest("one")).digest == image
        assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]


@BOTH_WIRES
async def test_environment_proxy_is_used(upstream: str, image: Digest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry elsewhere is reached through the environment's proxy, by both clients."""

    async def manners(request: web.Request) -> web.Response | None:
        return web.Response(status=404, text=str(request.url))

    async with front(upstream, manners) as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        settings = replace(SETTINGS, use_environment_proxies=True, plain_http=frozenset({"reg.invalid"}))
        async with registry(settings) as it:
            repository = it.repository("reg.invalid/team/app")
            with pytest.raises(NotFound):
                await repository.manifest("one")
            with pytest.raises(NotFound):
                await repository.blob_range(BLOB_DIGEST, 0, 10)
        assert len(proxy.seen) == 2


async def test_head_refused_by_the_store_is_asked_by_range(upstream: str, image: Digest) -> None:
    """A size is found although HEAD is refused by a URL signed for GET, or unknown to the server."""
    for status in (403, 405):

        async def manners(request: web.Request, status: int = status) -> web.Response | None:
            return web.Response(status=status) if request.method == "HEAD" else None

        async with front(upstream, manners) as it, registry() as client:
            repository = client.repository(f"{it.address}/team/app")
            assert await repository.blob_exists(BLOB_DIGEST) == len(BLOB)


async def test_store_that_fails_is_replaced(upstream: str, image: Digest) -> None:
    """A remembered redirect target that keeps failing is given up for a new one from the registry."""
    stores: list[str] = []

    async def broken(_request: web.Request) -> web.Response | None:
        return web.Response(status=500) if len(stores) > 1 else None

    async def sound(_request: web.Request) -> None:
        return None

    async with front(upstream, broken) as first, front(upstream, sound) as second:
        stores.append(first.address)

        async def at_registry(request: web.Request) -> web.Response:
            return web.Response(status=307, headers={"Location": f"http://{stores[-1]}{request.path}"})

        async with front(upstream, at_registry) as it, registry() as client:
            repository = client.repository(f"{it.address}/team/app")
            assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
            stores.append(second.address)
            assert await repository.blob_range(BLOB_DIGEST, 0, 10) == BLOB[:10]
            assert len(it.seen) == 2


@BOTH_WIRES
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_certificates_are_checked(tmp_path: Path) -> None:
    """An unknown certificate is refused at the first try by both clients; the configured authority is trusted."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    new_key = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = ["openssl", "req", *new_key, *subject, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def manners(request: web.Request) -> web.Response:
        if "Range" in request.headers:
            return web.Response(status=206, headers={"Content-Range": "bytes 0-0/9"}, body=b"x")
        return web.Response(body=b"{}")

    async with front("", manners, tls=tls) as it:
        place = Place("reg.example", f"https://{it.address.replace('127.0.0.1', 'localhost')}", "team/app")
        async with registry() as client:
            repository = Repository(Route.only(place), client._mirrors)
            for asked in (repository.manifest("one"), repository.blob_range(BLOB_DIGEST, 0, 1)):
                with pytest.raises(RegistryUnavailable, match=r"certificate is not trusted$"):
                    await asked
        assert it.seen == []
        async with registry(replace(SETTINGS, ca_file=str(certificate))) as client:
            repository = Repository(Route.only(place), client._mirrors)
            assert (await repository.manifest("one")).content == b"{}"
            assert await repository.blob_range(BLOB_DIGEST, 0, 1) == b"x"
    with pytest.raises(InvalidConfig, match=r"key\.pem"):
        registry(replace(SETTINGS, ca_file=str(key)))
