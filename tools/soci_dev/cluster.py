# SPDX-License-Identifier: Apache-2.0
"""A cluster on one machine: NATS servers that are one, and nodes with a NATS leaf, fetchers and a mounter each.

Every NATS server and every node is a host of its own (`soci_dev.lan`). Needs root. ::

    with Cluster(folder, nodes=10, registry=proxy.address) as cluster:
        cluster.image("app")  # as nodes name it
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

from soci_dev import leftovers
from soci_dev.lan import Lan
from soci_dev.processes import Daemon
from soci_dev.tools import find

MEMBERS: Final = 3
FIRST_MEMBER: Final = 11
FIRST_NODE: Final = 101
"""Host numbers."""
CLIENT_PORT: Final = 4222
ROUTE_PORT: Final = 6222
LEAF_PORT: Final = 7422
PEER_PORT: Final = 4421
NATS_LIMIT_S: Final = 20.0
SERVICE_LIMIT_S: Final = 60.0


class Cluster:
    """See the module. ``registry`` is ``127.0.0.1:port`` on this machine; ``settings`` are lines of ``[sociable]``.

    ``fetchers`` is how many run on each node, ``mounters`` on how many nodes a mounter runs. Daemons are named
    ``nats-1``…, ``leaf-1``…, ``fetcher-1`` (``fetcher-1-2`` is a node's second) and ``mounter-1``…
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int,
        registry: str,
        fetchers: int = 1,
        mounters: int = 0,
        peers: bool = True,
        settings: str = "",
    ) -> None:
        self.folder = folder
        self.lan = Lan()
        self.daemons: dict[str, Daemon] = {}
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self.nats_urls: list[str] = []
        self.registry = ""
        self._upstream = registry
        self._want = (fetchers, mounters)
        self._peers = peers
        self._settings = settings
        self._lock: TextIO | None = None
        self._starters: dict[str, Callable[[], Daemon]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        # As a `Stack` does: with the lock the folder is in use, without it what it names is cleaned away.
        self._lock = (self.folder / "lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self.lan.__enter__()
            self.registry = self.lan.relay(self._upstream)
            self._write_settings()
            self._start_nats()
            for number in range(1, len(self.nodes) + 1):
                self._start_node(number)
            for name, daemon in self.daemons.items():
                if name.startswith(("fetcher", "mounter")):
                    daemon.wait(daemon.said_ready, "ready", SERVICE_LIMIT_S)
        except BaseException:
            self.close(keep=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close(keep=kind is not None)

    def close(self, *, keep: bool = False) -> None:
        """End and remove everything; ``keep`` leaves the logs."""
        for daemon in self.daemons.values():
            with suppress(ProcessLookupError):  # all at once, for each waits for another one
                os.kill(daemon.pid, signal.SIGKILL)
            daemon.stop()
        self.lan.close()
        leftovers.unmount_below(self.folder)
        for entry in [] if not self.folder.exists() else list(self.folder.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif not keep:
                entry.unlink(missing_ok=True)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def image(self, name: str) -> str:
        """How the nodes name an image of the registry."""
        return f"{self.registry}/{name}:1"

    def cache(self, node: int) -> Path:
        """The span cache of node ``node``, counted from 1."""
        return self.folder / self.nodes[node - 1] / "cache"

    def restart(self, name: str) -> Daemon:
        """Start a daemon that ended again, and wait until it is ready."""
        daemon = self._launch(name)
        if name.startswith(("fetcher", "mounter")):
            daemon.wait(daemon.said_ready, "ready", SERVICE_LIMIT_S)
        return daemon

    def add_node(self) -> int:
        """One more node, with a fetcher; its number."""
        number = len(self.nodes) + 1
        self.nodes.append(f"node-{number}")
        self._start_node(number)
        daemon = self.daemons[f"fetcher-{number}"]
        daemon.wait(daemon.said_ready, "ready", SERVICE_LIMIT_S)
        return number

    # --- inside

    def _write_settings(self) -> None:
        secret = self.folder / "secret"
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        peers = f'peer_listen = "0.0.0.0:{PEER_PORT}"\npeer_secret_file = "{secret}"\n' if self._peers else ""
        lines = f'[sociable]\nplain_http = ["{self.registry}"]\n{peers}{self._settings}'
        (self.folder / "services.toml").write_text(lines)

    def _launch(self, name: str) -> Daemon:
        daemon = self.daemons[name] = self._starters[name]()
        with (self.folder / "pids").open("a") as record:
            record.write(f"{daemon.pid} {daemon.started} {name}\n")
        return daemon

    def _plan(self, name: str, words: Sequence[str | Path], **environment: str) -> None:
        log = self.folder / f"{name}.log"
        self._starters[name] = lambda: Daemon(name, words, log, os.environ | environment, self.folder)

    def _start_nats(self) -> None:
        addresses = [self.lan.address(FIRST_MEMBER + number) for number in range(MEMBERS)]
        self.nats_urls = [f"nats://{address}:{CLIENT_PORT}" for address in addresses]
        for number, address in enumerate(addresses, 1):
            name = f"nats-{number}"
            config: dict[str, object] = {
                "server_name": name,
                "listen": f"{address}:{CLIENT_PORT}",
                "jetstream": {"store_dir": str(self.folder / name), "domain": "sociable"},
                "cluster": {
                    "name": "sociable",
                    "listen": f"{address}:{ROUTE_PORT}",
                    "routes": [f"nats://{other}:{ROUTE_PORT}" for other in addresses if other != address],
                },
                "leafnodes": {"listen": f"{address}:{LEAF_PORT}"},
            }
            self._start_server(name, FIRST_MEMBER + number - 1, config)
        for number, address in enumerate(addresses, 1):
            self.daemons[f"nats-{number}"].wait(lambda at=address: _greets(at), "answering", NATS_LIMIT_S)  # type: ignore[misc]

    def _start_server(self, name: str, host: int, config: dict[str, object]) -> None:
        file = self.folder / f"{name}.json"  # nats-server's configuration language takes JSON
        file.write_text(json.dumps(config))
        self._plan(name, [*self.lan.host(host), find("nats-server"), "-c", file])
        self._launch(name)

    def _start_node(self, number: int) -> None:
        host = FIRST_NODE + number - 1
        address = self.lan.address(host)
        urls = [f"nats://{self.lan.address(FIRST_MEMBER + member)}:{LEAF_PORT}" for member in range(MEMBERS)]
        leaf: dict[str, object] = {
            "server_name": f"leaf-{number}",
            "listen": f"127.0.0.1:{CLIENT_PORT}",
            "leafnodes": {"remotes": [{"urls": urls}], "reconnect": "1s"},
            "default_js_domain": {"$G": "sociable"},
        }
        self._start_server(f"leaf-{number}", host, leaf)
        node = self.nodes[number - 1]
        flags = ["--root", str(self.folder / node), "--node", node, "--nats-url", f"nats://127.0.0.1:{CLIENT_PORT}"]
        flags += ["--config", str(self.folder / "services.toml")]
        fetchers, mounters = self._want
        names = [f"fetcher-{number}" + (f"-{one}" if one > 1 else "") for one in range(1, fetchers + 1)]
        for name in [*names, *([f"mounter-{number}"] if number <= mounters else [])]:
            module = f"soci_{name.partition('-')[0]}"
            words = [*self.lan.on(host), sys.executable, "-m", module, *flags]
            self._plan(name, words, SOCIABLE_PEER_URL=f"http://{address}:{PEER_PORT}")
            self._launch(name)


def _greets(address: str) -> bool:
    try:
        with socket.create_connection((address, CLIENT_PORT), timeout=2) as link:
            return b"INFO" in link.recv(4096)
    except OSError:
        return False
