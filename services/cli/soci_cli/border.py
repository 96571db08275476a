# SPDX-License-Identifier: Apache-2.0
"""The border between commands and the shell: errors to one line on stderr, deadlines, exit codes."""

from __future__ import annotations

import asyncio
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from soci.errors import DeadlineExceeded, SociError
from soci_cli.values import Globals

T = TypeVar("T")

FAILED: Final = 1
INTERRUPTED: Final = 130
TERMINATED: Final = 143


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a task group failed of: the first of our errors in it, else its first exception."""
    found: BaseException = group.subgroup(SociError) or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def run_command(work: Callable[[], Awaitable[T]], flags: Globals) -> T:
    """Run a command's coroutine; ``--timeout`` ends it with `DeadlineExceeded`.

    SIGINT and SIGTERM cancel it, so that what it holds in containerd is given back first.
    """

    async def limited() -> T:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _cancel(asyncio.current_task()))
        if not flags.timeout:
            return await work()
        try:
            async with asyncio.timeout(flags.timeout) as limit:
                return await work()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"not done within --timeout {flags.timeout:g} s") from error

    try:
        return asyncio.run(limited())
    except asyncio.CancelledError as error:
        raise SystemExit(TERMINATED) from error
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def _cancel(task: asyncio.Task[T] | None) -> Callable[[], None]:
    def cancel() -> None:
        if task is not None:
            task.cancel()

    return cancel


def say_error(error: SociError, *, debug: bool) -> int:
    """Tell the error as ``soci: <message>`` (with ``--debug`` its trace first); the answer is the exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"soci: {error}", file=sys.stderr)
    return FAILED
