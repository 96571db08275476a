# SPDX-License-Identifier: Apache-2.0
"""How a setting's value is read from TOML, the environment or a flag, and written as TOML again.

A kind is a pair of pure functions: ``read`` gives the value in base units or raises `InvalidConfig` that says what it
wants, ``write`` gives a TOML value that reads back as the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from soci.errors import InvalidConfig
from soci_runtime.values import ACTIVATED, UNLIMITED, MirrorSetting

LONGEST_SECONDS = 86_400.0
"""The longest of the times that may be set."""
MOST_HOSTS = 256
"""Registry hosts with mirrors."""
MOST_MIRRORS = 32
"""Mirrors of one host."""
MOST_WORDS = 1024
"""Entries of a list."""

SOCKET_PATH = 107
"""Bytes of a socket's path: sun_path of unix(7) has 108, with its NUL."""
LEVELS = ("debug", "info", "warning", "error")
LEVEL_NAMES = {"trace": "debug", "warn": "warning", "fatal": "error", "panic": "error"}
"""Levels of the reference that are one of ours."""

Hosts = tuple[tuple[str, tuple[MirrorSetting, ...]], ...]
_NODE = re.compile(r"[A-Za-z0-9_-]{0,64}")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*(b|kb|mb|gb)?\s*", re.IGNORECASE)
_BEYOND = 1 << 62
"""A number that is out of every range, and still a float."""
_MIRROR = frozenset({"host", "insecure", "request_timeout_sec"})
_SIZES = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


@dataclass(frozen=True, slots=True)
class Kind:
    """``name`` as the documentation has it; ``unit`` of the value in the file; see the module for the functions."""

    name: str
    read: Callable[[Any, str], Any]
    write: Callable[[Any], str]
    unit: str = ""


def wrong(value: Any, wanted: str, where: str) -> InvalidConfig:
    """The error for a value of another type; a long one is cut."""
    return InvalidConfig(f"{where}: {repr(value)[:100]} is not {wanted}")


def quoted(text: str) -> str:
    """``text`` as a TOML basic string, which escapes as JSON does (but DEL, which JSON leaves as it is)."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(value, "true or false", where)
    return value


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong(value, "a whole number", where)
    return value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong(value, "a number", where)
    try:
        return float(value)
    except OverflowError as error:
        raise wrong(value, "a number", where) from error


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise wrong(value, "a text", where)
    return value


def _path(value: Any, where: str) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or value == "" or "\0" in value:
        raise wrong(value, "a path", where)
    return Path(value)


def _socket(value: Any, where: str) -> str:
    path = _text(value, where).removeprefix("unix://")
    if not path.startswith("/") or len(path.encode(errors="surrogateescape")) > SOCKET_PATH:
        raise wrong(value, f"an absolute path of a socket, of at most {SOCKET_PATH} bytes", where)
    return path


def _address(value: Any, where: str) -> str:
    return ACTIVATED if value == ACTIVATED else _socket(value, where)


def _node(value: Any, where: str) -> str:
    if not _NODE.fullmatch(_text(value, where)):
        raise wrong(value, "1 to 64 letters, digits, '-' or '_'", where)
    return str(value)


def _level(value: Any, where: str) -> str:
    name = _text(value, where).lower()
    level = LEVEL_NAMES.get(name, name)
    if level not in LEVELS:
        raise InvalidConfig(f"{where}: {name[:100]!r} is none of {', '.join((*LEVELS, *LEVEL_NAMES))}")
    return level


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MOST_WORDS or not all(isinstance(one, str) for one in value):
        raise wrong(value, f"a list of at most {MOST_WORDS} texts", where)
    return tuple(value)


def _milliseconds(value: Any, where: str) -> float:
    return max(-_BEYOND, min(_whole(value, where), _BEYOND)) / 1000


def _or_never(value: Any, where: str) -> float:
    seconds = _number(value, where)
    return math.inf if seconds < 0 else seconds


def _or_unlimited(value: Any, where: str) -> int:
    return max(_whole(value, where), UNLIMITED)


def _retries(value: Any, where: str) -> int:
    return max(_whole(value, where), 0)


def _attempts(value: Any, where: str) -> int:
    retries = _whole(value, where)
    return 4 if retries < 0 else retries + 1  # the reference: a negative number selects three more


def size_of(value: Any, where: str) -> int:
    """Bytes of ``16mb``, ``1.5 GB``, ``"4096"`` or a whole number; 1024-based, as the reference has it."""
    if isinstance(value, int):
        return _whole(value, where)
    found = _SIZE.fullmatch(_text(value, where)[:100])
    if value == "":
        return 0
    if not found:
        raise wrong(value, "a size: a number of bytes, or one with b, kb, mb or gb", where)
    return int(Decimal(found[1]) * _SIZES[(found[2] or "").lower()])


def mirrors_of(value: Any, where: str) -> Hosts:
    """The reference's ``[resolver.host]``: for each host its mirrors, in order. Keys in whatever case."""
    hosts = {}
    for name, table in _table(value, where).items():
        place = f"{where}.{quoted(name)[:200]}"
        entries = _lower(table, place).get("mirrors", [])
        if not isinstance(entries, list) or len(entries) > MOST_MIRRORS:
            raise wrong(entries, f"a list of at most {MOST_MIRRORS} tables", f"{place}.mirrors")
        if name.lower() in hosts:
            raise InvalidConfig(f"{place} is there twice")
        hosts[name.lower()] = tuple(_mirror(one, f"{place}.mirrors") for one in entries)
    if len(hosts) > MOST_HOSTS:
        raise InvalidConfig(f"{where} has more than {MOST_HOSTS} hosts")
    return tuple(sorted(hosts.items()))


