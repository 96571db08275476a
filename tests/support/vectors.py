# SPDX-License-Identifier: Apache-2.0
"""The golden zTOCs in tests/vectors: layers, and what another builder of the format made of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent / "vectors"


@cache
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "vectors.json").read_text("utf-8"))
    return found


def vectors(**wanted: object) -> list[dict[str, Any]]:
    """The vectors whose fields equal ``wanted``."""
    return [v for v in manifest()["vectors"] if all(v.get(key) == value for key, value in wanted.items())]


def label(vector: dict[str, Any]) -> str:
    """A test's id."""
    return f"{vector['name']}-{vector.get('span_size', '')}".strip("-")


def content(name: str) -> bytes:
    return (ROOT / name).read_bytes()
