# SPDX-License-Identifier: Apache-2.0
"""Logins from a cluster's image pull secrets, followed as they change.

List, then watch from the version of the list, with bookmarks: a new secret counts within a second, and a thousand
nodes cost the API server a silent connection each, where lists repeated every minute would cost it a thousand full
lists. What a watch can get wrong is bounded: it is begun anew every few minutes, an outdated version leads to a new
list, and after `Times.list_again` everything is listed again whatever the watch said.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

from soci.errors import SociError, Unavailable
from soci_registry.credentials import NONE_REFUSED, Login, Refused
from soci_registry.health import Tell, silent
from soci_registry.kube_api import PAGES_MAX, TAKEN, GoneError, KubeApi, connected
from soci_registry.kube_login import Name, SecretBook, parse_secret
from soci_registry.kubeconfig import Cluster, in_cluster, kubeconfig_path, read_kubeconfig

SHORT_WATCH = 10
"""A watch that ends within so many times the pause that would follow is one that the server does not mean to keep."""

BAD_SECRETS_REMEMBERED = 1024
"""Bad secrets that are not told of again."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    first_list: float = 5.0
    """How long a question waits for the first list after the start."""
    kubeconfig_poll: float = 10.0
    """How often a kubeconfig that is not there yet is looked for: the node may still be joining its cluster."""
    retry_min: float = 1.0
    retry_max: float = 60.0
    list_again: float = 3600.0


class KubeSecrets:
    """A source of logins (`soci_registry.Credentials`), and an async context manager: it owns the task that follows.

    While the API server is away, what was learned before holds; `Unavailable` where nothing was learned yet.
    """

    def __init__(
        self,
        kubeconfig: str = "",
        *,
        tell: Tell = silent,
        environment: Mapping[str, str] | None = None,
        times: Times | None = None,
    ) -> None:
        self._kubeconfig = kubeconfig
        self._tell = tell
        self._environment = os.environ if environment is None else environment
        self._times = times or Times()
        self._book: SecretBook | None = None
        self._version = ""
        self._listed = 0.0
        self._failure: SociError | None = None
        self._settled = asyncio.Event()
        self._bad: dict[Name, str] = {}
        self._group = asyncio.TaskGroup()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._task = self._group.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
        await self._group.__aexit__(None, None, None)

    async def find(self, registry: str, repository: str, refused: Refused = NONE_REFUSED) -> Login | None:
        """The login of the secret that fits the repository best. No kubeconfig yet: no login."""
        if not self._settled.is_set():
            try:
                async with asyncio.timeout(self._times.first_list):
                    await self._settled.wait()
            except TimeoutError:
                raise Unavailable(f"the cluster's secrets were not listed in {self._times.first_list:g} s") from None
        if self._book is not None:
            return self._book.find(registry, repository, refused)
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure
        return None

    # --- following

    async def _follow(self) -> None:
        pause = self._times.retry_min
        waiting = False
        while True:
            try:
                cluster = await asyncio.to_thread(self._cluster)
                if cluster is None:
                    if not waiting:
                        self._tell("kubeconfig awaited", path=str(self._path()))
                    waiting = True
                    self._settled.set()
                    await asyncio.sleep(self._times.kubeconfig_poll)
                    continue
                waiting = False
                begun = asyncio.get_running_loop().time()
                async with connected(cluster) as api:
                    await self._round(api)
                if asyncio.get_running_loop().time() - begun > pause * SHORT_WATCH:
                    pause = self._times.retry_min
                    continue
                # A server that ends each watch at once must not be asked without a rest.
                await asyncio.sleep(pause)
                pause = min(pause * 2, self._times.retry_max)
            except (SociError, OSError) as error:
                self._failed(error if isinstance(error, SociError) else Unavailable(f"kubeconfig: {error.strerror}"))
                # The dice need no secrecy: jitter only keeps nodes from marching in step.
                await asyncio.sleep(pause * (1 + random.random()))  # noqa: S311
                pause = min(pause * 2, self._times.retry_max)

    def _path(self) -> object:
        return kubeconfig_path(self._kubeconfig, self._environment)

    def _cluster(self) -> Cluster | None:
        try:
            return read_kubeconfig(kubeconfig_path(self._kubeconfig, self._environment))
        except FileNotFoundError:
            return in_cluster(self._environment)

    def _failed(self, error: SociError) -> None:
        if self._failure is None:
            self._tell("cluster's secrets away", error=str(error), known=len(self._book or ()))
        self._failure = error
        self._settled.set()

    def _succeeded(self) -> None:
        if self._failure is not None or not self._settled.is_set():
            self._tell("cluster's secrets followed", secrets=len(self._book or ()))
        self._failure = None
        self._settled.set()

    async def _round(self, api: KubeApi) -> None:
        """One connection's worth: a list where one is due, then one watch."""
        now = asyncio.get_running_loop().time()
        if not self._version or now - self._listed > self._times.list_again:
            await self._list(api)
            self._succeeded()
        try:
            async with aclosing(api.watch(self._version)) as changes:
                async for change in changes:
                    if change.kind == TAKEN:
                        self._succeeded()
                    self._take(change.kind, change.secret)
        except GoneError:
            self._version = ""

    async def _list(self, api: KubeApi) -> None:
        book = SecretBook()
        following = version = ""
        for _ in range(PAGES_MAX):
            try:
                page = await api.page(following)
            except GoneError:  # the list's first pages are too old by now
                raise Unavailable("the list of secrets was outdated before its end") from None
            version = page.version
            for secret in page.secrets:
                self._put(book, secret)
            following = page.following
            if not following:
                break
        else:
            raise Unavailable(f"a list of secrets with more than {PAGES_MAX} pages")
        self._book, self._version = book, version
        self._listed = asyncio.get_running_loop().time()

    def _take(self, kind: str, secret: Mapping[str, object]) -> None:
        meta = secret.get("metadata")
        if not isinstance(meta, dict) or self._book is None:
            return
        if kind in {"ADDED", "MODIFIED"}:
            self._put(self._book, secret)
        elif kind == "DELETED":
            self._book.remove((str(meta.get("namespace")), str(meta.get("name"))))
        if kind and isinstance(version := meta.get("resourceVersion"), str) and version:
            self._version = version

    def _put(self, book: SecretBook, secret: Mapping[str, object]) -> None:
        """Take a secret; a bad one is told of once for each of its versions, and its older logins no longer hold."""
        meta = secret.get("metadata")
        named = meta if isinstance(meta, dict) else {}
        name = (str(named.get("namespace")), str(named.get("name")))
        try:
            name, _, entries = parse_secret(secret)
            fits = book.put(name, entries)
            trouble = "" if fits else "no room for more secrets"
        except ValueError as error:
            book.remove(name)
            trouble = str(error)
        if not trouble:
            self._bad.pop(name, None)
        elif self._bad.get(name) != trouble and len(self._bad) < BAD_SECRETS_REMEMBERED:
            self._bad[name] = trouble
            self._tell("secret passed over", namespace=name[0], name=name[1], why=trouble)
