# SPDX-License-Identifier: Apache-2.0
"""compose.yaml as the installed Compose reads it. That it works is shown by ``./dev compose-proof``."""

from __future__ import annotations

import os
import subprocess

import pytest

from soci_dev.engine import compose_command
from soci_dev.folders import CHECKOUT


def test_compose_reads_the_file_and_its_variables() -> None:
    """The installed Compose takes the file, and one variable moves the state folder on both sides."""
    command = compose_command()
    if not command:
        pytest.skip("no Compose on this machine: install docker-compose, or Docker Compose 2")
    environment = {**os.environ, "SOCIABLE_ROOT": "/somewhere/else", "SOCIABLE_NATS_PORT": "14222"}
    done = subprocess.run(
        [*command, "--file", str(CHECKOUT / "compose.yaml"), "config"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip().removeprefix("- ") for line in done.stdout.splitlines()]
    assert lines.count("source: /somewhere/else") == lines.count("target: /somewhere/else") == 4
    assert lines.count("SOCI_SNAPSHOTTER_ROOT: /somewhere/else") == 5
    assert lines.count("NATS_URL: nats://127.0.0.1:14222") == 5
    assert "/var/lib/soci-snapshotter-grpc" not in done.stdout
