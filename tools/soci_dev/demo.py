# SPDX-License-Identifier: Apache-2.0
"""``./dev demo``: a real image, launched by an ordinary full pull and then lazily, side by side.

The same registry behind the same counting proxy, the same containerd, the same runner; the page cache dropped before
each launch. Fails when the outputs differ, or when the lazy launch moves half of the image or more.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from rich.console import Console
from rich.table import Table

from soci.errors import SociError
from soci_dev import image
from soci_dev.containerd_config import SNAPSHOTTER
from soci_dev.demo_image import REPOSITORY, demo_image
from soci_dev.launching import Launch, LayerMode, measure, parse_launches, parse_modes
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack, default_folder
from soci_dev.up import usage, wait_for_interrupt

FETCHERS: Final = 2
MAX_SHARE: Final = 0.5
"""A lazy launch that moves this share of the image or more has failed."""

PLAIN_WIDTH: Final = 120
"""Columns where there is no terminal to ask."""

_EAGER: Final = "overlayfs"
_EVENTS_LIMIT_S: Final = 10.0
_MB: Final = 1e6


def run_demo(*, keep: bool, rtt_ms: float = 0.0, mbit: float = 0.0) -> int:
    """The whole demo; 0 if the lazy launch kept its promises. The proxy delays and throttles as asked."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    begun = time.monotonic()
    say = _say(console, begun)
    built = demo_image(say)
    say(f"image: {len(built.layers)} gzip layers, {built.size / _MB:.0f} MB")
    with ExitStack() as open_now:
        stack = open_now.enter_context(Stack(default_folder("demo"), fetchers=FETCHERS, progress=say))
        proxy = open_now.enter_context(Proxy(stack.registry))
        reference = image.push(built, proxy.address, REPOSITORY)
        say(f"pushed as {reference}")
        stack.soci("index", "build", reference)
        say("indexed: a table of contents and span checkpoints for each large layer, pushed beside the image")
        proxy.rtt_s, proxy.bandwidth = rtt_ms / 1000, int(mbit * 125_000) or None
        say("launch 1: an ordinary full pull, then run, on overlayfs")
        eager = _launch_eager(stack, proxy, reference)
        say("launch 2: lazily, through Sociable")
        lazy = measure(proxy, [stack.soci_command("run", "--snapshotter", SNAPSHOTTER, "--plain-http", reference)])
        launch, modes = _modes(stack, reference)
        console.print()
        console.print(comparison(eager, lazy, built.size))
        console.print(layers_table(built, modes))
        console.print(_where_next(stack, launch, keep=keep))
        verdicts = judge(eager, lazy, built.size)
        for passed, text in verdicts:
            console.print(f"[{'green' if passed else 'red'}]{'ok' if passed else 'FAILED'}[/] {text}")
        if keep:
            console.print(usage(stack), markup=False)
            wait_for_interrupt(stack)
        say("cleaning up")
    return 0 if all(passed for passed, _ in verdicts) else 1


def _launch_eager(stack: Stack, proxy: Proxy, reference: str) -> Launch:
    pull = stack.ctr_command("images", "pull", "--plain-http", "--snapshotter", _EAGER, reference)
    run = stack.soci_command("run", "--pull", "never", "--snapshotter", _EAGER, "--plain-http", reference)
    launch = measure(proxy, [pull, run])
    # Else the second launch would find the blobs in containerd's content store and move too little.
    stack.ctr("images", "rm", "--sync", reference)
    left = stack.ctr("content", "ls", "-q").stdout.split()
    if left:
        stack.ctr("content", "rm", *left)
    return launch


def judge(eager: Launch, lazy: Launch, image_size: int) -> list[tuple[bool, str]]:
    """The demo's promises: each kept or not, in words."""
    share = lazy.counts.body_bytes / image_size
    equal = eager.output == lazy.output
    return [
        (equal, "both launches printed the same" if equal else f"outputs differ:\n{eager.output}\n{lazy.output}"),
        (
            share < MAX_SHARE,
            f"the lazy launch moved {share:.0%} of the image's {image_size / _MB:.0f} MB (limit: half)",
        ),
    ]


def comparison(eager: Launch, lazy: Launch, image_size: int) -> Table:
    """The two launches side by side."""
    table = Table(title="The same image, launched twice", title_justify="left")
    table.add_column("")
    table.add_column("full pull", justify="right")
    table.add_column("Sociable", justify="right")
    both = (eager, lazy)
    table.add_row("time to ready", *(f"{launch.ready_s:.2f} s" for launch in both))
    table.add_row("time to the end", *(f"{launch.total_s:.2f} s" for launch in both))
    table.add_row("moved until ready", *(f"{launch.ready_bytes / _MB:.1f} MB" for launch in both))
    table.add_row("moved in all", *(f"{launch.counts.body_bytes / _MB:.1f} MB" for launch in both))
    table.add_row("share of the image", *(f"{launch.counts.body_bytes / image_size:.0%}" for launch in both))
    table.add_row("requests", *(str(launch.counts.requests) for launch in both))
    table.add_row("at once, at most", *(str(launch.counts.peak) for launch in both))
    return table


def layers_table(built: image.Image, modes: Sequence[LayerMode]) -> Table:
    """How each layer came to the lazy launch, and why."""
    by_layer = {mode.layer: mode for mode in modes}
    table = Table(title="Layers of the lazy launch", title_justify="left")
    table.add_column("layer")
    table.add_column("MB", justify="right")
    table.add_column("came")
    table.add_column("because")
    for layer in built.layers:
        mode = by_layer.get(str(layer["digest"]))
        came, why = (mode.mode, shortened(mode.why)) if mode else ("?", "no event of this layer was seen")
        table.add_row(str(layer["digest"])[7:19], f"{layer['size'] / _MB:.1f}", came, why)
    return table


def shortened(text: str) -> str:
    """Digests cut to what a reader compares."""
    return re.sub(r"sha256:([0-9a-f]{12})[0-9a-f]{52}", r"\1", text)


def _modes(stack: Stack, reference: str) -> tuple[str | None, list[LayerMode]]:
    """The lazy launch's id and layers, from its events; they may arrive a moment after the program ended."""
    end = time.monotonic() + _EVENTS_LIMIT_S
    while True:
        try:
            launch = parse_launches(stack.soci("launch", "ls", "--json").stdout, reference)
            modes = parse_modes(stack.soci("launch", "show", "--json", launch).stdout) if launch else []
        except (SociError, ValueError):
            launch, modes = None, []
        if modes or time.monotonic() > end:
            return launch, modes
        time.sleep(0.2)


def _where_next(stack: Stack, launch: str | None, *, keep: bool) -> str:
    show = f"soci launch show {launch or 'ID'}"
    if keep:
        return f"\nWhere next: {show}; logs in {stack.logs}"
    lines = [
        "",
        "Where next: ./dev demo --keep leaves it running, to look around with",
        f"  {show}",
        "  soci launch ls",
        "./dev demo --mbit 200 --rtt-ms 20 shows a slower network; ./dev up starts an empty stack.",
    ]
    return "\n".join(lines)


def _say(console: Console, begun: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.print(f"{time.monotonic() - begun:6.1f} s  {text}", markup=False, soft_wrap=True)

    return say
