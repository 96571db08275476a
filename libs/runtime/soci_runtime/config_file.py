# SPDX-License-Identifier: Apache-2.0
"""One configuration file: a TOML text to the fields it sets, and what is to be said of the rest of it."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from soci.errors import InvalidConfig
from soci_runtime import kinds
from soci_runtime.inert import INERT_BY_KEY, Inert
from soci_runtime.setting import Setting
from soci_runtime.settings import BY_KEY, SAME_AS_HTTP

MOST_SLIPS = 20
"""Unknown keys that are named; of more only the number is told."""
_KEYS = (*BY_KEY, *INERT_BY_KEY)
_TABLES = frozenset(key.rsplit(".", depth)[0] for key in _KEYS for depth in range(1, key.count(".") + 1))


@dataclass(slots=True)
class Parsed:
    """What a file says. ``keys`` has the key, as the file spells it, for each field of ``values``."""

    values: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    slips: list[str] = field(default_factory=list)  # keys that nobody knows, with the nearest that is known
    without_effect: list[Inert] = field(default_factory=list)  # set to something else than is usual


def parse_file(text: str, where: str) -> Parsed:
    """The fields that a TOML text sets; ``where`` is the file's name in errors. Raises `InvalidConfig`."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # beside its own: numbers too long for int, tables too deep
        raise InvalidConfig(f"{where}: {str(error)[:500]}") from error
    parsed = Parsed()
    unknown: list[tuple[str, str]] = []
    seen: set[str] = set()
    for spelled, value in _leaves(tables, "", where, unknown):
        key = spelled.lower()
        if key in seen:
            raise InvalidConfig(f"{where}: {spelled} is there twice")
        seen.add(key)
        if key in BY_KEY:
            _take(BY_KEY[key], spelled, value, f"{where}: {spelled}", parsed)
        else:
            inert = INERT_BY_KEY[key]
            if inert.kind.read(value, f"{where}: {spelled}") not in inert.usual:
                parsed.without_effect.append(inert)
    for name, same in SAME_AS_HTTP.items():
        if name not in parsed.values and same in parsed.values:
            parsed.values[name], parsed.keys[name] = parsed.values[same], parsed.keys[same]
    parsed.slips += [_slip(spelled, within) for spelled, within in unknown[:MOST_SLIPS]]
    if len(unknown) > MOST_SLIPS:
        parsed.slips.append(f"and {len(unknown) - MOST_SLIPS} more")
    return parsed


def _leaves(
    table: Mapping[str, Any], prefix: str, where: str, unknown: list[tuple[str, str]]
) -> Iterator[tuple[str, Any]]:
    """Each known key with its value; the others go to ``unknown``, with the table they are in."""
    for name, value in table.items():
        spelled = prefix + name
        key = spelled.lower()
        if key in BY_KEY or key in INERT_BY_KEY:
            yield spelled, value
        elif key not in _TABLES:
            unknown.append((spelled[:200], prefix.lower()))
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{spelled}.", where, unknown)
        else:
            raise kinds.wrong(value, "a table", f"{where}: {spelled}")


def _take(setting: Setting, spelled: str, value: Any, where: str, parsed: Parsed) -> None:
    found = setting.take(value, where) if not _stands_for_default(setting, value) else setting.default
    if setting.kind is kinds.MIRRORS:
        parsed.slips += kinds.slips_of(value, spelled)[:MOST_SLIPS]
    if not _stands_for_default(setting, value):
        parsed.values[setting.field], parsed.keys[setting.field] = found, spelled


def _stands_for_default(setting: Setting, value: Any) -> bool:
    return setting.zero and not isinstance(value, bool) and value in (0, "")


def _slip(spelled: str, within: str) -> str:
    """The key, and the one that was probably meant: of the same table, or of that name in another."""
    name = spelled.lower().removeprefix(within)
    beside = {key.removeprefix(within).split(".")[0] for key in _KEYS if key.startswith(within)}
    near = difflib.get_close_matches(name, sorted(beside), 1)
    if near:
        return f"{spelled} (is {within}{near[0]} meant?)"
    by_name = {key.rpartition(".")[2]: key for key in _KEYS}
    far = difflib.get_close_matches(name, sorted(by_name), 1, 0.8)
    return f"{spelled} (is {by_name[far[0]]} meant?)" if far else spelled
