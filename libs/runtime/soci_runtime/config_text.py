# SPDX-License-Identifier: Apache-2.0
"""The configuration as text: the file with all defaults, and the file of what holds now with the source of each value.

Both read back to the same configuration. A secret is never written: its line stands as a comment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from soci_runtime.config import Loaded
from soci_runtime.inert import INERT
from soci_runtime.setting import Setting
from soci_runtime.settings import SAME_AS_HTTP, SETTINGS

REDACTED = "redacted"


def default_text() -> str:
    """A file that sets every setting to its default, with what it means."""

    def lines(setting: Setting) -> Iterable[str]:
        unit = f" ({setting.kind.unit})" if setting.kind.unit else ""
        yield f"# {setting.meaning}{unit}"
        follows = setting.field in SAME_AS_HTTP  # written as a value of its own it would not any more
        yield f"{_name(setting)} = {'0' if follows else setting.kind.write(setting.default)}"

    tables = _tables(lines)
    inert = [f"# {one.key}: {one.why}" for one in INERT]
    return "\n".join([*tables, "# Keys of the reference that are accepted and do nothing here:", *inert, ""])


def dump_text(loaded: Loaded) -> str:
    """The file of what holds, each value with who set it."""

    def lines(setting: Setting) -> Iterable[str]:
        value = getattr(loaded.config, setting.field)
        origin = loaded.origins.get(setting.field, "default").replace("\n", " ")
        shown = redacted(setting, value)
        comment = "# " if shown != value else ""
        yield f"{comment}{_name(setting)} = {setting.kind.write(shown)}  # {origin}"

    return "\n".join(_tables(lines))


def redacted(setting: Setting, value: Any) -> Any:
    """``value`` as it may be shown: a secret is not, nor is the login within a URL."""
    if setting.secret and value:
        return REDACTED
    if setting.field == "nats_url":
        return ",".join(map(_without_login, value.split(",")))
    if setting.field == "resolver_hosts":
        return tuple(
            (host, tuple(replace(one, host=_without_login(one.host)) for one in mirrors)) for host, mirrors in value
        )
    return value


def _without_login(url: str) -> str:
    scheme, mark, rest = url.rpartition("://")
    login, at, host = rest.rpartition("@")
    return f"{scheme}{mark}{REDACTED}@{host}" if at and login else url


def _name(setting: Setting) -> str:
    return setting.key.rpartition(".")[2]


def _tables(lines: Callable[[Setting], Iterable[str]]) -> list[str]:
    """All settings, grouped by table; those without one come first, as TOML wants it."""
    text: list[str] = []
    for table in sorted({one.key.rpartition(".")[0] for one in SETTINGS}):
        text += [f"[{table}]"] if table else []
        for setting in SETTINGS:
            if setting.key.rpartition(".")[0] == table:
                text += lines(setting)
        text.append("")
    return text
