# SPDX-License-Identifier: Apache-2.0
"""Referrers and small answers of libs/registry, over a transport that is a function."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from soci.digest import Digest
from soci.errors import InvalidManifest, LimitExceeded, Mismatch, NotFound, RegistryUnavailable, Unauthorized
from soci.oci import OCI_INDEX, OCI_MANIFEST
from soci_registry import MANIFEST_BYTES_MAX, FixedLogin, Login, NoCredentials, Registry, RegistrySettings, Repository
from soci_registry.referrers import PAGES_MAX, fallback_tag

SETTINGS = RegistrySettings(min_wait=0.0, max_wait=0.0)
SUBJECT = Digest("sha256:" + "3" * 64)
KIND = "application/vnd.amazon.soci.index.v1+json"
Handler = Callable[[httpx.Request], httpx.Response]


class Answering(httpx.AsyncBaseTransport):
    """A transport that is a function, whose answers are streams as those of the network are."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.handler(request)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=answer.stream)


def entry(number: int, kind: str | None = KIND) -> dict[str, Any]:
    found: dict[str, Any] = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{number:064x}", "size": number}
    return found | ({"artifactType": kind} if kind else {})


def page(*entries: dict[str, Any], link: str | None = None, kind: str = OCI_INDEX) -> httpx.Response:
    headers = {"Content-Type": kind} | ({"Link": link} if link else {})
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries)}
    return httpx.Response(200, headers=headers, content=json.dumps(body).encode())


async def asked(handler: Handler, use: Callable[[Repository], Any], **login: Any) -> Any:
    credentials = FixedLogin(Login("ada", "hunter2")) if login else NoCredentials()
    async with Registry(settings=SETTINGS, credentials=credentials, small_transport=Answering(handler)) as registry:
        return await use(registry.repository("reg.example/team/app"))


async def sizes(handler: Handler) -> list[int]:
    found = await asked(handler, lambda repository: repository.referrers(SUBJECT, KIND))
    return [one.size for one in found]


async def test_filter_is_asked_for_and_not_trusted() -> None:
    """The artifact type is sent, quoted, and entries of other types are dropped whatever the registry claims."""
    urls: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        answer = page(entry(1), entry(2, "application/other"), entry(3, None), entry(4))
        answer.headers["OCI-Filters-Applied"] = "artifactType"
        return answer

    assert await sizes(handler) == [1, 4]
    kind = "application%2Fvnd.amazon.soci.index.v1%2Bjson"
    assert urls == [f"https://reg.example/v2/team/app/referrers/{SUBJECT}?artifactType={kind}"]


async def test_pages_are_followed() -> None:
    """Pages are read to the last one, over relative and absolute links."""
    pages = {
        None: page(entry(1), link='</v2/team/app/referrers/x?page=2>; rel="next"'),
        "2": page(link='<https://reg.example/v2/team/app/referrers/x?page=3>; rel="next"'),
        "3": page(entry(3)),
    }
    assert await sizes(lambda request: pages[request.url.params.get("page")]) == [1, 3]


@pytest.mark.parametrize(
    "link", ["https://evil.example/x", "http://reg.example/x", "file:///x", "https://reg.example:1/"]
)
async def test_pages_elsewhere_are_refused(link: str) -> None:
    """A next page at another origin is refused before anything is sent there."""

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "reg.example"
        return page(entry(1), link=f'<{link}>; rel="next"')

    with pytest.raises(RegistryUnavailable, match="next page"):
        await sizes(handler)


