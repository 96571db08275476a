# SPDX-License-Identifier: Apache-2.0
"""A private Docker engine: its own socket, images and networks, for as long as a block lasts.

Nothing of an engine that the machine already runs is touched, and no firewall rule is made: published ports go through
the engine's own proxy processes, and builds use the host's network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from soci.errors import NotFound, Unavailable
from soci_dev import leftovers
from soci_dev.processes import Daemon, end_recorded

START_LIMIT_S: Final = 40.0
STOP_GRACE_S: Final = 30.0
"""The engine ends its containers before itself."""

COMMAND_LIMIT_S: Final = 120.0
BUILD_LIMIT_S: Final = 1200.0
OUTPUT_SHOWN: Final = 4000
"""Characters of a failed command's output."""

HOW_TO_INSTALL: Final = "apt-get install docker.io docker-compose (or any Docker Engine from 20.10 on with Compose)"

_PASSED_ON: Final = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_PASSED_ON_PIP: Final = ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
_OWN_CERTIFICATES: Final = Path("/usr/local/share/ca-certificates")


def missing_programs() -> list[str]:
    """What the proof needs of Docker and this machine lacks."""
    missing = [name for name in ("dockerd", "docker", "containerd", "runc") if not shutil.which(name, path=_path())]
    return missing if compose_command() else [*missing, "docker-compose"]


def compose_command() -> list[str]:
    """Compose 2 where the client has it, else docker-compose 1.29; empty if there is neither."""
    client = shutil.which("docker", path=_path())
    if client and subprocess.run([client, "compose", "version"], check=False, capture_output=True).returncode == 0:
        return [client, "compose"]
    old = shutil.which("docker-compose", path=_path())
    return [old] if old else []


class Engine:
    """``dockerd`` with everything below ``folder``; use it as a context manager.

    Raises `NotFound` when programs are missing, `Unavailable` or `DeadlineExceeded` when it does not come up (no
    rights, no control groups, no usable storage).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "d.sock"
        self.log = folder.parent / "log" / "dockerd.log"
        self._daemon: Daemon | None = None
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        self.environment: Mapping[str, str] = {**kept, "PATH": _path(), "DOCKER_HOST": f"unix://{self.socket}"}

    def __enter__(self) -> Self:
        missing = missing_programs()
        if missing:
            raise NotFound(f"{', '.join(missing)} not found; install with: {HOW_TO_INSTALL}")
        self.sweep()
        self.folder.mkdir(parents=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = [shutil.which("dockerd", path=_path()) or "dockerd"]
        command += ["--data-root", self.folder / "data", "--exec-root", self.folder / "exec"]
        command += ["--pidfile", self.folder / "d.pid", "--host", f"unix://{self.socket}"]
        command += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
        command += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
        daemon = self._daemon = Daemon("dockerd", command, self.log, self.environment, self.folder)
        self.record(daemon)
        try:
            daemon.wait(self._answers, "answering", START_LIMIT_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and remove all it made."""
        if self._daemon is not None:
            self._daemon.stop(STOP_GRACE_S)
            self._daemon = None
        self.sweep()

    def sweep(self) -> None:
        """Clear away what an earlier, crashed run left."""
        end_recorded(self._pids())  # dockerd's own containerd ends with it
        state = self.folder / "exec"
        leftovers.kill_containers(["moby"], state / "runtime-runc")  # a dockerd that was killed leaves them running
        leftovers.kill_shims(state / "containerd" / "containerd.sock")
        bridges = self._bridges()
        for name in bridges.read_text().split() if bridges.exists() else ():
            subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)  # most often gone already
        bridges.unlink(missing_ok=True)
        if self.folder.exists():
            leftovers.remove_tree(self.folder)

    def record(self, daemon: Daemon) -> None:
        """Have ``daemon`` ended by the next run if this one crashes."""
        with self._pids().open("a") as record:
            record.write(f"{daemon.pid} {daemon.started} {daemon.name}\n")

    def record_networks(self) -> None:
        """Have the bridges that exist now removed by the next run if this one crashes."""
        networks = self.docker("network", "ls", "--quiet", "--filter", "driver=bridge").split()
        self._bridges().write_text("".join(f"br-{network}\n" for network in networks))  # as the engine names them

    def docker(self, *words: str, limit_s: float = COMMAND_LIMIT_S) -> str:
        """Run the client; its standard output. `Unavailable` with its messages when it fails."""
        return run(["docker", *words], self.environment, limit_s)

    def import_image(self, file: Path, reference: str) -> None:
        """Make an image of one layer from a tar archive, gzipped or not."""
        self.docker("import", str(file), reference)

    def build(self, context: Path, reference: str) -> None:
        """``docker build`` on the host's network, with this machine's proxy and index settings."""
        found = _build_arguments()
        # By name alone: the client takes the values, which may hold a password, from its environment.
        arguments = [word for name in found for word in ("--build-arg", name)]
        words = ["docker", "build", "--network", "host", "--tag", reference, *arguments, str(context)]
        run(words, {**self.environment, **found}, BUILD_LIMIT_S)

    def build_from(self, dockerfile: str, files: Iterable[Path], reference: str) -> None:
        """Build from the text of a Dockerfile and files or folders that its COPY names by their last part."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="context-") as temporary:
            context = Path(temporary)
            (context / "Dockerfile").write_text(dockerfile)
            for file in files:
                (shutil.copytree if file.is_dir() else shutil.copyfile)(file, context / file.name)
                (context / file.name).chmod(0o755)
            self.build(context, reference)

    def import_base(self, layer: Path, reference: str) -> None:
        """The base image from a root file system, trusting the certificate authorities that this machine added."""
        self.import_image(layer, "base:imported")
        copied = _OWN_CERTIFICATES.is_dir()
        text = "FROM base:imported\n" + (f"COPY {_OWN_CERTIFICATES.name} {_OWN_CERTIFICATES}/\n" if copied else "")
        self.build_from(text, [_OWN_CERTIFICATES] if copied else [], reference)

    def try_out(self, reference: str) -> None:
        """Run a container and make a network, as Compose will; `Unavailable` where this machine does not allow it."""
        self.docker("run", "--rm", "--network", "none", reference, "true")
        self.docker("network", "create", "probe")
        self.docker("network", "rm", "probe")

    def _answers(self) -> bool:
        try:
            self.docker("version", "--format", "{{.Server.Version}}")
        except Unavailable:
            return False
        return True

    def _pids(self) -> Path:
        return self.folder.with_suffix(".pids")

    def _bridges(self) -> Path:
        return self.folder.with_suffix(".bridges")


def run(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> str:
    """Run a command in an environment of its own; its standard output.

    Raises `Unavailable` with the command and the end of all its output, and without its environment.
    """
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no end within {limit_s:g} s: {' '.join(command)}") from error
    if done.returncode:
        output = (done.stdout + done.stderr)[-OUTPUT_SHOWN:]
        raise Unavailable(f"status {done.returncode} of {' '.join(command)}\n{output}")
    return done.stdout


def _build_arguments() -> Mapping[str, str]:
    found = {name: os.environ[name] for name in (*_PASSED_ON, *_PASSED_ON_PIP) if os.environ.get(name)}
    index = _output(["pip", "config", "get", "global.index-url"])
    if index:
        found.setdefault("PIP_INDEX_URL", index)
    proxy = _output(["apt-config", "shell", "P", "Acquire::http::Proxy"]).removeprefix("P=").strip("'")
    if proxy:
        found.setdefault("http_proxy", proxy)
    return found


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
