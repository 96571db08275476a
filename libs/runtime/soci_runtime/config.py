# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration, read from TOML once, at the border.

The file is the reference's ``config.toml``: its keys mean what they mean there, matched without regard to case.
What only Sociable has stands in the table ``[sociable]``. Flags beat the environment, which beats the file.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from soci.errors import InvalidConfig

DEFAULT_ROOT = Path("/var/lib/soci-snapshotter-grpc")
DEFAULT_ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
DEFAULT_FILE = Path("/etc/soci-snapshotter-grpc/config.toml")
DEFAULT_NATS = "nats://127.0.0.1:4222"
CONFIG_LIMIT = 1 << 20
"""Bytes of a configuration file."""
MOST_SPAN_ATTEMPTS = 100
LONGEST_SECONDS = 86_400.0
"""The longest of the times that may be set."""


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting, in base units. The comment names the key in the file."""

    root: Path = DEFAULT_ROOT  # --root
    address: str = DEFAULT_ADDRESS  # --address
    nats_url: str = DEFAULT_NATS  # [sociable] nats_url, NATS_URL
    node: str = ""  # [sociable] node; empty: the host's name
    log_level: str = "info"  # --log-level
    mount_timeout: float = 30.0  # mount_timeout_sec
    disable_verification: bool = False  # disable_verification
    min_layer_size: int = 0  # [snapshotter] min_layer_size: smaller layers come whole; 0: none does
    soci_v1: bool = True  # [pull_modes.soci_v1] enable
    soci_v2: bool = True  # [pull_modes.soci_v2] enable
    read_deadline: float = 60.0  # [sociable] read_deadline_sec: then a read whose bytes cannot be had fails with EIO
    index_failure_ttl: float = 30.0  # [sociable] index_failure_ttl_sec: so long a failed look-up is not repeated
    span_attempts: int = 3  # [blob] max_span_verification_retries + 1: tries for a span that does not match its digest
    plain_http: tuple[str, ...] = ()  # [sociable] plain_http: registry hosts spoken to without TLS
    webhook_address: str = ""  # [sociable] webhook_address: where registries tell the indexer of pushes; empty: nowhere
    webhook_token: str = dataclasses.field(default="", repr=False)  # [sociable] webhook_token: what they must know
    webhook_registry: str = ""  # [sociable] webhook_registry: the registry's name; empty: the one that pushes went to

    @property
    def cache(self) -> Path:
        """The span cache."""
        return self.root / "cache"

    @property
    def mounts(self) -> Path:
        """Where the mounter shows layers."""
        return self.root / "mounts"


# key in the file -> field; a file may leave out all of them
_KEYS: dict[str, str] = {
    "mount_timeout_sec": "mount_timeout",
    "disable_verification": "disable_verification",
    "snapshotter.min_layer_size": "min_layer_size",
    "pull_modes.soci_v1.enable": "soci_v1",
    "pull_modes.soci_v2.enable": "soci_v2",
    "sociable.nats_url": "nats_url",
    "sociable.node": "node",
    "sociable.read_deadline_sec": "read_deadline",
    "sociable.index_failure_ttl_sec": "index_failure_ttl",
    "sociable.plain_http": "plain_http",
    "sociable.webhook_address": "webhook_address",
    "sociable.webhook_token": "webhook_token",
    "sociable.webhook_registry": "webhook_registry",
    "blob.max_span_verification_retries": "span_attempts",
}
_ENVIRONMENT = {
    "SOCI_SNAPSHOTTER_ROOT": "root",
    "SOCI_SNAPSHOTTER_ADDRESS": "address",
    "SOCI_SNAPSHOTTER_LOG_LEVEL": "log_level",
    "NATS_URL": "nats_url",
    "SOCIABLE_NODE": "node",
}
_LEVELS = ("debug", "info", "warning", "error")
_NODE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key.lower()
        if isinstance(value, Mapping):
            flat |= _flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def _as(field: str, value: Any, where: str) -> Any:
    """``value`` in the type of ``field``; a wrong type is `InvalidConfig` with the key's name."""
    kind = {f.name: str(f.type) for f in fields(Config)}[field]
    good = {
        "Path": isinstance(value, str | Path) and str(value) != "",
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "tuple[str, ...]": isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
    }[kind]
    if not good:
        raise InvalidConfig(f"{where}: {value!r} is not a {kind}")
    return {"Path": Path, "float": float, "tuple[str, ...]": tuple}.get(kind, lambda same: same)(value)


