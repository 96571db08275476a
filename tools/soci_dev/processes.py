# SPDX-License-Identifier: Apache-2.0
"""Daemons as child processes: a log file each, a wait until ready with a limit, an orderly end."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from soci.errors import DeadlineExceeded, Unavailable
from soci_dev.leftovers import start_time, stop_process

STOP_GRACE_S: Final = 10.0
"""What a daemon gets between SIGTERM and SIGKILL."""

POLL_S: Final = 0.02
_LOG_TAIL_LINES: Final = 15
_given_ports: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now and that this process was not given before."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port
    raise Unavailable("no free TCP port on 127.0.0.1")


class Daemon:
    """A child process with its own log. ``pid`` and ``started`` name it beyond our own life."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str], folder: Path
    ) -> None:
        """Start ``command`` in ``folder``, its output appended to ``log``."""
        self.name = name
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            # Its own session: Ctrl-C in the terminal must reach us alone, who then stop things in order.
            self._process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.started = start_time(self.pid) or 0

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self, grace_s: float = STOP_GRACE_S) -> int:
        """SIGTERM, SIGKILL after ``grace_s``; returns the exit status."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(grace_s)
            self._process.kill()
        return self._process.wait(STOP_GRACE_S)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._process.kill()
        self._process.wait(STOP_GRACE_S)

    def wait(self, ready: Callable[[], bool], what: str, limit_s: float) -> None:
        """Wait until ``ready()``; raises `Unavailable` if the process ends first, `DeadlineExceeded` at the limit."""
        end = time.monotonic() + limit_s
        while not ready():
            if self.returncode is not None:
                raise Unavailable(f"{self.name} ended with status {self.returncode}; {self.tail()}")
            if time.monotonic() > end:
                raise DeadlineExceeded(f"{self.name}: not {what} within {limit_s:g} s; {self.tail()}")
            time.sleep(POLL_S)

    def output(self) -> str:
        """What this process (not an earlier one with the same log) wrote."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def said_ready(self) -> bool:
        """Has it written the JSON log line ``"msg": "ready"``?"""
        return any(says_ready(line) for line in self.output().splitlines())

    def tail(self) -> str:
        """The log's path and last lines, for a message."""
        lines = self.output().splitlines()[-_LOG_TAIL_LINES:]
        return f"log {self.log}:\n" + "\n".join(f"    {line}" for line in lines)


def run_checked(command: Sequence[str], timeout_s: float, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a short command, output captured; raises `Unavailable` with it on failure (if ``check``) or at the limit."""
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no end within {timeout_s:g} s: {' '.join(command)}") from error
    if check and done.returncode:
        raise Unavailable(f"status {done.returncode} of {' '.join(command)}\n{done.stderr or done.stdout}")
    return done


def says_ready(line: str) -> bool:
    """Is ``line`` a JSON log record whose message is ``ready``?"""
    if '"ready"' not in line:
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("msg") == "ready"


def end_recorded(record: Path) -> None:
    """End the processes that an earlier, crashed run wrote into ``record`` (lines ``pid start-time``)."""
    if not record.exists():
        return
    for line in reversed(record.read_text().splitlines()):
        words = line.split()
        if len(words) >= 2 and words[0].isdecimal() and words[1].isdecimal():
            stop_process(int(words[0]), int(words[1]), grace_s=2.0)
    record.unlink()
