# SPDX-License-Identifier: Apache-2.0
"""What a mounter must know to show its layers again after a restart: one small JSON file a mount.

Attributes taken from layers below are kept in it, so that a restart needs neither them nor the network. A file is
written aside, synced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soci.digest import parse_digest
from soci.errors import InvalidInput, LimitExceeded, SociError, Unavailable
from soci.idmap import IdMap
from soci_bus.asks import MountLayer
from soci_mounter.filesystem import OPAQUE, USER_OPAQUE, Inherited, Manner

VERSION = 1
MANNER_VERSION = 2
"""The form of records, and that of a mount which is not shown plainly: a program that knows only the first must not
show such a mount with other owners than it was asked for."""
RECORD_LIMIT = 16 << 20
"""Bytes of one record."""
MAX_LOWER = 512
"""Layers below one mount: the kernel's overlayfs stops at 500."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_ask(ask: MountLayer) -> MountLayer:
    """An ask whose every field can be used; raises `InvalidInput`."""
    if not _NAME.fullmatch(ask.mount):
        raise InvalidInput(f"a mount's name is 1 to 128 letters, digits, '.', '_', '-', not {ask.mount[:80]!r}")
    if len(ask.lower) > MAX_LOWER or not all(path.startswith("/") and "\0" not in path for path in ask.lower):
        raise InvalidInput(f"mount {ask.mount}: lower directories are at most {MAX_LOWER} absolute paths")
    parse_digest(ask.layer)
    parse_digest(ask.ztoc)
    try:
        manner_of(ask)
    except InvalidInput as error:
        raise InvalidInput(f"mount {ask.mount}: {error}") from error
    return ask


def manner_of(ask: MountLayer) -> Manner:
    """How the ask wants its layer shown; `InvalidInput` for maps that are none."""
    opaque = USER_OPAQUE if ask.user_xattrs else OPAQUE
    if not ask.uid_map and not ask.gid_map:
        return Manner(opaque=opaque)
    return Manner(IdMap.of(ask.uid_map), IdMap.of(ask.gid_map), opaque)


@dataclass(frozen=True, slots=True)
class Record:
    """One mount: what was asked, in which place of the order, and what it took from the layers below (by path)."""

    ask: MountLayer
    sequence: int
    inherited: Mapping[bytes, Inherited] = field(default_factory=dict)


def encode(record: Record) -> bytes:
    """The file's content; `LimitExceeded` above `RECORD_LIMIT`."""
    ask = record.ask
    value = {
        "version": MANNER_VERSION if ask.uid_map or ask.user_xattrs else VERSION,
        "sequence": record.sequence,
        "mount": ask.mount,
        "image": ask.image,
        "layer": ask.layer,
        "ztoc": ask.ztoc,
        "lower": list(ask.lower),
        "uid_map": ask.uid_map,
        "gid_map": ask.gid_map,
        "user_xattrs": ask.user_xattrs,
        "inherited": {
            path.hex(): {
                "mode": taken.mode,
                "uid": taken.uid,
                "gid": taken.gid,
                "mtime_ns": taken.mtime_ns,
                "xattrs": {name.hex(): content.hex() for name, content in taken.xattrs.items()},
            }
            for path, taken in record.inherited.items()
        },
    }
    content = json.dumps(value).encode()
    if len(content) > RECORD_LIMIT:
        raise LimitExceeded(f"mount {ask.mount}: its record has {len(content)} bytes, more than {RECORD_LIMIT}")
    return content


def decode(content: bytes) -> Record:
    """The record in a file's content; `InvalidInput` for anything else."""
    try:
        value: dict[str, Any] = json.loads(content)
        if value["version"] not in {VERSION, MANNER_VERSION}:
            raise InvalidInput(f"a record of version {value['version']!r}, not {VERSION} or {MANNER_VERSION}")
        ask = MountLayer(
            mount=str(value["mount"]),
            image=str(value["image"]),
            layer=parse_digest(value["layer"]),
            ztoc=parse_digest(value["ztoc"]),
            lower=tuple(str(path) for path in value["lower"]),
            uid_map=_extents(value.get("uid_map", [])),
            gid_map=_extents(value.get("gid_map", [])),
            user_xattrs=bool(value.get("user_xattrs", False)),
        )
        inherited = {bytes.fromhex(path): _inherited(taken) for path, taken in value["inherited"].items()}
        return Record(check_ask(ask), int(value["sequence"]), inherited)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"not a record of a mount: {type(error).__name__}: {error}") from error


def _extents(value: list[list[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(inside), int(outside), int(length)) for inside, outside, length in value)


def _inherited(value: dict[str, Any]) -> Inherited:
    xattrs = {bytes.fromhex(name): bytes.fromhex(content) for name, content in value["xattrs"].items()}
    return Inherited(int(value["mode"]), int(value["uid"]), int(value["gid"]), int(value["mtime_ns"]), xattrs)


class Records:
    """The folder of records. Methods block on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, record: Record) -> None:
        """Keep a record; it is on the disk when this returns. Raises `Unavailable` where the disk refuses."""
        path = self._path(record.ask.mount)
        draft = path.with_suffix(".new")
        try:
            with draft.open("wb") as file:
                file.write(encode(record))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            self._sync()
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise Unavailable(f"mount {record.ask.mount} cannot be recorded: {error}") from error

    def forget(self, mount: str) -> None:
        """Remove a record, for good when this returns; one that is not there is no error."""
        try:
            self._path(mount).unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise Unavailable(f"mount {mount} cannot be forgotten: {error}") from error

    def load(self) -> tuple[list[Record], list[tuple[Path, SociError]]]:
        """All records in the order in which they were made, and the files that are none."""
        good: list[Record] = []
        bad: list[tuple[Path, SociError]] = []
        for path in self._folder.glob("*.json"):
            try:
                with path.open("rb") as file:
                    record = decode(file.read(RECORD_LIMIT))
                if path != self._path(record.ask.mount):
                    raise InvalidInput(f"the record of mount {record.ask.mount} in the file of another")
                good.append(record)
            except OSError as error:
                bad.append((path, Unavailable(str(error))))
            except SociError as error:
                bad.append((path, error))
        return sorted(good, key=lambda record: record.sequence), bad

    def _path(self, mount: str) -> Path:
        return self._folder / f"{mount}.json"

    def _sync(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
