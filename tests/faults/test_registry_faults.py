# SPDX-License-Identifier: Apache-2.0
"""Every way in which a registry goes wrong, under plain reads: right bytes late, or EIO; nothing wrong is ever kept.

A fault that passes is not seen by the reader. One that lasts ends the read at its deadline, leaves no wrong span behind
and is not remembered: with the fault gone the same file reads right, and so does all the rest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from soci_dev.faults import (
    Corrupt,
    Delay,
    Drop,
    Endless,
    Fault,
    Hook,
    IgnoreRange,
    Raw,
    Seen,
    ShiftRange,
    Short,
    Slow,
    Stall,
    Status,
    first,
)
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import pulls
from support.pulls import Node, Pushed, fails, read, read_tree

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SOON_S = 4.0
"""The deadline of a read that is to fail."""
LATE_S = 40.0
"""The deadline of a read that is to succeed, on a busy machine too."""
SEEN_S = 20.0
PASSING = 2
"""Answers that a passing fault spoils."""
READ_PATH = ("mounter", "fetcher-1")
SLOW_RATE = 4096
"""Bytes a second: a span would take half a minute."""
MEMORY_BYTES = 160 << 20
"""More than the runs in flight and the buffers of their connections; far less than an endless answer brings."""
FAULTS: dict[str, Fault] = {
    "429 with Retry-After": Status(429, {"Retry-After": "1"}),
    "429 without": Status(429, body=b'{"errors":[{"code":"TOOMANYREQUESTS"}]}'),
    "500": Status(500, body=b"<html>oops</html>"),
    "503 with a Retry-After that is none": Status(503, {"Retry-After": "soon"}),
    "slow": Slow(SLOW_RATE),
    "silent": Delay(30.0),
    "stalled mid-body": Stall(30.0, keep=1000),
    "short body": Short(1000),
    "corrupted body": Corrupt(500),
    "wrong Content-Range": ShiftRange(),
    "redirect loop": Status(307, {"Location": "?again"}),
    "connection closed": Drop(),
    "reset mid-header": Raw(b"HTTP/1.1 206 Partial Content\r\nContent-Ra", reset=True),
    "garbage": Raw(bytes(range(256)) * 64),
    "headers without end": Raw(b"HTTP/1.1 206 Partial Content\r\n" + b"X-Filler: nothing\r\n" * 100_000),
    "body without end": Endless(),
}
"""Each of them spoils one answer, or all."""
TOO_LONG = "body without end"
"""Of a manifest it is refused at once, by the limit on its size: containerd pulls such an image."""


@pytest.fixture(scope="module")
def patient(make_stack: Callable[..., Stack]) -> Node:
    """A node whose reads wait."""
    return pulls.node(make_stack, LATE_S)


@pytest.fixture(scope="module")
def hasty(make_stack: Callable[..., Stack]) -> Node:
    """A node whose reads give up soon."""
    return pulls.node(make_stack, SOON_S)


@contextmanager
def spoiled(node: Node, folder: Path, hook_of: Callable[[Pushed], Hook]) -> Iterator[tuple[Proxy, Pushed, Path]]:
    """A lazy image whose layer comes from a registry with this hook; its ``data`` folder.

    Whatever was done to it: afterwards, without the hook, everything reads right, all that the cache has is right, and
    no process has ended or grown without bound.
    """
    before = {name: node.forget_peak(name) for name in READ_PATH}
    with Proxy(node.stack.registry) as proxy:
        pushed = pulls.push(proxy.upstream, folder)
        layer_hook = hook_of(pushed)
        proxy.hook = lambda seen: layer_hook(seen) if seen.is_blob and pushed.layer in seen.path else None
        chain = node.pull(proxy.address, pushed)
        with node.rootfs(chain) as data:
            yield proxy, pushed, data
            node.here()
            proxy.hook = None
            assert read_tree(data) == pushed.files
            assert len(node.here()[pushed.layer]) > 0
    node.alive()
    grown = {name: node.read_peak(name) - before[name] for name in READ_PATH}
    assert max(grown.values()) < MEMORY_BYTES, grown


class Spoiling:
    """Counts what a hook spoiled."""

    def __init__(self, hook: Hook) -> None:
        self.count = 0
        self.seen = threading.Event()
        self._hook = hook

    def __call__(self, seen: Seen) -> Fault | None:
        fault = self._hook(seen)
        if fault is not None:
            self.count += 1
            self.seen.set()
        return fault


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_costs_time_alone(patient: Node, tmp_path: Path, name: str) -> None:
    """The reader gets the right bytes from the answers behind the spoiled ones."""
    hook = Spoiling(first(PASSING, FAULTS[name]))
    with spoiled(patient, tmp_path, lambda _: hook) as (_, pushed, data):
        assert read(data, 0) == pushed.files[0]
    assert hook.count == PASSING


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - {TOO_LONG}))
def test_a_pull_outlasts_a_fault_that_passes(patient: Node, tmp_path: Path, name: str) -> None:
    """Whatever the first answers for manifests, index and table of contents are, the image comes lazily, and right."""
    with Proxy(patient.stack.registry) as proxy:
        pushed = pulls.push(proxy.upstream, tmp_path, files=1)
        proxy.hook = first(PASSING, FAULTS[name], blobs_only=False)
        with patient.rootfs(patient.pull(proxy.address, pushed)) as data:
            assert read_tree(data) == pushed.files
    patient.alive()


def test_faults_that_last_are_errors_and_are_not_remembered(hasty: Node, tmp_path: Path) -> None:
    """Reads from registries each with a fault of its own end with EIO, and with the faults gone they end well."""
    with ExitStack() as images, ThreadPoolExecutor(len(FAULTS)) as readers:

        def open_one(name: str) -> tuple[Spoiling, Proxy, Pushed, Path]:
            hook = Spoiling(lambda _: FAULTS[name])
            return hook, *images.enter_context(spoiled(hasty, tmp_path / str(list(FAULTS).index(name)), lambda _: hook))

        opened = {name: open_one(name) for name in FAULTS}
        failed = readers.map(lambda one: fails(one[-1], 1), opened.values())
        assert dict(zip(FAULTS, failed, strict=True)) == dict.fromkeys(FAULTS, True)
        assert all(hook.count > 0 for hook, *_ in opened.values())
        hasty.here()
        for _, proxy, *_ in opened.values():
            proxy.hook = None
        found = readers.map(lambda one: read(one[-1], 1) == one[-2].files[1], opened.values())
        assert dict(zip(FAULTS, found, strict=True)) == dict.fromkeys(FAULTS, True)


def test_a_registry_that_stalls_does_not_hold_up_another(patient: Node, tmp_path: Path) -> None:
    """While many reads wait for a registry that says nothing, those from a sound one are served."""
    stalled = Spoiling(lambda _: Stall(LATE_S, keep=1000))
    with (
        spoiled(patient, tmp_path / "stalled", lambda _: stalled) as (proxy, pushed, data),
        spoiled(patient, tmp_path / "sound", lambda _: lambda _: None) as (_, sound, sound_data),
        ThreadPoolExecutor(pulls.FILES) as readers,
    ):
        waiting = [readers.submit(read, data, number) for number in range(pulls.FILES)]
        assert stalled.seen.wait(SEEN_S)
        assert read_tree(sound_data) == sound.files
        assert not any(one.done() for one in waiting)
        proxy.hook = None
        assert tuple(one.result() for one in waiting) == pushed.files


def test_a_registry_without_ranges_is_read_all_the_same(patient: Node, tmp_path: Path) -> None:
    """200 with the whole blob in place of a range costs bytes, and nothing else."""
    with spoiled(patient, tmp_path, lambda _: lambda _: IgnoreRange()) as (_, pushed, data):
        assert read_tree(data) == pushed.files


class Tokens:
    """A registry with bearer tokens, each good for a few requests; its token server is the same host."""

    USES = 2
    PATH = "/token"

    def __init__(self) -> None:
        self.given = 0
        self._left: dict[str, int] = {}

    def hook(self, seen: Seen) -> Status | None:
        """Give a token, take one, or refuse."""
        if seen.path == self.PATH:
            self.given += 1
            token = f"token-{self.given}"
            self._left[token] = self.USES
            return Status(200, {"Content-Type": "application/json"}, json.dumps({"token": token}).encode())
        token = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if self._left.get(token, 0) > 0:
            self._left[token] -= 1
            return None
        realm = f"http://{seen.headers['host']}{self.PATH}"
        return Status(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="test"'})


def test_tokens_that_expire_under_reads_are_renewed(patient: Node, tmp_path: Path) -> None:
    """A 401 in the midst of reads is answered by a new token; the reader sees nothing of it."""
    tokens = Tokens()
    with spoiled(patient, tmp_path, lambda _: lambda _: None) as (proxy, pushed, data):
        proxy.hook = tokens.hook
        for number, right in enumerate(pushed.files):
            assert read(data, number) == right
    assert tokens.given > 1


def test_signed_addresses_that_expire_under_reads_are_asked_for_anew(patient: Node, tmp_path: Path) -> None:
    """A store that answers 403 to an address it took before sends the fetcher back to the registry for another one."""
    signatures = itertools.count()
    uses: dict[str, int] = {}
    refused = 0

    def store_hook(seen: Seen) -> Status | None:
        nonlocal refused
        uses[seen.query] = uses.get(seen.query, 0) + 1
        if uses[seen.query] <= 1:
            return None
        refused += 1
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
        return Status(403, {"Content-Type": "application/xml"}, body)

    with Proxy(patient.stack.registry, hook=store_hook) as store:

        def redirect(seen: Seen) -> Status:
            return Status(307, {"Location": f"http://{store.address}{seen.path}?signature={next(signatures)}"})

        with spoiled(patient, tmp_path, lambda _: redirect) as (_, pushed, data):
            for number, right in enumerate(pushed.files):
                assert read(data, number) == right
    assert refused > 0


def test_reads_outlast_a_registry_that_is_away(patient: Node, tmp_path: Path) -> None:
    """Reads that began while nothing listens on the registry's port end well once it is back, and not before."""
    stack = patient.stack
    pushed = pulls.push(stack.registry, tmp_path)
    chain = patient.pull(stack.registry, pushed)
    with patient.rootfs(chain) as data, ThreadPoolExecutor(pulls.READERS) as readers:
        stack.stop("registry")
        try:
            late = [readers.submit(read, data, number) for number in range(pulls.READERS)]
            assert not any(one.done() for one in late)
        finally:
            stack.start("registry")
        for number, one in enumerate(late):
            assert hashlib.sha256(one.result()).digest() == hashlib.sha256(pushed.files[number]).digest()
        assert read_tree(data) == pushed.files
    patient.here()
    patient.alive()
