# SPDX-License-Identifier: Apache-2.0
"""Programs that know logins, run within limits: what they read and say is small, and none outlives its time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

END_SECONDS_MAX = 1.0
"""How long a killed program's pipe is read to its end."""
READ_BYTES = 64 * 1024


class ProgramError(Exception):
    """A program that could not be run to its end; the text holds nothing of what it said."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds from start to end, and bytes on standard output."""

    seconds: float
    answer_bytes: int


async def run(
    words: Sequence[str], stdin: bytes, limits: Limits, environment: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Run ``words`` with ``stdin``: (exit status, standard output). What it says on standard error is not heard.

    `ProgramError` where it cannot be started, takes longer or says more than ``limits`` allow; it is ended then, with
    whatever it started.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            limit=READ_BYTES,
            env=None if environment is None else dict(environment),
        )
    except (OSError, ValueError) as error:
        raise ProgramError(getattr(error, "strerror", None) or "cannot be started") from error
    try:
        async with asyncio.timeout(limits.seconds):
            answer = await _converse(process, stdin, limits.answer_bytes)
            return await process.wait(), answer
    except TimeoutError:
        raise ProgramError(f"no answer in {limits.seconds:g} s") from None
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program with whatever it started: a grandchild would hold its pipes open."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS_MAX):
            # What is left in the pipe is read to its end: a transport that is not at its end is never closed.
            while process.stdout is not None and await process.stdout.read(READ_BYTES):
                pass
            await process.wait()


async def _converse(process: asyncio.subprocess.Process, stdin: bytes, most: int) -> bytes:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a program without pipes")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read its input to answer
        process.stdin.write(stdin)
        await process.stdin.drain()
        process.stdin.close()
    answer = b""
    while part := await process.stdout.read(most + 1 - len(answer)):
        answer += part
        if len(answer) > most:
            raise ProgramError(f"more than {most} bytes")
    return answer
