# SPDX-License-Identifier: Apache-2.0
"""How this fetcher reaches registries, out of the configuration: times and tries, mirrors, sources of logins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from soci.errors import BusUnavailable
from soci_bus.asks import FindLogin
from soci_bus.face import Bus
from soci_registry import (
    AskedLogin,
    Credentials,
    DockerConfig,
    FirstOf,
    HostBook,
    KubeletProviders,
    KubeSecrets,
    Login,
    Mirror,
    RegistrySettings,
)
from soci_runtime.config import Config
from soci_runtime.logs import log

LOGIN_SECONDS = 5.0
"""How long the snapshotter may take to say which login came with a pull; then the next source is asked."""

BUDGET = "registries"
"""The folder below the span cache's."""

GOOD_NEWS = frozenset({"host used again", "source of logins back", "cluster's secrets followed", "kubeconfig awaited"})

EACH_REQUEST = ("retrying request", "Received status code: ")
"""How lines begin that may come with every request: they are for a search, at debug."""

COMMON_RETRIES = Config().blob_max_retries
"""Where nobody has set how often ranges are tried, their time alone limits them."""


def registry_settings(config: Config) -> RegistrySettings:
    """The limits of the registry client. Ranges have a deadline; the reference's settings can only make it shorter."""
    settings = RegistrySettings()
    if config.blob_max_retries != COMMON_RETRIES:
        settings = replace(settings, range_tries=config.blob_max_retries + 1)
    return replace(
        settings,
        plain_http=frozenset(config.plain_http),
        connect_timeout=config.dial_timeout,
        header_timeout=config.response_timeout,
        total_timeout=config.request_timeout,
        tries=config.max_retries + 1,
        min_wait=config.min_wait,
        max_wait=config.max_wait,
        range_min_wait=config.blob_min_wait,
        range_max_wait=min(config.blob_max_wait, settings.range_max_wait),
        range_deadline=min(config.fetching_timeout, settings.range_deadline),
        login_seconds=config.auth_client_ttl,
        connections_per_host=config.registry_concurrency,
    )


def budget_folder(config: Config) -> Path:
    """Where all fetchers of the node share what each registry may be asked at a time."""
    return config.cache / BUDGET


def host_book(config: Config) -> HostBook:
    """Which hosts stand for a registry; `InvalidConfig` where a mirror is none."""
    mirrors = {
        name: tuple(Mirror(one.host, one.insecure, one.request_timeout) for one in listed)
        for name, listed in config.resolver_hosts
    }
    folders = tuple(Path(folder) for folder in config.hosts_dir.split(":") if folder)
    return HostBook(mirrors=mirrors, folders=folders, plain_http=frozenset(config.plain_http))


class BusQuestion:
    """Asks the snapshotter over the bus, once there is one: the bus is left before the registry, and joined after."""

    def __init__(self) -> None:
        self.bus: Bus | None = None

    async def __call__(self, registry: str, repository: str) -> Login:
        """The login that came with a pull of the repository. Neither question nor answer is logged or traced."""
        if self.bus is None:
            raise BusUnavailable("the bus has not been joined yet")
        found = await self.bus.ask(FindLogin(registry, repository), timeout=LOGIN_SECONDS)
        return Login(found.username, found.secret)


@asynccontextmanager
async def logins(config: Config, question: BusQuestion) -> AsyncIterator[Credentials]:
    """The sources of logins that are switched on, in the order in which they are asked."""
    sources: list[Credentials] = [DockerConfig()]
    async with AsyncExitStack() as stack:
        if config.kube_keychain:
            sources.append(await stack.enter_async_context(KubeSecrets(config.kubeconfig, tell=tell)))
        if config.cri_keychain:
            sources.append(AskedLogin(question))
        if config.kubelet_credential_config:
            file, folder = Path(config.kubelet_credential_config), Path(config.kubelet_credential_bin_dir)
            sources.append(KubeletProviders(file, folder, tell))
        yield FirstOf(sources, tell)


def tell(what: str, /, **facts: object) -> None:
    """One line in the log for what an operator wants to know of registries, mirrors and sources of logins."""
    if what.startswith(EACH_REQUEST):
        log.debug(what, **facts)
    else:
        (log.info if what in GOOD_NEWS else log.warning)(what, **facts)
