# SPDX-License-Identifier: Apache-2.0
"""``./dev compose-proof``: compose.yaml brought up by a real engine, and an image launched lazily through it.

The engine is a private one. Where no registry of images can be reached, the base image is the demo's own Debian base
(debootstrap) under the tag that the Dockerfile names, and bus and registry are the real programs in images of our own
under the tags that compose.yaml names. Jaeger is left out: nothing waits for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from soci.errors import DeadlineExceeded, NotFound, SociError
from soci_dev import image, leftovers
from soci_dev.containerd_config import SNAPSHOTTER, ContainerdConfig
from soci_dev.demo_image import REPOSITORY, demo_image
from soci_dev.engine import Engine, compose_command, run
from soci_dev.folders import CHECKOUT, cache_folder
from soci_dev.launching import Launch, measure, parse_launches, parse_modes
from soci_dev.processes import Daemon, free_port, run_checked, says_ready
from soci_dev.proxy import Proxy
from soci_dev.tools import find, search_path

SKIPPED: Final = 77
"""Exit status when the proof cannot be made here (no root, no engine): neither good nor bad."""

FETCHERS: Final = 2
MAX_SHARE: Final = 0.5
"""The lazy launch must move less than this share of the image."""

READY_LIMIT_S: Final = 60.0
CONTAINERD_LIMIT_S: Final = 30.0
NAMESPACE: Final = "sociable-compose"
"""Of containerd and, on the machine's one state folder, of runc: nobody else's."""

_SERVICES: Final = ("nats", "registry", "snapshotter", "mounter", "fetcher", "indexer")
_OURS: Final = {"snapshotter": 1, "mounter": 1, "fetcher": FETCHERS, "indexer": 1}
_LIMIT_S: Final = 300.0
_MB: Final = 1e6

_NATS: Final = """\
FROM {base}
COPY nats-server busybox /usr/bin/
RUN ln -s busybox /usr/bin/wget
ENTRYPOINT ["nats-server"]
"""
_REGISTRY: Final = """\
FROM {base}
COPY docker-registry busybox /usr/bin/
COPY config.yml /etc/docker/registry/config.yml
RUN ln -s busybox /usr/bin/wget
ENTRYPOINT ["docker-registry", "serve"]
CMD ["/etc/docker/registry/config.yml"]
"""
_REGISTRY_CONFIG: Final = {
    "version": "0.1",
    "http": {"addr": ":5000", "secret": "proof"},
    "storage": {"filesystem": {"rootdirectory": "/var/lib/registry"}},
}


def run_proof() -> int:
    """The whole proof: 0 if it held, 1 if not, `SKIPPED` with a sentence where no engine can be started."""
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)

    if os.geteuid() != 0:
        print("compose-proof: skipped: an engine and mounts need root", file=sys.stderr)
        return SKIPPED
    folder = cache_folder() / "run" / "compose"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as open_now:
        lock = open_now.enter_context((folder / "lock").open("a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            engine = open_now.enter_context(Engine(folder / "engine"))
        except BlockingIOError:
            print(f"compose-proof: skipped: {folder} is used by another run", file=sys.stderr)
            return SKIPPED
        except SociError as error:
            print(f"compose-proof: skipped: no Docker engine can be started here: {error}", file=sys.stderr)
            return SKIPPED
        say("a private Docker engine runs")
        return Proof(folder, engine, say).run()


class Proof:
    """One run below ``folder`` with ``engine``."""

    def __init__(self, folder: Path, engine: Engine, say: object) -> None:
        self.folder = folder
        self.engine = engine
        self.say = say if callable(say) else print
        self.state = folder / "state"
        self.sockets = folder / "sockets"
        self.containerd = folder / "containerd" / "c.sock"
        self.left: list[Path] = []
        self.ports = {name: str(free_port()) for name in ("NATS", "REGISTRY", "OTLP", "JAEGER")}
        self.environment = {
            **engine.environment,
            **{f"SOCIABLE_{name}_PORT": port for name, port in self.ports.items()},
            "SOCIABLE_ROOT": str(self.state),
            "SOCIABLE_RUN": str(self.sockets),
            "COMPOSE_PROJECT_NAME": "sociable-proof",
        }

    def run(self) -> int:
        """Images, compose, containerd, launches; everything is cleared away, whatever happens."""
        built = demo_image(self.say)
        base = named_base((CHECKOUT / "Dockerfile").read_text())
        try:
            self.make_base(built, base)
        except SociError as error:
            print(f"compose-proof: skipped: the engine cannot work on this machine: {error}", file=sys.stderr)
            return SKIPPED
        self.make_images(base)
        with self.shared_state(), self.composed(), self.containerd_running():
            verdicts = self.launches(built)
            self.say("clearing away")
        verdicts.append((not self.left, f"compose down left no mount{''.join(f' but {path}' for path in self.left)}"))
        for held, text in verdicts:
            print(f"{'ok' if held else 'FAILED'} {text}", flush=True)
        return int(not all(held for held, _ in verdicts))

    # --- images -----------------------------------------------------------------------------------------------------

    def make_base(self, built: image.Image, base: str) -> None:
        """The base image from the demo image's first layer, which is debootstrap's tree."""
        layer = built.folder / "blobs" / "sha256" / str(built.layers[0]["digest"]).removeprefix("sha256:")
        self.engine.import_base(layer, base)
        self.engine.try_out(base)
        self.say(f"base image {base}: imported from debootstrap's tree")

    def make_images(self, base: str) -> None:
        """What stands in for the two images from elsewhere, and our own by the Dockerfile."""
        tags = named_images((CHECKOUT / "compose.yaml").read_text())
        config = self.engine.folder / "config.yml"  # JSON is YAML
        config.write_text(json.dumps(_REGISTRY_CONFIG))
        busybox = find("busybox")
        self.engine.build_from(_NATS.format(base=base), [find("nats-server"), busybox], tags["nats"])
        self.engine.build_from(
            _REGISTRY.format(base=base), [find("docker-registry"), busybox, config], tags["registry"]
        )
        self.say(f"{tags['nats']} and {tags['registry']}: the real programs in images of our own")
        self.engine.build(CHECKOUT, tags["sociable"])
        size = int(self.engine.docker("image", "inspect", "--format", "{{.Size}}", tags["sociable"]))
        self.say(f"{tags['sociable']}: built by the Dockerfile, {size / _MB:.0f} MB")

    # --- what runs --------------------------------------------------------------------------------------------------

    @contextmanager
    def shared_state(self) -> Iterator[None]:
        """The state folder as docs/compose.md says: a mount of its own, shared."""
        leftovers.kill_containers([NAMESPACE])
        leftovers.kill_shims(self.containerd)
        for folder in (self.state, self.sockets):
            leftovers.remove_tree(folder)
            folder.mkdir(parents=True)
        run_checked(["mount", "--bind", str(self.state), str(self.state)], _LIMIT_S)
        try:
            run_checked(["mount", "--make-shared", str(self.state)], _LIMIT_S)
            yield
        finally:
            leftovers.unmount_below(self.state)
            for folder in (self.state, self.sockets):
                leftovers.remove_tree(folder)

    def compose(self, *words: str) -> str:
        """Run compose on the project's file; its standard output."""
        file = str(CHECKOUT / "compose.yaml")
        return run([*compose_command(), "--file", file, *words], self.environment, _LIMIT_S)

    @contextmanager
    def composed(self) -> Iterator[None]:
        """``compose up`` without jaeger, two fetchers, until every service said that it is ready."""
        try:
            self.compose("up", "-d", "--no-build", "--scale", f"fetcher={FETCHERS}", *_SERVICES)
            self.engine.record_networks()
            for service, count in _OURS.items():
                self.wait_ready(service, count)
            self.say(f"compose is up: {', '.join(_SERVICES)}; {FETCHERS} fetchers")
            yield
        except BaseException:
            with suppress(SociError):
                log = self.engine.log.with_name("compose.log")
                log.write_text(self.compose("logs", "--no-color"))
                self.say(f"the services' logs are in {log}")
            raise
        finally:
            self.compose("down", "--volumes", "--timeout", "10")
            self.left = [mount.path for mount in leftovers.mounts_below(self.state) if mount.path != self.state]

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers."""
        return self.compose("ps", "-q", service).split()

    def wait_ready(self, service: str, count: int, since: str = "0") -> None:
        """Until ``count`` containers of ``service`` logged ``ready`` after ``since`` (``docker logs --since``)."""
        end = time.monotonic() + READY_LIMIT_S
        while True:
            logs = [self.engine.docker("logs", "--since", since, one) for one in self.containers(service)]
            if sum(any(map(says_ready, log.splitlines())) for log in logs) >= count:
                return
            if time.monotonic() > end:
                raise DeadlineExceeded(f"{service}: not ready within {READY_LIMIT_S:g} s\n" + "\n".join(logs)[-3000:])
            time.sleep(0.3)

    @contextmanager
    def containerd_running(self) -> Iterator[None]:
        """A private containerd on the host, pointed at the snapshotter's socket."""
        config = ContainerdConfig(
            self.folder / "containerd", self.containerd, self.sockets / "soci-snapshotter-grpc.sock", cri=False
        )
        leftovers.remove_tree(config.folder)
        config.folder.mkdir(parents=True)
        file = config.folder / "config.toml"
        file.write_text(config.toml())
        environment = {**self.engine.environment, "PATH": search_path()}
        command: list[str | Path] = [find("containerd"), "--config", file]
        log = self.engine.log.with_name("containerd.log")
        daemon = Daemon("containerd", command, log, environment, config.folder)
        self.engine.record(daemon)
        try:
            daemon.wait(self.containerd.exists, "listening", CONTAINERD_LIMIT_S)
            yield
        finally:
            leftovers.kill_containers([NAMESPACE])
            daemon.stop()
            leftovers.kill_shims(self.containerd)
            leftovers.remove_tree(config.folder)

    # --- launches ---------------------------------------------------------------------------------------------------

    def soci(self, *words: str) -> list[str]:
        """The command line of ``soci`` on the host: the bus is where compose publishes it, the node is the host."""
        flags = ["--address", str(self.containerd), "--namespace", NAMESPACE]
        flags += ["--nats-url", f"nats://127.0.0.1:{self.ports['NATS']}"]
        return [sys.executable, "-m", "soci_cli", *flags, "--node", _node(), *words]

    def launches(self, built: image.Image) -> list[tuple[bool, str]]:
        """The image launched eagerly, lazily, and again with the mounter's successors; what held and what not."""
        with Proxy(f"127.0.0.1:{self.ports['REGISTRY']}") as proxy:
            reference = image.push(built, proxy.address, REPOSITORY)
            run_checked(self.soci("index", "build", reference), _LIMIT_S)
            self.say(f"pushed and indexed {reference}")
            eager = self.launch(proxy, reference, "--snapshotter", "overlayfs")
            self.say(f"full pull, on overlayfs: {_summary(eager)}")
            run_checked(self.ctr("images", "rm", "--sync", reference), _LIMIT_S)
            lazy = self.launch(proxy, reference, "--snapshotter", SNAPSHOTTER)
            self.say(f"lazily: {_summary(lazy)}")
            modes, busy = self.modes(reference), self.busy_fetchers()
            self.replace_mounter("SIGTERM")
            restarted = self.launch(proxy, reference, "--snapshotter", SNAPSHOTTER, "--pull", "never")
            self.say(f"after a restart of the mounter: {_summary(restarted)}")
            self.replace_mounter("SIGKILL")
            killed = self.launch(proxy, reference, "--snapshotter", SNAPSHOTTER, "--pull", "never")
            self.say(f"after it was killed: {_summary(killed)}")
        share = lazy.counts.body_bytes / built.size
        return [
            (lazy.output == eager.output, "the lazy launch printed what the eager one did"),
            (share < MAX_SHARE, f"it moved {share:.0%} of the image's {built.size / _MB:.0f} MB"),
            ("Lazy" in {mode.title() for mode in modes}, f"layers came: {', '.join(modes) or 'no event says how'}"),
            (busy == FETCHERS, f"{busy} of {FETCHERS} fetchers had a part in it"),
            (restarted.output == eager.output, "the image ran again after a restart of the mounter"),
            (killed.output == eager.output, "and after it was killed"),
        ]

    def launch(self, proxy: Proxy, reference: str, *flags: str) -> Launch:
        """Run the image to its end."""
        return measure(proxy, [self.soci("run", "--plain-http", *flags, reference)])

    def ctr(self, *words: str) -> list[str]:
        """The command line of ``ctr``."""
        return [str(find("ctr")), "--address", str(self.containerd), "--namespace", NAMESPACE, *words]

    def modes(self, reference: str) -> list[str]:
        """How the layers of the newest launch came, by its events."""
        listed = run_checked(self.soci("launch", "ls", "--json"), _LIMIT_S).stdout
        launch = parse_launches(listed, reference)
        if not launch:
            return []
        shown = run_checked(self.soci("launch", "show", "--json", launch), _LIMIT_S).stdout
        return [mode.mode for mode in parse_modes(shown)]

    def busy_fetchers(self) -> int:
        """How many fetchers said anything on the bus, as its server counted."""
        told = self.compose("exec", "-T", "nats", "wget", "-q", "-O", "-", "http://127.0.0.1:8222/connz")
        return sum(one.get("name") == "soci-fetcher" and one["in_msgs"] > 0 for one in json.loads(told)["connections"])

    def replace_mounter(self, signal: str) -> None:
        """A successor must show the same layers at the same paths, for the host's containerd too."""
        since = f"{time.time():.3f}"
        self.compose("kill", "-s", signal, "mounter")
        self.engine.docker("wait", *self.containers("mounter"))
        self.compose("start", "mounter")
        self.wait_ready("mounter", 1, since)


def named_base(dockerfile: str) -> str:
    """The one image that a Dockerfile's stages begin from; `NotFound` unless there is exactly one."""
    stages = {match[2] for match in re.finditer(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE)}
    bases = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    if len(bases) != 1:
        raise NotFound(f"the Dockerfile must begin from one image, not {sorted(bases)}")
    return str(bases.pop())


def named_images(compose: str) -> dict[str, str]:
    """Last part of the name without its tag → reference, of every ``image:`` in a compose file."""
    found: Sequence[str] = re.findall(r"^\s+image:\s*(\S+)\s*$", compose, re.MULTILINE)
    return {reference.rpartition("/")[2].partition(":")[0]: reference for reference in found}


def _summary(launch: Launch) -> str:
    return f"ready in {launch.ready_s:.2f} s, {launch.counts.body_bytes / _MB:.1f} MB moved"


def _node() -> str:
    """This host's name as services on its network take it: letters, digits, ``-`` and ``_``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", socket.gethostname())[:64] or "node"
