# SPDX-License-Identifier: Apache-2.0
"""A bounded run of the fuzzer over every parser, under a memory limit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.mutate import mutate
from fuzz.targets import TARGETS

TESTS = Path(__file__).parent.parent


def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer as a program."""
    # Idle threads of numpy's would count as memory.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    return subprocess.run(
        [sys.executable, "-m", "fuzz.run", *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_hostile_bytes_end_in_our_errors(name: str) -> None:
    """Thousands of broken inputs give a value or a SociError, in little memory, and none hangs."""
    done = fuzz(name)
    assert done.returncode == 0, done.stderr


def test_mutations_are_reproducible() -> None:
    """One seed gives the same inputs every time, so that a failure can be looked at."""
    seeds = TARGETS["manifest"].seeds()
    one, two = random.Random(5), random.Random(5)
    assert [mutate(seeds, one) for _ in range(50)] == [mutate(seeds, two) for _ in range(50)]
