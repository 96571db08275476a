# SPDX-License-Identifier: Apache-2.0
"""Log lines: one JSON object a line on stdout, with the keys that operators of the reference grep for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()
"""The one logger. ``log.info("message", key=value)``."""


def _stamp(_logger: Any, level: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    now = time.time_ns()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 1_000_000_000))
    error = fields.get("error")
    if isinstance(error, BaseException):
        fields["error"] = str(error) or type(error).__name__
        fields["error_type"] = type(error).__name__
    line = {"level": level, "msg": fields.pop("event"), "time": f"{whole}.{now % 1_000_000_000:09d}Z"}
    return line | {key: value for key, value in fields.items() if key not in line}


def configure_logs(level: str, service: str) -> None:
    """Log at ``level`` and above from now on; each line names the ``service``."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            _stamp,
            # ASCII: a file name that is no UTF-8 must not fail the line, nor a terminal that speaks another tongue.
            structlog.processors.JSONRenderer(ensure_ascii=True, default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stdout),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service)