def parse_config(text: str, where: str) -> dict[str, Any]:
    """The fields that a TOML text sets. For the reference's integers, 0 means "the default"."""
    try:
        flat = _flatten(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"{where}: {error}") from error
    # The reference's file may hold much that we have no use for; our own table holds what we know, or a slip.
    unknown = sorted(key for key in flat if key.split(".")[0] == "sociable" and key not in _KEYS)
    if unknown:
        known = ", ".join(key.removeprefix("sociable.") for key in _KEYS if key.startswith("sociable."))
        raise InvalidConfig(f"{where}: {unknown[0]} is no setting; [sociable] has {known}")
    found: dict[str, Any] = {}
    for key, field in _KEYS.items():
        if key not in flat:
            continue
        value = _as(field, flat[key], f"{where}: {key}")
        if key == "blob.max_span_verification_retries":
            value = 4 if value < 0 else value + 1  # the reference: a negative number selects three more
        elif key == "mount_timeout_sec" and value == 0:
            continue
        found[field] = value
    return found


def _check(config: Config) -> Config:
    if config.log_level not in _LEVELS:
        raise InvalidConfig(f"log level {config.log_level!r} is none of {', '.join(_LEVELS)}")
    node = config.node or re.sub(r"[^A-Za-z0-9_-]+", "_", socket.gethostname())[:64] or "node"
    if not _NODE.fullmatch(node):
        raise InvalidConfig(f"node {config.node!r} is not 1 to 64 letters, digits, '-' or '_'")
    for field, low, high in (
        ("mount_timeout", 0.1, LONGEST_SECONDS),
        ("read_deadline", 0.1, LONGEST_SECONDS),
        ("index_failure_ttl", 0.0, LONGEST_SECONDS),
        ("min_layer_size", 0, 1 << 62),
        ("span_attempts", 1, MOST_SPAN_ATTEMPTS),
    ):
        if not low <= getattr(config, field) <= high:  # so written that a TOML nan is refused too
            raise InvalidConfig(f"{field} must be between {low} and {high}, not {getattr(config, field)}")
    address = config.address.removeprefix("unix://")
    if not address.startswith("/") or len(address.encode()) > 107:  # sun_path of unix(7), with its NUL
        raise InvalidConfig(f"address {config.address!r} is not an absolute socket path of at most 107 bytes")
    return replace(config, node=node, root=config.root.absolute(), address=address)


def load_config(path: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Config:
    """The configuration from file, environment and flags (those that are not None), checked.

    ``path`` None reads the default file where there is one; a path that was given must exist.
    """
    environment = os.environ if environment is None else environment
    file = path or Path(environment.get("SOCI_SNAPSHOTTER_CONFIG", DEFAULT_FILE))
    values: dict[str, Any] = {}
    if path is not None or file != DEFAULT_FILE or file.exists():
        try:
            if file.stat().st_size > CONFIG_LIMIT:
                raise InvalidConfig(f"{file}: larger than {CONFIG_LIMIT} bytes")
            values |= parse_config(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{file}: {error}") from error
    for name, field in _ENVIRONMENT.items():
        if environment.get(name):
            values[field] = _as(field, environment[name], name)
    for field, value in flags.items():
        if value is not None:
            values[field] = _as(field, value, f"--{field.replace('_', '-')}")
    return _check(Config(**values))
