# SPDX-License-Identifier: Apache-2.0
"""The configuration file of a private containerd (version 2 of the format: containerd 1.6 to 2.x read it)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SNAPSHOTTER: Final = "sociable"
"""The name of our snapshotter in containerd."""

_CRI: Final = "io.containerd.grpc.v1.cri"
# Plugins that would touch the machine beyond our folder, or wait for hardware that is not there.
_DISABLED: Final = (
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
)


@dataclass(frozen=True, slots=True)
class ContainerdConfig:
    """What a private containerd is told. ``snapshotter_socket`` None: our snapshotter is not plugged in."""

    folder: Path
    socket: Path
    snapshotter_socket: Path | None
    cri: bool
    sandbox_image: str = "pause:none"

    @property
    def state(self) -> Path:
        """Containers' bundles and their mounts."""
        return self.folder / "state"

    @property
    def runc_root(self) -> Path:
        """Where runc keeps the containers of CRI; ctr's go to containerd's default."""
        return self.folder / "runc"

    @property
    def registry_hosts(self) -> Path:
        """CRI's ``config_path``: tests may put ``<host>/hosts.toml`` here."""
        return self.folder / "certs.d"

    def toml(self) -> str:
        """The file's text."""
        lines = [
            "version = 2",
            f"root = {_quoted(self.folder / 'root')}",
            f"state = {_quoted(self.state)}",
            f"disabled_plugins = {json.dumps([*_DISABLED, *([] if self.cri else [_CRI])])}",
            "[grpc]",
            f"  address = {_quoted(self.socket)}",
            '[plugins."io.containerd.internal.v1.opt"]',
            f"  path = {_quoted(self.folder / 'opt')}",
        ]
        if self.snapshotter_socket:
            lines += [
                f"[proxy_plugins.{SNAPSHOTTER}]",
                '  type = "snapshot"',
                f"  address = {_quoted(self.snapshotter_socket)}",
            ]
        if self.cri:
            lines += self._cri()
        return "\n".join(lines) + "\n"

    def _cri(self) -> list[str]:
        plugin = f'plugins."{_CRI}"'
        snapshotter = SNAPSHOTTER if self.snapshotter_socket else "overlayfs"
        return [
            f"[{plugin}]",
            f"  sandbox_image = {_quoted(self.sandbox_image)}",
            "  disable_tcp_service = true",
            f"[{plugin}.containerd]",
            f"  snapshotter = {_quoted(snapshotter)}",
            "  disable_snapshot_annotations = false",  # the labels a remote snapshotter lives on
            f"[{plugin}.containerd.runtimes.runc]",
            '  runtime_type = "io.containerd.runc.v2"',
            f"[{plugin}.containerd.runtimes.runc.options]",
            f"  Root = {_quoted(self.runc_root)}",
            f"[{plugin}.cni]",  # only pods on the host's network are run, but the plugin wants its folders
            f"  bin_dir = {_quoted(self.folder / 'cni-bin')}",
            f"  conf_dir = {_quoted(self.folder / 'cni-conf')}",
            f"[{plugin}.registry]",
            f"  config_path = {_quoted(self.registry_hosts)}",
        ]


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)  # a TOML basic string escapes as JSON does
