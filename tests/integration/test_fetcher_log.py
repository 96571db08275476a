# SPDX-License-Identifier: Apache-2.0
"""What a fetcher's log says of requests: the reference's rows, at debug, and never a secret."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from soci.digest import sha256_digest
from soci_fetcher.access import tell
from soci_registry import FixedLogin, Login, Registry, RegistrySettings
from soci_runtime.logs import configure_logs
from support.registry import front

SETTINGS = RegistrySettings(use_environment_proxies=False, min_wait=0.01, range_min_wait=0.01)
BLOB = b"0123456789"
SECRET = "Zm9vYmFyc2VjcmV0"


@pytest.mark.parametrize("level", ["debug", "info"])
async def test_challenges_and_retries(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A challenge and a failure that is tried again are a line each at debug, with the request; above it neither."""
    asked = 0

    async def manners(request: web.Request) -> web.Response:
        nonlocal asked
        if "Authorization" not in request.headers:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})
        asked += 1
        if asked == 1:
            return web.Response(status=503)
        return web.Response(status=206, headers={"Content-Range": f"bytes 2-4/{len(BLOB)}"}, body=BLOB[2:5])

    configure_logs(level, "test")
    login = FixedLogin(Login("user", SECRET))
    async with (
        front("", manners) as it,
        Registry(settings=SETTINGS, credentials=login, tell=tell) as registry,
    ):
        repository = registry.repository(f"{it.address}/team/app")
        assert await repository.blob_range(sha256_digest(BLOB), 2, 5) == BLOB[2:5]
    out = capsys.readouterr().out
    told = [json.loads(line) for line in out.splitlines()]
    assert SECRET not in out
    if level == "info":
        assert told == []
        return
    assert [(one["level"], one["msg"]) for one in told] == [
        ("debug", "Received status code: 401"),
        ("debug", "retrying request"),
    ]
    assert all("team/app" in one["request"] for one in told)
    assert (told[1]["tried"], told[1]["why"]) == (1, "status 503")
