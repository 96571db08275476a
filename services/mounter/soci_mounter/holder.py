# SPDX-License-Identifier: Apache-2.0
"""``soci-holder``: keeps descriptors for a mounter that may die, and does nothing else.

The kernel ends a FUSE connection when its last descriptor is closed. This process has one, so the connection outlives
the mounter; it reads nothing from it. One datagram-like exchange a connection on a unix socket in the mounter's folder:

    ``put <name>`` with a descriptor (SCM_RIGHTS, unix(7))  →  ``kept``
    ``get <name>``  →  ``here`` with the descriptor, or ``none``
    ``drop <name>``  →  ``gone``
"""

from __future__ import annotations

import array
import contextlib
import os
import re
import socket
import struct
from pathlib import Path
from typing import Final

from soci.errors import FailedPrecondition, LimitExceeded, Unavailable
from soci_runtime.config import Config
from soci_runtime.flights import in_thread
from soci_runtime.serve import Process, service_command

SOCKET: Final = "holder.sock"
HELD_MAX: Final = 16
"""Descriptors that are kept: one a mounter, and a few more."""
TALK_SECONDS: Final = 5.0
"""How long one exchange may take."""
MESSAGE_BYTES: Final = 128
_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_CREDENTIALS: Final = struct.Struct("iII")
_POLL_SECONDS: Final = 0.5


class Held:
    """The descriptors, by name."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def answer(self, words: list[str], descriptors: list[int]) -> tuple[bytes, list[int]]:
        """What to answer, and which descriptors go with it. Descriptors that are not kept are closed."""
        verb, name = words if len(words) == 2 and _NAME.fullmatch(words[1]) else ("", "")
        if verb == "put" and len(descriptors) == 1 and (name in self._held or len(self._held) < HELD_MAX):
            self._let_go(name)
            self._held[name] = descriptors[0]
            return b"kept", []
        for descriptor in descriptors:
            os.close(descriptor)
        if verb == "get":
            return (b"here", [self._held[name]]) if name in self._held else (b"none", [])
        if verb == "drop":
            self._let_go(name)
            return b"gone", []
        return b"refused", []

    def close(self) -> None:
        """Let go of all: connections that nobody else has end."""
        for name in list(self._held):
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        descriptor = self._held.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)


def hold(listening: socket.socket, held: Held) -> None:
    """Answer one exchange, or return after half a second without any. Only our own user and root are answered."""
    listening.settimeout(_POLL_SECONDS)
    with contextlib.suppress(OSError):
        peer, _ = listening.accept()
        with peer:
            peer.settimeout(TALK_SECONDS)
            _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            text, descriptors, _, _ = socket.recv_fds(peer, MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
            if user not in {0, os.geteuid()}:
                for descriptor in descriptors:
                    os.close(descriptor)
                return
            answer, sent = held.answer(text.decode("ascii", "replace").split(), list(descriptors))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent))] if sent else []
            peer.sendmsg([answer], rights)


def listen(path: Path) -> socket.socket:
    """The socket, mode 0600; `FailedPrecondition` where another holder answers there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as other:
        other.settimeout(TALK_SECONDS)
        other.connect(str(path))
        raise FailedPrecondition(f"another holder serves {path}")
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen(8)
    return listening


def _talk(path: Path, words: str, descriptor: int | None = None) -> tuple[str, list[int]]:
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(TALK_SECONDS)
            peer.connect(str(path))
            socket.send_fds(peer, [words.encode("ascii")], [] if descriptor is None else [descriptor])
            text, descriptors, _, _ = socket.recv_fds(peer, MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
            return text.decode("ascii", "replace"), list(descriptors)
    except OSError as error:
        raise Unavailable(f"the holder at {path} does not answer: {error}") from error


def put(path: Path, name: str, descriptor: int) -> None:
    """Have the holder keep a copy of ``descriptor``. Raises `Unavailable`, or `LimitExceeded` where it keeps enough."""
    answer, _ = _talk(path, f"put {name}", descriptor)
    if answer != "kept":
        raise LimitExceeded(f"the holder at {path} keeps no more descriptors")


def get(path: Path, name: str) -> int | None:
    """A copy of the descriptor that is kept under ``name``, close-on-exec. Raises `Unavailable`."""
    answer, descriptors = _talk(path, f"get {name}")
    if answer == "here" and len(descriptors) == 1:
        return descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    return None


def drop(path: Path, name: str) -> None:
    """Have the holder let go of a descriptor; one that it has not is fine. Raises `Unavailable`."""
    _talk(path, f"drop {name}")


async def run(config: Config, process: Process) -> None:
    """Hold until told to stop: then connections that nobody else has end, and their mounts with them."""
    path = config.root / "mounter" / SOCKET
    held = Held()
    with listen(path) as listening:
        try:
            process.ready(socket=str(path))
            while not process.stopping.is_set():
                await in_thread(hold, listening, held)
        finally:
            held.close()
            path.unlink(missing_ok=True)


main = service_command("soci-holder", run)

if __name__ == "__main__":
    main()
