# SPDX-License-Identifier: Apache-2.0
"""Which launch a call belongs to: from the first Prepare for an image until its container is prepared. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from soci.launch import TraceParent

OPEN_LAUNCHES = 1024
"""Launches that may be under way; the one not heard of for longest is closed when one more begins."""
LAUNCH_GAP = 120.0
"""Seconds without a call, after which the next call for the image begins another launch."""


@dataclass(slots=True)
class OpenLaunch:
    """A launch under way, and when it was last heard of (monotonic seconds)."""

    trace: TraceParent
    heard: float


class Launches:
    """The open launches of this node, by namespace and image manifest."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str], OpenLaunch] = OrderedDict()

    def find(self, namespace: str, manifest: str, told: TraceParent | None, now: float) -> TraceParent | None:
        """The open launch that this call belongs to, if there is one. ``told`` is the trace that the client began."""
        launch = self._open.get((namespace, manifest))
        if launch is None or now - launch.heard > LAUNCH_GAP or (told and told.launch != launch.trace.launch):
            return None
        launch.heard = now
        self._open.move_to_end((namespace, manifest))
        return launch.trace

    def begin(self, namespace: str, manifest: str, trace: TraceParent, now: float) -> None:
        """A launch begins."""
        self._open[namespace, manifest] = OpenLaunch(trace, now)
        self._open.move_to_end((namespace, manifest))
        while len(self._open) > OPEN_LAUNCHES:
            self._open.popitem(last=False)

    def end(self, namespace: str, manifest: str) -> None:
        """Its container is prepared: the next container of the image is another launch."""
        self._open.pop((namespace, manifest), None)
