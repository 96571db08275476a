# SPDX-License-Identifier: Apache-2.0
"""One launch of the demo, measured: from the first request of the pull to the program's ready line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.errors import DeadlineExceeded, Unavailable
from soci_dev.demo_image import READY
from soci_dev.processes import run_checked
from soci_dev.proxy import Counts, Proxy

LAUNCH_LIMIT_S: Final = 300.0
_STOP_GRACE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch took. ``ready_s`` is until the ready line, ``total_s`` until the program ended."""

    ready_s: float
    total_s: float
    ready_bytes: int
    counts: Counts
    output: str


@dataclass(frozen=True, slots=True)
class LayerMode:
    """How a layer came, from the launch's events."""

    layer: str
    mode: str
    why: str


def measure(proxy: Proxy, commands: Sequence[list[str]]) -> Launch:
    """Run ``commands`` one after the other; the last one's output holds the ready line.

    Raises `Unavailable` with the output of the one that fails, `DeadlineExceeded`.
    """
    drop_page_cache()
    proxy.reset()
    begun = time.monotonic()
    for command in commands[:-1]:
        run_checked(command, LAUNCH_LIMIT_S)
    ready: list[tuple[float, int]] = []

    def seen(line: str) -> None:
        if line.strip() == READY and not ready:
            ready.append((time.monotonic() - begun, proxy.counts.body_bytes))

    output = _run_to_the_end(commands[-1], begun + LAUNCH_LIMIT_S, seen)
    if not ready:
        raise Unavailable(f"no line {READY!r} in the output of {' '.join(commands[-1])}:\n{output}")
    return Launch(ready[0][0], time.monotonic() - begun, ready[0][1], proxy.counts, output)


def drop_page_cache() -> None:
    """Make both launches start as cold as a node that never saw the image; silently impossible in some containers."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def parse_launches(text: str, image: str) -> str | None:
    """The id of the newest launch of ``image`` in what ``soci launch ls --json`` prints: an array, newest first."""
    launches = json.loads(text)
    return next((str(launch["id"]) for launch in launches if launch.get("image") == image), None)


def parse_modes(text: str) -> list[LayerMode]:
    """The layers of what ``soci launch show --json`` prints."""
    layers = json.loads(text).get("layers", [])
    return [LayerMode(layer["layer"], layer["mode"], layer["why"]) for layer in layers]


def _run_to_the_end(command: list[str], deadline: float, seen: Callable[[str], None]) -> str:
    """The command's standard output, each line shown to ``seen`` as it comes."""
    lines: list[str] = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        # The pipe's reader would wait for ever on a launch that hangs; a timer ends the process instead.
        timer = _EndAt(process, deadline)
        try:
            for line in process.stdout or ():
                lines.append(line)
                seen(line)
            status = process.wait(_STOP_GRACE_S)
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
        if timer.fired:
            raise DeadlineExceeded(f"no end within {LAUNCH_LIMIT_S:g} s: {' '.join(command)}\n{''.join(lines)}")
        if status:
            errors.seek(0)
            raise Unavailable(f"status {status} of {' '.join(command)}\n{errors.read()}{''.join(lines)}")
    return "".join(lines)


class _EndAt:
    """SIGTERM to a process at a moment (`time.monotonic`) unless cancelled before."""

    def __init__(self, process: subprocess.Popen[str], deadline: float) -> None:
        self.fired = False
        self._process = process
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._fire)
        self._timer.daemon = True
        self._timer.start()

    def _fire(self) -> None:
        self.fired = True
        self._process.terminate()

    def cancel(self) -> None:
        self._timer.cancel()
