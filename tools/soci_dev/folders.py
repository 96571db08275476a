# SPDX-License-Identifier: Apache-2.0
"""Where the developer's tools keep things: the checkout, and one cache folder a machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DEFAULT_CACHE = "/var/cache/sociable"


def cache_folder() -> Path:
    """The machine-wide cache (``SOCIABLE_CACHE``), made if absent: a clean clone builds nothing twice."""
    folder = Path(os.environ.get("SOCIABLE_CACHE") or DEFAULT_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (flock(2), freed by the kernel when a holder dies)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
