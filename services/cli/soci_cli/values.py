# SPDX-License-Identifier: Apache-2.0
"""What every command knows: the global flags, and the words in which users write times and sizes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from soci.errors import InvalidConfig
from soci.platforms import parse_platform

VERSION: Final = "0.1.0"
COMPATIBLE_VERSION: Final = "0.15.0"
"""The release of the reference implementation whose command line this one follows. nerdctl takes the first x.y.z
that ``soci --version`` prints, and refuses to work with one below 0.10."""

DEFAULT_ADDRESS: Final = "/run/containerd/containerd.sock"
DEFAULT_NAMESPACE: Final = "default"
DEFAULT_SNAPSHOTTER: Final = "sociable"
DEFAULT_NATS: Final = "nats://127.0.0.1:4222"
DEFAULT_ROOT: Final = "/var/lib/soci-snapshotter-grpc"
CONTENT_STORES: Final = ("containerd", "soci")
DEFAULT_PLATFORM: Final = str(parse_platform(f"linux/{os.uname().machine}"))

_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Globals:
    """The flags before the verb. ``timeout`` in seconds for the whole command; 0 is none."""

    address: str = DEFAULT_ADDRESS
    namespace: str = DEFAULT_NAMESPACE
    timeout: float = 0.0
    debug: bool = False
    nats_url: str = DEFAULT_NATS
    node: str = ""
    content_store: str = "containerd"
    root: Path = Path(DEFAULT_ROOT)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``1.5`` or the forms that Go's tools take, as ``1m30s``. Raises `InvalidConfig`."""
    if _NUMBER.fullmatch(text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise InvalidConfig(f"not a duration: {text[:40]!r}; write seconds, or as in 1m30s")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def human_bytes(count: int) -> str:
    """``512 B``, ``4.2 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
