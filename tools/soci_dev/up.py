# SPDX-License-Identifier: Apache-2.0
"""``./dev up``: the private stack in the foreground, to try things by hand."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from soci.errors import Unavailable
from soci_dev.stack import Stack, default_folder


def run_up(*, fetchers: int, cri: bool) -> None:
    """Start, say how to use it, wait for Ctrl-C, clean up."""
    with Stack(default_folder("up"), fetchers=fetchers, cri=cri, progress=print) as stack:
        print(usage(stack), flush=True)
        wait_for_interrupt(stack)


def usage(stack: Stack) -> str:
    """What to type in another terminal."""
    program = Path(stack.soci_command()[0]).with_name("soci")
    lines = {
        "bus": f"export NATS_URL={stack.nats_url}",
        "registry": f"{stack.registry} (plain HTTP)",
        "ctr": shlex.join(stack.ctr_command()),
        "soci": shlex.join([str(program), *stack.soci_command()[3:]]),
        "logs": f"{stack.logs}/*.log",
        "our files": str(stack.root),
    }
    return "\n".join([*(f"  {name:10} {value}" for name, value in lines.items()), "Ctrl-C ends all of it."])


def wait_for_interrupt(stack: Stack) -> None:
    """Until Ctrl-C; says when a daemon ends meanwhile. Raises `Unavailable` once none is left."""
    while any(daemon.returncode is None for daemon in stack.daemons.values()):
        # WNOWAIT: whoever holds the child object still gets its exit status.
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for name, daemon in stack.daemons.items():
            if ended is not None and daemon.pid == ended.si_pid:
                print(f"{name} ended with status {daemon.returncode}; log {daemon.log}", flush=True)
                break
        else:
            if ended is not None:
                os.waitid(os.P_PID, ended.si_pid, os.WEXITED)
    raise Unavailable("every daemon has ended")
