# SPDX-License-Identifier: Apache-2.0
"""Measure the snapshot calls, each against containerd's own overlayfs snapshotter served on the same kind of socket.

One client (Python's gRPC, one call at a time) makes the same calls on both, in turns; what is printed is the ratio of
the medians of many rounds. See bench/README.md.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import grpc

from soci_dev.folders import cache_folder
from soci_dev.golang import go_program
from soci_dev.processes import Daemon, free_port
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2 as pb
from soci_proto.containerd.services.snapshots.v1 import snapshots_pb2_grpc as rpc

READY_S = 30.0
CALL_S = 30.0
CHAIN = 10
"""Layers of the deep round."""
CLEAN_EVERY = 50
"""Rounds between two clean-ups, which are not measured: in containerd, too, they come now and then."""
WARM_UP = 30
"""Rounds before the first that counts."""


class Arm:
    """One of the two that are compared."""

    def __init__(self, socket: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self.stub: Any = rpc.SnapshotsStub(self.channel)
        self.serial = 0
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.rounds: dict[str, list[float]] = defaultdict(list)

    def call(self, method: str, message: Any) -> None:
        """One call, timed."""
        begun = time.perf_counter()
        getattr(self.stub, method)(message, timeout=CALL_S)
        self.calls[method].append(time.perf_counter() - begun)

    def layer(self, number: str, parent: str) -> str:
        """Prepare, Mounts, Commit; the name of what was committed."""
        key, name = f"key-{number}", f"layer-{number}"
        self.call("Prepare", pb.PrepareSnapshotRequest(key=key, parent=parent))
        self.call("Mounts", pb.MountsRequest(key=key))
        self.call("Commit", pb.CommitSnapshotRequest(key=key, name=name))
        return name

    def round(self, depth: int) -> None:
        """A chain of so many layers, made and removed."""
        self.serial += 1
        names = [""]
        for level in range(depth):
            names.append(self.layer(f"{self.serial}-{level}", names[-1]))
        for name in reversed(names[1:]):
            self.call("Remove", pb.RemoveSnapshotRequest(key=name))

    def timed(self, name: str, depth: int) -> None:
        """A round whose time is noted under ``name``."""
        begun = time.perf_counter()
        self.round(depth)
        self.rounds[name].append(time.perf_counter() - begun)

    def cleanup(self) -> None:
        """Free what was removed; not timed."""
        self.stub.Cleanup(pb.CleanupRequest(), timeout=CALL_S)


@contextmanager
def daemon(name: str, folder: Path, words: list[str], ready: Callable[[Daemon], bool]) -> Iterator[None]:
    """A process that serves while the block runs."""
    running = Daemon(name, words, folder / f"{name}.log", os.environ, folder)
    try:
        running.wait(lambda: ready(running), "ready", READY_S)
        yield
    finally:
        running.stop()


@contextmanager
def arms() -> Iterator[dict[str, Arm]]:
    """Both, each with a root of its own on the same file system."""
    with ExitStack() as open_now:
        folder = Path(open_now.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=cache_folder())))
        sockets = {"ours": folder / "s.sock", "containerd's": folder / "o.sock"}
        nats = f"nats://127.0.0.1:{free_port()}"  # nobody is there: the calls depend on no bus
        ours = ["-m", "soci_snapshotter", "--root", str(folder / "s"), "--address", str(sockets["ours"])]
        ours += ["--nats-url", nats, "--node", "bench"]
        open_now.enter_context(daemon("ours", folder, [sys.executable, *ours], Daemon.said_ready))
        overlay = [str(go_program("overlayserver")), str(folder / "o"), str(sockets["containerd's"])]
        listening = sockets["containerd's"]
        open_now.enter_context(daemon("overlay", folder, overlay, lambda _: listening.exists()))
        made = {name: Arm(socket) for name, socket in sockets.items()}
        yield made
        for arm in made.values():
            arm.channel.close()


def run_rounds(pair: dict[str, Arm], name: str, depth: int, rounds: int, source: random.Random) -> None:
    """Each round on both, in an order that is drawn."""
    for number in range(-min(WARM_UP, rounds), rounds):
        if number == 0:
            for arm in pair.values():
                arm.rounds.pop(name, None)
        for arm in source.sample(list(pair.values()), len(pair)):
            arm.timed(name, depth)
        if number % CLEAN_EVERY == 0:
            for arm in pair.values():
                arm.cleanup()


def compare(name: str, ours: list[float], theirs: list[float]) -> str:
    """A line: the ratio of medians, and both in milliseconds."""
    mine, its = statistics.median(ours) * 1000, statistics.median(theirs) * 1000
    return (
        f"{name:34} {mine / its:5.2f} x containerd's overlayfs  ({mine:7.3f} ms and {its:7.3f} ms, {len(ours)} times)"
    )


@click.command()
@click.option("--rounds", default=400, show_default=True, help="Rounds of one layer; a tenth of it of chains.")
@click.option("--seed", default=1, show_default=True, help="Of the order.")
def main(*, rounds: int, seed: int) -> None:
    """Prepare, Mounts, Commit and Remove: ours against containerd's overlayfs, on unix sockets, by the same client."""
    source = random.Random(seed)
    chain = f"a chain of {CHAIN} layers"
    with arms() as pair:
        run_rounds(pair, "one layer", 1, rounds, source)
        single = {name: {method: list(found) for method, found in arm.calls.items()} for name, arm in pair.items()}
        run_rounds(pair, chain, CHAIN, max(1, rounds // 10), source)
    ours, theirs = pair["ours"], pair["containerd's"]
    for name in ("one layer", chain):
        click.echo(compare(name, ours.rounds[name], theirs.rounds[name]))
    for method, found in single["ours"].items():
        click.echo(compare(f"  {method}, of one layer", found, single["containerd's"][method]))


if __name__ == "__main__":
    main()
