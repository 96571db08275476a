# SPDX-License-Identifier: Apache-2.0
"""``./dev test`` and ``./dev lint``: which programs run, on what, and what counts as a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from soci_dev.folders import CHECKOUT

SOURCES: Final = ("libs", "services", "tools", "tests")
"""Folders that are linted; generated code in ``proto`` is checked by its generator."""

HOW_TO_LOCK: Final = """\
requirements.lock and requirements-dev.lock pin every package by version and hash for all platforms and
Pythons from 3.11 on. After a change of the dependencies in pyproject.toml, renew both with uv (pip cannot):

    python3 -m venv /tmp/uv && /tmp/uv/bin/pip install uv
    options="--generate-hashes --no-emit-index-url --universal --python-version 3.11"
    /tmp/uv/bin/uv pip compile pyproject.toml $options -o requirements.lock
    /tmp/uv/bin/uv pip compile --extra dev pyproject.toml $options -o requirements-dev.lock

Add --upgrade to take newer versions. The next ./dev sees the change and makes .venv anew."""


def run_tests(words: Sequence[str]) -> int:
    """Pytest with ``words``; its exit status."""
    return subprocess.run([sys.executable, "-m", "pytest", *words], cwd=CHECKOUT, check=False).returncode


def run_fuzz(parser: str | None, runs: int | None, seed: int) -> int:
    """Fuzz one parser, or all, one after the other; 1 if one of them failed. An unknown one is said to be so."""
    tests = CHECKOUT / "tests"
    names = [parser] if parser else sorted(_fuzz_targets(tests))
    options = [*(["--runs", str(runs)] if runs else []), "--seed", str(seed), "--keep", str(CHECKOUT / "fuzz-failures")]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # idle threads of numpy's would count as memory
    failed = 0
    for name in names:
        command = [sys.executable, "-m", "fuzz.run", name, *options]
        failed |= subprocess.run(command, cwd=tests, env=environment, check=False).returncode
    return int(bool(failed))


def _fuzz_targets(tests: Path) -> list[str]:
    """The parsers that `fuzz.targets` knows. It is a program of the tests, which tools do not import."""
    words = [sys.executable, "-c", "from fuzz.targets import TARGETS; print(*TARGETS)"]
    return subprocess.run(words, cwd=tests, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def lint_commands(checkout: Path) -> dict[str, list[str]]:
    """What each check is called and runs."""
    programs = Path(sys.executable).parent
    sources = [name for name in SOURCES if (checkout / name).is_dir()]
    commands = {
        "ruff check": [str(programs / "ruff"), "check", "--quiet", *sources],
        "ruff format": [str(programs / "ruff"), "format", "--check", "--quiet", *sources],
        "mypy --strict": [sys.executable, "-m", "mypy", "--no-error-summary", *sources],
        "package borders": [str(programs / "lint-imports")],
    }
    if (checkout / "docs" / "configuration.md").exists():
        commands["generated tables"] = [sys.executable, "-m", "soci_dev.docs", "--check"]
    generator = checkout / "proto" / "generate"
    if generator.exists():
        commands["generated code"] = [str(generator), "--check"]
    return commands


def run_lint() -> int:
    """Run every check, also after one failed; 0 if all passed. Output only of those that failed."""
    failed = []
    for name, command in lint_commands(CHECKOUT).items():
        begun = time.monotonic()
        done = subprocess.run(
            command, cwd=CHECKOUT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {name} ({time.monotonic() - begun:.1f} s)", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout)
    if failed:
        print(f"dev: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))
