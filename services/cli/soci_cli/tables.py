# SPDX-License-Identifier: Apache-2.0
"""Tables and ages as people and their scripts know them from tools of this kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

MIN_WIDTH: Final = 8
PADDING: Final = 4


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of at least `MIN_WIDTH`, `PADDING` spaces after the widest cell, no spaces at the ends of lines."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(MIN_WIDTH, *(len(line[at]) + PADDING for line in lines)) for at in range(len(headers))]
    return "\n".join("".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def ago(created_at: int, now: int) -> str:
    """``5m3s ago``; ``n/a`` where the time (ns since the epoch) is not known."""
    if created_at <= 0:
        return "n/a"
    minutes, seconds = divmod(max(0, now - created_at) // 1_000_000_000, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{seconds}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    if hours:
        text = f"{hours}h{text}"
    return f"{text} ago"


def indented(value: Any) -> str:
    """JSON for people: two spaces, text as it is."""
    return json.dumps(value, indent=2, ensure_ascii=False)
