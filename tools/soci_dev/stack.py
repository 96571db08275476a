# SPDX-License-Identifier: Apache-2.0
"""A private set of everything: NATS, a registry, containerd, and our services, below one folder.

Own roots, sockets and ports, so that nothing the machine already runs is touched. ::

    with Stack(folder, fetchers=2) as stack:
        stack.ctr("images", "ls")

Leaving the block ends every process and mount of the set, whatever happened inside; a set whose owner crashed is
cleaned when the folder is used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

from soci.errors import FailedPrecondition, InvalidInput
from soci_dev import leftovers
from soci_dev.containerd_config import ContainerdConfig
from soci_dev.folders import cache_folder
from soci_dev.processes import STOP_GRACE_S, Daemon, end_recorded, free_port, run_checked
from soci_dev.tools import find, search_path

SERVICES: Final = ("mounter", "fetcher", "indexer", "snapshotter")
"""Our services, in the order in which they start; with the mounter comes its holder."""

NATS_LIMIT_S: Final = 20.0
REGISTRY_LIMIT_S: Final = 20.0
CONTAINERD_LIMIT_S: Final = 30.0
SERVICE_LIMIT_S: Final = 30.0
"""Limits of the waits until each is ready."""

MAX_SOCKET_PATH: Final = 97
"""Bytes: sun_path holds 108 with its NUL (unix(7)); containerd appends ``.ttrpc`` to its own."""

MAX_FETCHERS: Final = 16
_CTR_TIMEOUT_S: Final = 300.0
_PROBE_TIMEOUT_S: Final = 2.0
_NO_STATE_ON: Final = frozenset({"overlay", "fuse.fuse-overlayfs", "aufs"})
_MODULES: Final = {service: f"soci_{service}" for service in SERVICES} | {"holder": "soci_mounter.holder"}


class Stack:
    """A running private set; use it as a context manager. Every attribute is set before the block begins.

    Args:
        folder: an own folder on a real file system, short enough for socket paths; emptied at the end but for ``log/``.
        registries: how many registries; ``registry`` is the first one's ``127.0.0.1:port``.
        fetchers: how many fetchers work side by side; named ``fetcher-1``…
        services: which of `SERVICES` run.
        containerd: whether containerd runs.
        cri: whether its CRI plugin is on, on the same socket.
        flags: more command-line words by service, as ``{"fetcher": ["--log-level", "debug"]}``.
        environment: more environment variables of our services.
        settings: their configuration file's text (TOML), for those that flags give no other file.
        registry_settings: more tables of the registries' configuration.
        progress: is told in a few words what happens.

    Raises `FailedPrecondition` (not root, folder in use, wrong file system), `Unavailable` or `DeadlineExceeded`
    with the log's tail when a daemon does not come up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        registries: int = 1,
        fetchers: int = 1,
        services: Collection[str] = SERVICES,
        containerd: bool = True,
        cri: bool = False,
        flags: Mapping[str, Sequence[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        settings: str = "",
        registry_settings: Mapping[str, object] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not 0 <= fetchers <= MAX_FETCHERS or set(services) - set(SERVICES):
            raise InvalidInput(f"at most {MAX_FETCHERS} fetchers, services among {SERVICES}")
        self.folder = folder.resolve()
        self.logs = self.folder / "log"
        self.root = self.folder / "sociable"
        self.containerd_address = self.folder / "c.sock"
        self.snapshotter_address = self.folder / "s.sock"
        for path in (self.containerd_address, self.snapshotter_address):
            if len(os.fsencode(path)) > MAX_SOCKET_PATH:
                raise InvalidInput(
                    f"{path} is too long for a socket's path ({MAX_SOCKET_PATH} bytes): use a shorter one"
                )
        # runc's state folder is shared by all containerds of a machine: only the namespace keeps us apart.
        self.namespace = "sociable-" + hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:10]
        self.node = self.namespace
        self.daemons: dict[str, Daemon] = {}
        self.registries: list[str] = []
        self.nats_url = ""
        self._want = (registries, fetchers, [name for name in SERVICES if name in services], containerd)
        self._config = ContainerdConfig(
            self.folder / "containerd",
            self.containerd_address,
            self.snapshotter_address if "snapshotter" in services else None,
            cri,
        )
        self._flags = dict(flags or {})
        self._environment = {**os.environ, **(environment or {})}
        self._settings = settings
        if settings:
            self._environment["SOCI_SNAPSHOTTER_CONFIG"] = str(self.folder / "services.toml")
        self._registry_settings = dict(registry_settings or {})
        self._progress = progress
        self._starters: dict[str, Callable[[], Daemon]] = {}
        self._waits: dict[str, Callable[[Daemon], None]] = {}
        self._lock: TextIO | None = None

    @property
    def registry(self) -> str:
        """``127.0.0.1:port`` of the first registry, which speaks plain HTTP."""
        return self.registries[0]

    @property
    def registry_hosts(self) -> Path:
        """CRI's folder of ``<host>/hosts.toml``."""
        return self._config.registry_hosts

    # --- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._claim()
        try:
            if self._settings:
                (self.folder / "services.toml").write_text(self._settings)
            self._start_all()
        except BaseException as error:
            self.close(keep_logs=isinstance(error, Exception))  # not for Ctrl-C
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close(keep_logs=kind is not None and issubclass(kind, Exception))

    def close(self, *, keep_logs: bool = False) -> None:
        """End and remove everything; safe to call again."""
        if self._lock is None:
            return
        restore = _deaf_to_interrupts()
        try:
            self._sweep()
            for entry in self.folder.iterdir():
                if entry.name == "lock" or (entry.name == "log" and keep_logs):
                    continue
                leftovers.remove_tree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            (self.folder / "lock").unlink(missing_ok=True)
            if not keep_logs:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._lock.close()
            self._lock = None
            restore()

    def start(self, name: str) -> Daemon:
        """Start daemon ``name`` (again) and wait until it is ready. It must not be running."""
        if name in self.daemons and self.daemons[name].returncode is None:
            raise FailedPrecondition(f"{name} runs already")
        daemon = self._launch(name)
        self._waits[name](daemon)
        return daemon

    def stop(self, name: str, grace_s: float = STOP_GRACE_S) -> int:
        """SIGTERM to daemon ``name``, SIGKILL after ``grace_s``; returns the exit status."""
        return self.daemons[name].stop(grace_s)

    def kill(self, name: str) -> None:
        """SIGKILL to daemon ``name``."""
        self.daemons[name].kill()

    # --- use --------------------------------------------------------------------------------------------------------

    def ctr_command(self, *words: str) -> list[str]:
        """The command line of ``ctr`` against this stack."""
        return [str(find("ctr")), "--address", str(self.containerd_address), "--namespace", self.namespace, *words]

    def ctr(
        self, *words: str, check: bool = True, timeout_s: float = _CTR_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run ``ctr`` against this containerd, in this stack's namespace; `Unavailable` with its stderr if it fails."""
        return run_checked(self.ctr_command(*words), timeout_s, check=check)

    def soci_command(self, *words: str) -> list[str]:
        """The command line of our own ``soci`` against this stack."""
        flags = ["--address", str(self.containerd_address), "--namespace", self.namespace]
        flags += ["--nats-url", self.nats_url, "--node", self.node, "--root", str(self.root)]
        return [sys.executable, "-m", "soci_cli", *flags, *words]

    def soci(
        self, *words: str, check: bool = True, timeout_s: float = _CTR_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run our own ``soci`` against this stack; `Unavailable` with its stderr if it fails."""
        return run_checked(self.soci_command(*words), timeout_s, check=check)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        registries, _, services, containerd = self._want
        if (containerd or "mounter" in services) and os.geteuid() != 0:
            raise FailedPrecondition("containerd and mounts need root")
        self.folder.mkdir(parents=True, exist_ok=True)
        kind = leftovers.file_system_of(self.folder)
        if containerd and kind in _NO_STATE_ON:
            raise FailedPrecondition(
                f"{self.folder} is on {kind}; set SOCIABLE_CACHE to a folder on a real file system"
            )
        lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise FailedPrecondition(f"{self.folder} is used by another run: end that one first") from error
        self._lock = lock
        self._sweep()  # what a crashed run left
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                leftovers.remove_tree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        self.logs.mkdir()
        self.registries = [f"127.0.0.1:{free_port()}" for _ in range(registries)]

    def _start_all(self) -> None:
        registries, fetchers, services, containerd = self._want
        self._plan_nats()
        for number in range(registries):
            self._plan_registry(number)
        if "mounter" in services:  # before it: what it finds decides how it shows layers
            self._plan_service("holder", "holder")
        self._start_together(list(self._starters))
        ours = []
        for service in services:
            names = [f"fetcher-{number}" for number in range(1, fetchers + 1)] if service == "fetcher" else [service]
            for name in names:
                self._plan_service(service, name)
            ours += names
        self._start_together(ours)  # before containerd: its CRI plugin asks the snapshotter at once
        if containerd:
            self._plan_containerd()
            self._start_together(["containerd"])

    def _start_together(self, names: list[str]) -> None:
        if names:
            self._progress("starting " + ", ".join(names))
        started = [(name, self._launch(name)) for name in names]
        for name, daemon in started:
            self._waits[name](daemon)

    def _launch(self, name: str) -> Daemon:
        daemon = self.daemons[name] = self._starters[name]()
        with (self.folder / "pids").open("a") as record:
            record.write(f"{daemon.pid} {daemon.started} {name}\n")
        return daemon

    def _daemon(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> Daemon:
        return Daemon(name, command, self.logs / f"{name}.log", environment, self.folder)

    def _plan_nats(self) -> None:
        port = free_port()
        self.nats_url = f"nats://127.0.0.1:{port}"
        command: list[str | Path] = [
            find("nats-server"),
            "-a",
            "127.0.0.1",
            "-p",
            str(port),
            "-js",
            "-sd",
            self.folder / "nats",
        ]
        self._starters["nats"] = lambda: self._daemon("nats", command, self._environment)
        self._waits["nats"] = lambda daemon: daemon.wait(lambda: _nats_answers(port), "answering", NATS_LIMIT_S)

    def _plan_registry(self, number: int) -> None:
        name = "registry" if number == 0 else f"registry-{number + 1}"
        address = self.registries[number]
        config = self.folder / f"{name}.json"  # JSON is YAML
        settings: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "warn"},
            "http": {"addr": address, "secret": name},
            "storage": {"delete": {"enabled": True}, "filesystem": {"rootdirectory": str(self.folder / name)}},
        }
        config.write_text(json.dumps(settings | self._registry_settings))
        environment = {key: value for key, value in self._environment.items() if not key.startswith("REGISTRY_")}
        command: list[str | Path] = [find("docker-registry"), "serve", config]
        self._starters[name] = lambda: self._daemon(name, command, environment)
        self._waits[name] = lambda daemon: daemon.wait(
            lambda: _http_ok(f"http://{address}/v2/"), "answering", REGISTRY_LIMIT_S
        )

    def _plan_service(self, service: str, name: str) -> None:
        flags: list[str | Path] = ["--root", self.root, "--nats-url", self.nats_url, "--node", self.node]
        if service == "snapshotter":
            flags += ["--address", self.snapshotter_address]
        command: list[str | Path] = [sys.executable, "-m", _MODULES[service], *flags, *self._flags.get(service, ())]
        self._starters[name] = lambda: self._daemon(name, command, self._environment)
        self._waits[name] = lambda daemon: daemon.wait(daemon.said_ready, "ready", SERVICE_LIMIT_S)

    def _plan_containerd(self) -> None:
        config = self._config
        for folder in (config.folder, config.registry_hosts):
            folder.mkdir(parents=True, exist_ok=True)
        file = config.folder / "config.toml"
        file.write_text(config.toml())
        environment = {**self._environment, "PATH": search_path()}  # it finds its shim and runc there
        command: list[str | Path] = [find("containerd"), "--config", file]
        self._starters["containerd"] = lambda: self._daemon("containerd", command, environment)
        self._waits["containerd"] = lambda daemon: daemon.wait(
            lambda: self.containerd_address.exists() and self.ctr("version", check=False).returncode == 0,
            "answering",
            CONTAINERD_LIMIT_S,
        )

    def _sweep(self) -> None:
        """End all that runs or is mounted here: containers first, so that nothing reads from a mount going away."""
        leftovers.kill_containers([self.namespace])
        leftovers.kill_containers(["k8s.io"], self._config.runc_root)
        for name in reversed(list(self.daemons)):
            if name == "containerd":
                self.daemons[name].stop()
                leftovers.kill_shims(self.containerd_address)
                leftovers.unmount_below(self._config.folder)
        leftovers.kill_shims(self.containerd_address)
        for daemon in reversed(self.daemons.values()):
            daemon.stop()
        end_recorded(self.folder / "pids")
        leftovers.unmount_below(self.folder)


def default_folder(name: str) -> Path:
    """Where stack ``name`` lives: below the cache, so that the next run finds what a crashed one left."""
    return cache_folder() / "run" / name


def clean_stale(parent: Path, prefix: str) -> None:
    """Clean what crashed owners left in ``parent``'s folders named ``prefix``…; those in use are left alone."""
    for folder in sorted(parent.glob(f"{prefix}*")):
        with contextlib.suppress(FailedPrecondition):
            stack = Stack(folder, registries=0, services=(), containerd=False)
            stack._claim()  # noqa: SLF001  (what __enter__ does, without starting anything)
            stack.close()


def _nats_answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_PROBE_TIMEOUT_S) as link:
            return b'"jetstream":true' in link.recv(4096)  # the INFO line greets every client
    except OSError:
        return False


def _http_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as answer:
            return int(answer.status) == 200
    except (OSError, urllib.error.URLError):
        return False


def _deaf_to_interrupts() -> Callable[[], object]:
    """Ignore Ctrl-C and SIGTERM until the returned function is called: half a clean-up is worse than a slow one."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    old = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    return lambda: [signal.signal(number, handler) for number, handler in old.items()]
