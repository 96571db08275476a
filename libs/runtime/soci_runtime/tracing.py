# SPDX-License-Identifier: Apache-2.0
"""Steps of a launch's trace, sent by OTLP when the environment names an endpoint (``OTEL_EXPORTER_OTLP_ENDPOINT``).

A *step* is what tracing calls a span (that word is taken here). The trace id of all steps of a launch is the launch
id. A step costs tens of microseconds: one a Prepare, a mount, a miss and a fetch, none a read that was served here.
Without an endpoint nothing of OpenTelemetry is imported, and only the ids travel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from soci.launch import LaunchId, TraceParent, new_launch_id, new_traceparent

EXPORT_TIMEOUT_MS = 2_000
"""How long leaving steps may hold up the end of a process."""
QUEUE_SIZE = 2_048
"""Finished steps that wait for export; more are dropped (OpenTelemetry's own limit, named)."""

_tracer: Any = None
_provider: Any = None
_root: ContextVar[LaunchId | None] = ContextVar("launch of the root step", default=None)


def configure_tracing(service: str, node: str) -> None:
    """Send steps from now on, if ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``…_TRACES_ENDPOINT``) is set."""
    global _tracer, _provider  # noqa: PLW0603  one exporter a process, set once at start
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return  # its tracer would give steps without ids
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  118 ms
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator  # noqa: PLC0415

    class LaunchIds(RandomIdGenerator):
        """Gives a root step the trace id that is its launch's id."""

        def generate_trace_id(self) -> int:
            launch = _root.get()
            return (int(launch, 16) if launch else 0) or super().generate_trace_id()

    resource = Resource.create({"service.name": service, "service.namespace": "sociable", "host.name": node})
    _provider = TracerProvider(resource=resource, id_generator=LaunchIds())
    exporter = OTLPSpanExporter(timeout=EXPORT_TIMEOUT_MS // 1000)
    _provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=QUEUE_SIZE, export_timeout_millis=EXPORT_TIMEOUT_MS)
    )
    _tracer = _provider.get_tracer("sociable")


def stop_tracing() -> None:
    """Send what is left; waits `EXPORT_TIMEOUT_MS` at most."""
    global _tracer, _provider  # noqa: PLW0603
    if _provider is not None:
        _provider.force_flush(EXPORT_TIMEOUT_MS)
        _provider.shutdown()
    _tracer = _provider = None


@contextmanager
def step(
    name: str, parent: TraceParent | None, *, launch: LaunchId | None = None, **facts: Any
) -> Iterator[TraceParent]:
    """One step under ``parent``; without one it is the root of the trace of ``launch`` (or of a new launch).

    Yields the place under which what is asked of others hangs. An exception marks the step failed and goes on.
    """
    if _tracer is None:
        yield parent or new_traceparent(launch)
        return
    from opentelemetry import trace  # noqa: PLC0415  imported already by configure_tracing

    token = _root.set(launch or new_launch_id())
    try:
        context = trace.set_span_in_context(trace.INVALID_SPAN)
        if parent is not None:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT)
            place = trace.SpanContext(int(parent.launch, 16), int(parent.step, 16), is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(place))
        with _tracer.start_as_current_span(
            name, context=context, attributes={key: value for key, value in facts.items() if value is not None}
        ) as span:
            place = span.get_span_context()
            yield TraceParent(LaunchId(f"{place.trace_id:032x}"), f"{place.span_id:016x}", place.trace_flags.sampled)
    finally:
        _root.reset(token)