def _mirror(value: Any, where: str) -> MirrorSetting:
    table = _lower(value, where)
    host = _text(table.get("host", ""), f"{where}.host")
    if not host:
        raise InvalidConfig(f"{where}: a mirror without host")
    timeout = _or_never(table.get("request_timeout_sec", 0), f"{where}.request_timeout_sec")
    if not (timeout <= LONGEST_SECONDS or timeout == math.inf):  # a TOML nan is neither
        raise InvalidConfig(f"{where}.request_timeout_sec must be at most {LONGEST_SECONDS:.0f}")
    return MirrorSetting(host, _flag(table.get("insecure", False), f"{where}.insecure"), timeout)


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(value, "a table", where)
    return value


def _lower(value: Any, where: str) -> dict[str, Any]:
    return {key.lower(): one for key, one in _table(value, where).items()}


def slips_of(value: Any, where: str) -> list[str]:
    """Keys in a ``[resolver.host]`` that `mirrors_of` reads past, with their place."""
    slips = []
    for name, table in value.items():
        place = f"{where}.{quoted(name)}"
        slips += [f"{place}.{key}" for key in table if key.lower() != "mirrors"]
        for mirror in _lower(table, place).get("mirrors", []):
            slips += [f"{place}.mirrors.{key}" for key in mirror if key.lower() not in _MIRROR]
    return slips


def _write_flag(value: bool) -> str:  # noqa: FBT001  a value, not a switch
    return "true" if value else "false"


def _write_number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _write_mirrors(hosts: Hosts) -> str:
    """As an inline table, which is one value on one line like all others."""
    entries = []
    for host, mirrors in hosts:
        tables = [
            f"{{ host = {quoted(one.host)}, insecure = {_write_flag(one.insecure)},"
            f" request_timeout_sec = {_write_never(one.request_timeout)} }}"
            for one in mirrors
        ]
        entries.append(f"{quoted(host)} = {{ mirrors = [{', '.join(tables)}] }}")
    return f"{{ {', '.join(entries)} }}" if entries else "{}"


def _write_never(value: float) -> str:
    return "-1" if value == math.inf else _write_number(value)


FLAG = Kind("bool", _flag, _write_flag)
WHOLE = Kind("int", _whole, str)
BYTES = Kind("int", _whole, str, "bytes")
SECONDS = Kind("number", _number, _write_number, "s")
MILLISECONDS = Kind("int", _milliseconds, lambda value: str(round(value * 1000)), "ms")
SECONDS_OR_NEVER = Kind("number", _or_never, _write_never, "s")
TEXT = Kind("text", _text, quoted)
LEVEL = Kind("text", _level, quoted)
NODE = Kind("text", _node, quoted)
SOCKET = Kind("path", _socket, quoted)
ADDRESS = Kind("path", _address, quoted)
PATH = Kind("path", _path, lambda value: quoted(str(value)))
WORDS = Kind("list of texts", _words, lambda value: f"[{', '.join(map(quoted, value))}]")
COUNT = Kind("int", _or_unlimited, str)
RETRIES = Kind("int", _retries, lambda value: str(value or -1))
ATTEMPTS = Kind("int", _attempts, lambda value: str(value - 1))
SIZE = Kind("text or int", size_of, lambda value: quoted(str(value)), "bytes")
MIRRORS = Kind("table", mirrors_of, _write_mirrors)