async def test_pages_without_end_are_refused() -> None:
    """A registry that always names a next page is given up after `PAGES_MAX`."""
    count = 0

    def handler(_request: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        return page(link="<?again>; rel=next")

    with pytest.raises(LimitExceeded):
        await sizes(handler)
    assert count == PAGES_MAX


@pytest.mark.parametrize("answer", [httpx.Response(404), page(entry(9), kind="text/html")])
async def test_fallback_tag(answer: httpx.Response) -> None:
    """No API (404, or no image index) means the list under the tag ``sha256-<hex>``."""

    def handler(request: httpx.Request) -> httpx.Response:
        if "/referrers/" in request.url.path:
            return answer
        assert request.url.path.endswith("/manifests/sha256-" + "3" * 64)
        return page(entry(1), entry(2, "application/other"))

    assert await sizes(handler) == [1]


async def test_no_fallback_tag_is_an_empty_list() -> None:
    """Neither the API nor the tag: nothing refers to the manifest."""
    assert await sizes(lambda _request: httpx.Response(404)) == []


async def test_a_failing_registry_is_not_an_empty_list() -> None:
    """Errors are errors, never an empty list; so is an index that does not parse."""
    with pytest.raises(RegistryUnavailable, match="9 tries"):
        await sizes(lambda _request: httpx.Response(503))
    with pytest.raises(Unauthorized):
        await sizes(lambda _request: httpx.Response(403))
    with pytest.raises(InvalidManifest):
        await sizes(lambda _request: httpx.Response(200, headers={"Content-Type": OCI_INDEX}, content=b"{"))


def test_fallback_tags_are_tags() -> None:
    """A tag is the digest with a dash, of at most 128 characters."""
    assert fallback_tag(SUBJECT) == "sha256-" + "3" * 64
    assert len(fallback_tag(Digest("sha512:" + "3" * 128))) == 128


async def test_manifests_are_bounded() -> None:
    """A manifest above its limit is refused, with and without a Content-Length."""
    for content in (b"x" * (MANIFEST_BYTES_MAX + 1), _endless()):
        answer = httpx.Response(200, content=content)
        with pytest.raises(LimitExceeded):
            await asked(_always(answer), lambda repository: repository.manifest("t"))


def _always(answer: httpx.Response) -> Handler:
    return lambda _request: answer


async def _endless() -> Any:
    while True:
        yield b"x" * 65536


async def test_encoded_manifests_are_refused() -> None:
    """A body in an encoding that nobody asked for is refused: it could inflate to anything."""

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        return httpx.Response(200, headers={"Content-Encoding": "br"}, content=b"x")

    with pytest.raises(RegistryUnavailable, match="encoded"):
        await asked(handler, lambda repository: repository.manifest("t"))


async def test_manifest_by_digest_is_checked() -> None:
    """Other bytes than the digest promises are `Mismatch`, whatever headers say."""
    with pytest.raises(Mismatch):
        await asked(
            lambda _request: httpx.Response(200, headers={"Docker-Content-Digest": SUBJECT}, content=b"{}"),
            lambda repository: repository.manifest(SUBJECT),
        )


async def test_redirect_downgrade_loses_authorization() -> None:
    """Authorization goes to the registry's origin only: not to another host, port or scheme of it."""
    seen: list[tuple[str, bool]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append((f"{request.url.scheme}://{request.url.netloc.decode()}", "authorization" in request.headers))
        targets = {
            "https://reg.example": "http://reg.example/x",
            "http://reg.example": "https://reg.example:8443/x",
            "https://reg.example:8443": "https://127.0.0.1/x",
        }
        if seen[-1] == ("https://reg.example", False):
            return httpx.Response(401, headers={"WWW-Authenticate": "Basic realm=x"})
        target = targets.get(seen[-1][0])
        return httpx.Response(302, headers={"Location": target}) if target else httpx.Response(404)

    with pytest.raises(NotFound):
        await asked(handler, lambda repository: repository.manifest("t"), login=True)
    assert seen[:5] == [
        ("https://reg.example", False),
        ("https://reg.example", True),
        ("http://reg.example", False),
        ("https://reg.example:8443", False),
        ("https://127.0.0.1", False),
    ]
    assert all(origin == "https://reg.example" for origin, authorized in seen if authorized)


@pytest.mark.parametrize("realm", ["http://auth.example/", "http://169.254.169.254/token", "file:///token", "//[x/"])
async def test_secrets_never_go_to_a_strange_token_server(realm: str) -> None:
    """A realm without TLS, link-local or unreadable gets nothing, least of all a password."""
    hosts: set[str] = set()

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.add(request.url.host)
        return httpx.Response(401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})

    with pytest.raises((Unauthorized, RegistryUnavailable)):
        await asked(handler, lambda repository: repository.manifest("t"), login=True)
    assert hosts == {"reg.example"}


async def test_no_secret_in_logs(caplog: pytest.LogCaptureFixture) -> None:
    """The HTTP client logs no URL: queries hold signatures and tokens."""
    caplog.set_level(logging.INFO)

    def handler(request: httpx.Request) -> httpx.Response:
        if "sig" in request.url.params:
            return httpx.Response(200, content=b"{}")
        return httpx.Response(307, headers={"Location": "?sig=hunter2"})

    await asked(handler, lambda repository: repository.manifest("t"))
    assert "hunter2" not in caplog.text


async def test_ecr_expiry_is_answered_like_a_challenge() -> None:
    """ECR's 403 "token has expired", without a challenge, is answered with the configured login."""
    expired = b'{"errors":[{"message":"Your authorization token has expired. Reauthenticate and try again."}]}'

    def handler(request: httpx.Request) -> httpx.Response:
        return (
            httpx.Response(200, content=b"{}")
            if "authorization" in request.headers
            else httpx.Response(403, content=expired)
        )

    assert (await asked(handler, lambda repository: repository.manifest("t"), login=True)).content == b"{}"
