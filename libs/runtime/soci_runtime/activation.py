# SPDX-License-Identifier: Apache-2.0
"""A listening socket that systemd opened before us and passes on (sd_listen_fds(3)).

It stays open while we are not running, so a client that connects meanwhile waits instead of failing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from soci.errors import InvalidConfig

FIRST = 3
"""The descriptor after stderr: the first that is passed."""
MOST = 1024
"""More cannot be meant: it is the usual limit of open files."""


def passed(environment: Mapping[str, str], pid: int) -> range:
    """The descriptors passed to process ``pid``; none where the variables are absent, or another process's."""
    if environment.get("LISTEN_PID") != str(pid):
        return range(0)
    number = environment.get("LISTEN_FDS", "")
    if not number.isascii() or not number.isdecimal() or int(number[:9]) > MOST:
        raise InvalidConfig(f"LISTEN_FDS={number[:20]!r} is not a number of descriptors")
    return range(FIRST, FIRST + int(number))


def activated(environment: MutableMapping[str, str] | None = None) -> socket.socket | None:
    """The one socket passed to us, non-blocking; None where none was. Processes that we start inherit nothing of it.

    Raises `InvalidConfig` where there are several, which are closed, or where it is no listening unix socket.
    """
    environment = os.environ if environment is None else environment
    descriptors = passed(environment, os.getpid())
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    if len(descriptors) > 1:
        for one in descriptors:
            os.close(one)
        raise InvalidConfig(f"systemd passes {len(descriptors)} sockets; exactly one is wanted")
    return _listening(descriptors[0]) if descriptors else None


def _listening(descriptor: int) -> socket.socket:
    try:
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise InvalidConfig(f"descriptor {descriptor}, which LISTEN_FDS speaks of, is no socket") from error
    found.set_inheritable(False)
    stream = (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    if not stream or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        found.close()
        raise InvalidConfig("the socket that systemd passes is no unix socket that listens: ListenStream= a path")
    found.settimeout(0)  # an event loop accepts from it
    return found
