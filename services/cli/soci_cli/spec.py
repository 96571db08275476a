# SPDX-License-Identifier: Apache-2.0
"""The OCI runtime specification of a container, made from its image's config. Pure.

The defaults are those that containerd's clients agree on: fourteen capabilities, private pid, ipc, uts, mount and
network namespaces, the kernel's dangerous files in /proc and /sys masked, no new privileges. It is read by runc 1.1
and later with cgroup v1 and v2 alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from soci.errors import InvalidConfig, Unsupported
from soci.oci import Config

OCI_VERSION: Final = "1.0.2"
DEFAULT_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES: Final = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)
MASKED: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
HOST_FILES: Final = ("/etc/hosts", "/etc/resolv.conf")
"""Shown to a container that shares the host's network."""

_USER: Final = re.compile(r"(root|\d{1,10})(?::(root|\d{1,10}))?", re.ASCII)
_VARIABLE: Final = re.compile(r"[^=\0]+=[^\0]*", re.DOTALL)
_UID_MAX: Final = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asks of the container beyond the image. ``command`` replaces the image's, not its entrypoint."""

    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    host_network: bool = False


def parse_user(text: str) -> tuple[int, int]:
    """Uid and gid of an image's ``User``: numbers, or root. Another name would have to be looked up in the image."""
    if not text:
        return 0, 0
    found = _USER.fullmatch(text)
    if not found:
        raise Unsupported(
            f"the image runs as user {text[:80]!r}: only numbers (uid or uid:gid) and root are known here"
        )
    uid, gid = (0 if part in (None, "root") else int(part) for part in found.groups())
    if max(uid, gid) > _UID_MAX:
        raise InvalidConfig(f"the image's user {text!r} is out of range")
    return uid, gid


def arguments(config: Config, command: Sequence[str]) -> list[str]:
    """Entrypoint and command, as Docker joins them: words of the user replace the image's command."""
    words = [*config.entrypoint, *(command or config.cmd)]
    if not words:
        raise InvalidConfig("the image names no command: add one after the image")
    return words


def environment(config: Config, added: Sequence[str]) -> list[str]:
    """The image's variables, then ``added`` (``NAME=value``); the last of a name wins, in the first one's place."""
    for variable in added:
        if not _VARIABLE.fullmatch(variable):
            raise InvalidConfig(f"not NAME=value: {variable[:80]!r}")
    merged: dict[str, str] = {}
    for variable in (DEFAULT_PATH, *config.env, *added):
        merged[variable.partition("=")[0]] = variable
    return list(merged.values())


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _mounts(*, host_network: bool) -> list[dict[str, Any]]:
    own = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _mount("/run", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
    ]
    shared = [_mount(path, "bind", path, "rbind", "ro") for path in HOST_FILES if host_network]
    return own + shared


def make_spec(config: Config, wish: Wish, container: str, namespace: str) -> dict[str, Any]:
    """The specification of ``container`` in a containerd namespace, as an object for `encode_spec`.

    Raises `InvalidConfig` and `Unsupported` for an image or a wish that cannot be run.
    """
    uid, gid = parse_user(config.user)
    capabilities = list(CAPABILITIES)
    held = capabilities if uid == 0 else []  # as execve(2) would leave them
    private = ["pid", "ipc", "uts", "mount", *([] if wish.host_network else ["network"])]
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": gid},
            "args": arguments(config, wish.command),
            "env": environment(config, wish.environment),
            "cwd": config.working_dir or "/",
            "capabilities": {"bounding": capabilities, "effective": held, "permitted": held},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": container,
        "mounts": _mounts(host_network=wish.host_network),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": f"/{namespace}/{container}",
            "namespaces": [{"type": kind} for kind in private],
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
        },
    }


def encode_spec(spec: dict[str, Any]) -> bytes:
    """The JSON that containerd hands to the runtime. Bytes of an image that are no text are refused."""
    try:
        return json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidConfig("an argument or variable of the container is not valid UTF-8") from error
