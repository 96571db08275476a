# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration, read from file, environment and flags once, at the border.

The file is the reference's ``config.toml``: its keys mean what they mean there, or nothing, which is said. What only
Sociable has stands in the table ``[sociable]``. Flags beat the environment, which beats the file.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soci.errors import InvalidConfig
from soci_runtime.config_file import Parsed, parse_file
from soci_runtime.settings import BY_FIELD, SETTINGS
from soci_runtime.values import ACTIVATED, DEFAULT_ADDRESS, DEFAULT_NATS, DEFAULT_ROOT, UNLIMITED, Config, MirrorSetting

__all__ = [
    "ACTIVATED",
    "DEFAULT_ADDRESS",
    "DEFAULT_NATS",
    "DEFAULT_ROOT",
    "UNLIMITED",
    "Config",
    "Loaded",
    "MirrorSetting",
    "load",
    "load_config",
]

DEFAULT_FILE = Path("/etc/soci-snapshotter-grpc/config.toml")
FILE_VARIABLE = "SOCI_SNAPSHOTTER_CONFIG"
CONFIG_LIMIT = 1 << 20
"""Bytes of a configuration file."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and how it came about."""

    config: Config
    origins: Mapping[str, str] = field(default_factory=dict)  # field → who set it; the others are defaults
    unknown: tuple[str, ...] = ()  # keys of the file that nobody knows
    without_effect: tuple[tuple[str, str], ...] = ()  # keys that mean nothing here, though set, and why
    file: str = ""


def load(
    path: Path | None,
    flags: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    *,
    strict: bool = False,
) -> Loaded:
    """The configuration from file, environment and flags (those that are not None), checked.

    ``path`` None reads the default file where there is one; a path that was given must exist. ``strict`` refuses keys
    that nobody knows. Raises `InvalidConfig`, which names file and key, variable or flag.
    """
    environment = os.environ if environment is None else environment
    named = path or (Path(environment[FILE_VARIABLE]) if environment.get(FILE_VARIABLE) else None)
    file = named or DEFAULT_FILE
    parsed = _read(file) if named or file.exists() else Parsed()
    if strict and parsed.slips:
        raise InvalidConfig(f"{file}: no setting: {', '.join(parsed.slips)}")
    values = dict(parsed.values)
    origins = {name: f"{file}: {key}" for name, key in parsed.keys.items()}
    for setting in SETTINGS:
        for origin, value in (
            (setting.environment, environment.get(setting.environment) or None),
            (setting.flag, flags.get(setting.field)),
        ):
            if value is not None and origin:
                values[setting.field] = setting.take(value, origin)
                origins[setting.field] = origin
    stray = sorted(name for name, value in flags.items() if value is not None and not _has_flag(name))
    if stray:
        raise InvalidConfig(f"{stray[0]} cannot be set by a flag")
    return Loaded(
        _whole(Config(**values)),
        origins,
        tuple(parsed.slips),
        tuple((one.key, one.why) for one in parsed.without_effect),
        str(file) if named or file.exists() else "",
    )


def load_config(path: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Config:
    """What `load` gives, without how it came about."""
    return load(path, flags, environment).config


def _has_flag(name: str) -> bool:
    return name in BY_FIELD and bool(BY_FIELD[name].flag)


def _read(file: Path) -> Parsed:
    try:
        if file.stat().st_size > CONFIG_LIMIT:
            raise InvalidConfig(f"{file}: larger than {CONFIG_LIMIT} bytes")
        return parse_file(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{file}: {error}") from error


def _whole(config: Config) -> Config:
    """``config`` completed, its settings checked against one another."""
    for of_image, in_all in (("max_downloads_per_image", "max_downloads"), ("max_unpacks_per_image", "max_unpacks")):
        most = getattr(config, in_all)
        if most != UNLIMITED and getattr(config, of_image) > most:
            raise InvalidConfig(f"{_key(of_image)} is above {_key(in_all)}, {most}")
    if config.kubelet_credential_config and not config.kubelet_credential_bin_dir:
        raise InvalidConfig(f"{_key('kubelet_credential_config')} needs {_key('kubelet_credential_bin_dir')}, too")
    if config.peer_listen and not config.peer_secret_file:
        raise InvalidConfig(f"{_key('peer_listen')} needs {_key('peer_secret_file')}, too")
    if bool(config.peer_tls_cert) != bool(config.peer_tls_key) or (config.peer_tls_ca and not config.peer_tls_cert):
        raise InvalidConfig(
            f"{_key('peer_tls_cert')} and {_key('peer_tls_key')} go together, {_key('peer_tls_ca')} with them"
        )
    if config.cri_keychain and config.cri_image_service in {config.address, DEFAULT_ADDRESS}:
        raise InvalidConfig(f"{_key('cri_image_service')} is our own socket: name the one of containerd")
    node = config.node or re.sub(r"[^A-Za-z0-9_-]+", "_", socket.gethostname())[:64] or "node"
    return replace(config, node=node, root=config.root.absolute())


def _key(name: str) -> str:
    return BY_FIELD[name].key
