# SPDX-License-Identifier: Apache-2.0
"""What systemd passes: its sockets, and how often it wants a sign of life."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from soci.errors import InvalidConfig
from soci_runtime.activation import MOST, activated, passed
from soci_runtime.serve import WATCHDOG_LEAST, watchdog_interval
from support.activation import holding, start_with

LIMIT = 30.0

CHILD = """
import os, sys
from soci.errors import InvalidConfig
from soci_runtime.activation import activated
try:
    found = activated()
except InvalidConfig as error:
    print("refused", error)
else:
    print(found and found.getsockname(), found and (found.fileno(), os.get_inheritable(found.fileno()), found.timeout))
opened = []
for one in range(3, 8):
    try:
        os.fstat(one)
        opened.append(one)
    except OSError:
        pass
print(opened, sorted(name for name in os.environ if name.startswith("LISTEN")))
"""


@pytest.mark.parametrize(
    ("environment", "descriptors"),
    [
        ({}, []),
        ({"LISTEN_FDS": "1"}, []),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "8"}, []),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "7"}, [3]),
        ({"LISTEN_FDS": "3", "LISTEN_PID": "7"}, [3, 4, 5]),
        ({"LISTEN_FDS": "0", "LISTEN_PID": "7"}, []),
    ],
)
def test_descriptors_for_us(environment: dict[str, str], descriptors: list[int]) -> None:
    """Only what is passed to this very process counts, from descriptor 3 on."""
    assert list(passed(environment, 7)) == descriptors


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", str(MOST + 1), "9" * 5000, "²"])
def test_a_wrong_number_is_refused(number: str) -> None:
    """What is no number of descriptors is refused, shortly."""
    with pytest.raises(InvalidConfig, match="LISTEN_FDS") as told:
        passed({"LISTEN_FDS": number, "LISTEN_PID": "7"}, 7)
    assert len(str(told.value)) < 100


def test_nothing_is_passed() -> None:
    """Without systemd there is no socket."""
    assert activated({}) is None


def run(*sockets: socket.socket, number: int | None = None) -> list[str]:
    """What a child makes of sockets handed to it."""
    process = start_with([sys.executable, "-c", CHILD], sockets, number)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out.splitlines()


def test_one_socket_is_taken(tmp_path: Path) -> None:
    """It is ours, does not block, and no child of ours hears of it."""
    with holding(tmp_path / "s") as one:
        first, _ = run(one)
    assert first == f"{tmp_path / 's'} (3, False, 0.0)"


def test_several_sockets_are_refused(tmp_path: Path) -> None:
    """Exactly one is wanted; all are closed."""
    with holding(tmp_path / "a") as one, holding(tmp_path / "b") as two:
        first, second = run(one, two)
    assert first == "refused systemd passes 2 sockets; exactly one is wanted"
    assert second.endswith("] []")
    assert "3" not in second
    assert "4" not in second


def test_what_is_no_listening_socket_is_refused(tmp_path: Path) -> None:
    """A socket that does not listen, one of the network, or a number without a descriptor behind it."""
    with socket.socket(socket.AF_UNIX) as quiet:
        quiet.bind(str(tmp_path / "q"))
        assert run(quiet)[0].startswith("refused the socket that systemd passes is no unix socket")
    with socket.create_server(("127.0.0.1", 0)) as network:
        assert run(network)[0].startswith("refused the socket that systemd passes is no unix socket")
    assert run(number=1)[0].startswith("refused descriptor 3, which LISTEN_FDS speaks of, is no socket")


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "1"}, WATCHDOG_LEAST),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdogs_interval(environment: dict[str, str], seconds: float | None) -> None:
    """Half of systemd's patience, where it watches this process."""
    assert watchdog_interval(environment, 7) == seconds
