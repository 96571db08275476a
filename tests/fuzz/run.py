# SPDX-License-Identifier: Apache-2.0
"""Fuzz one parser in this process, under limits: ``python -m fuzz.run PARSER [--runs N] [--seed S]``.

What may happen to an input is a value or a `SociError`. Anything else, more than `MAX_MEMORY_BYTES` of memory or a hang
of `HANG_SECONDS` ends the run with status 1; the input is printed in base64, and kept in a file if there is a
``--keep`` folder. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import base64
import faulthandler
import random
import resource
import signal
import sys
from pathlib import Path
from types import FrameType

from fuzz.mutate import mutate
from fuzz.targets import TARGETS
from soci.errors import SociError

MAX_MEMORY_BYTES = 256 << 20
HANG_SECONDS = 10.0
"""For one input; they take milliseconds."""
HARD_HANG_SECONDS = 200.0
"""For a thousand inputs: what hangs inside C code gets no signal, and is ended with a traceback."""
SHOWN_BYTES = 400


class Hang(BaseException):
    """An input that takes for ever."""


def main() -> int:
    """Fuzz, and say how it went."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz one parser.")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    words = parser.parse_args()
    target = TARGETS[words.target]
    seeds = target.seeds()
    for seed in seeds:  # imports and caches come before the limits; seeds need not be valid
        _run(target.run, seed)
    signal.signal(signal.SIGALRM, _hang)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    rng = random.Random(words.seed)
    runs, good = words.runs or target.runs, 0
    for number in range(runs):
        data = mutate(seeds, rng)
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HARD_HANG_SECONDS, exit=True)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            good += _run(target.run, data)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _report(words.target, number, data, error, words.keep)
            raise
    signal.setitimer(signal.ITIMER_REAL, 0)
    peak = _peak()
    sys.stdout.write(f"{words.target}: {runs} inputs, {good} accepted, peak {peak >> 20} MiB\n")
    if peak > MAX_MEMORY_BYTES:
        sys.stderr.write(f"{words.target}: more memory than {MAX_MEMORY_BYTES} bytes\n")
        return 1
    return 0


def _run(run: object, data: bytes) -> bool:
    """Whether the input was accepted."""
    try:
        run(data)  # type: ignore[operator]
    except SociError:
        return False
    return True


def _report(name: str, number: int, data: bytes, error: BaseException, keep: Path | None) -> None:
    text = base64.b64encode(data[:SHOWN_BYTES]).decode("ascii")
    sys.stderr.write(f"{name}: input {number} ({len(data)} bytes) ends in {error!r}; it begins with {text}\n")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}-{number}").write_bytes(data)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    sys.exit(main())
