# SPDX-License-Identifier: Apache-2.0
"""What the builder of an index says meanwhile: lines of layers on stdout, bars on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from soci.digest import Digest
from soci_indexing.build import LayerBegun, LayerDone, LayerRead, Noticed, Progress


def layer_line(done: LayerDone) -> str:
    """The line of a layer that is done."""
    if done.ztoc is None:
        return f"ztoc skipped - layer {done.layer.digest} ({done.layer.media_type}): {done.skipped}"
    return f"layer {done.layer.digest} -> ztoc {done.ztoc}" + (" (already exists)" if done.reused else "")


class BuildScreen:
    """Shows a build; a context manager. ``quiet`` shows warnings only; bars are shown where stderr is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bars: Any = None
        self._tasks: dict[Digest, Any] = {}

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bars = make_bars()
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def report(self, progress: Progress) -> None:
        """A `soci_indexing.build.Report`."""
        match progress:
            case LayerBegun(layer):
                if self._bars is not None:
                    self._tasks[layer.digest] = self._bars.add_task(layer.digest[:19], total=layer.size)
            case LayerRead(layer, count):
                if layer.digest in self._tasks:
                    self._bars.advance(self._tasks[layer.digest], count)
            case LayerDone(layer):
                if layer.digest in self._tasks:
                    self._bars.remove_task(self._tasks.pop(layer.digest))
                if not self._quiet:
                    print(layer_line(progress), flush=True)
            case Noticed(message):
                warn(message)


def warn(message: str) -> None:
    """A warning on stderr."""
    print(f"soci: warning: {message}", file=sys.stderr, flush=True)


def make_bars() -> Any:
    """Bars of bytes on stderr that vanish when all is done."""
    from rich.console import Console  # noqa: PLC0415  (heavy, and only for terminals)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a file or pipe gets our lines unchanged
    )
