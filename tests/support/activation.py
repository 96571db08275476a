# SPDX-License-Identifier: Apache-2.0
"""Sockets handed over as systemd does it: from descriptor 3 on, with LISTEN_FDS and LISTEN_PID."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path


def holding(path: Path) -> socket.socket:
    """A listening socket, as a socket unit holds it; its descriptor is above those that are handed over."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen()
        return socket.socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, 100))


def start_with(
    command: Sequence[str], sockets: Sequence[socket.socket], number: int | None = None
) -> subprocess.Popen[str]:
    """Start ``command`` with ``sockets`` handed over; ``number`` is what LISTEN_FDS says, else how many there are."""
    moved = "".join(f" {3 + index}<&{one.fileno()}" for index, one in enumerate(sockets))
    return subprocess.Popen(
        ["bash", "-c", f'export LISTEN_PID=$$; exec "$@"{moved}', "bash", *command],
        env=os.environ | {"LISTEN_FDS": str(len(sockets) if number is None else number)},
        pass_fds=[one.fileno() for one in sockets],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
