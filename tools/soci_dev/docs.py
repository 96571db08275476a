# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/configuration.md, made from the settings themselves so that they cannot be wrong.

``python -m soci_dev.docs`` writes them between their marks; with ``--check`` it only compares, and says what to run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from soci.errors import InvalidInput
from soci_dev.folders import CHECKOUT
from soci_runtime.inert import INERT
from soci_runtime.setting import Setting
from soci_runtime.settings import SAME_AS_HTTP, SETTINGS

PAGE: Final = CHECKOUT / "docs" / "configuration.md"
WAY_OUT: Final = "run ./dev docs and commit what it writes"


def settings_table() -> str:
    """One row a setting."""
    rows = [
        "| key | type, unit | default | flag, environment | since | the reference's | means |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*rows, *map(_row, SETTINGS)])


def inert_table() -> str:
    """One row a key that does nothing."""
    rows = [f"| {_key(one.key)} | {one.why} |" for one in INERT]
    return "\n".join(["| key | why it does nothing |", "| --- | --- |", *rows])


def _row(setting: Setting) -> str:
    kind = f"{setting.kind.name}, {setting.kind.unit}" if setting.kind.unit else setting.kind.name
    ways = ", ".join(f"`{way}`" for way in (setting.flag, setting.environment) if way)
    default = "`[http]`'s" if setting.field in SAME_AS_HTTP else f"`{setting.kind.write(setting.default)}`"
    name = f"`{setting.reference}`" if setting.reference else "" if setting.ours else "same"
    columns = (_key(setting.key), kind, default, ways, setting.since, name, _meaning(setting))
    return "| " + " | ".join(column.replace("|", "\\|") for column in columns) + " |"


def _meaning(setting: Setting) -> str:
    choices = f" ({', '.join(f'`{one}`' for one in setting.choices)})" if setting.choices else ""
    return setting.meaning + choices


def _key(key: str) -> str:
    table, _, name = key.rpartition(".")
    return f"`[{table}] {name}`" if table else f"`{name}`"


def filled(page: str) -> str:
    """``page`` with what stands between its marks made anew. Raises `InvalidInput` where a mark is absent."""
    for name, table in (("settings", settings_table()), ("inert", inert_table())):
        begin, end = f"<!-- {name}: made by ./dev docs -->\n", f"\n<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise InvalidInput(f"the page has not both marks of the table {name!r}")
        page = page[: page.index(begin)] + begin + table + page[page.index(end) :]
    return page


def run(*, check: bool, page: Path = PAGE) -> int:
    """Fill the page, or compare; 1 where it would have changed."""
    before = page.read_text(encoding="utf-8")
    after = filled(before)
    if check:
        if before != after:
            print(f"{page.name} is not what the settings say: {WAY_OUT}")
        return int(before != after)
    if before != after:
        page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(check="--check" in sys.argv[1:]))
