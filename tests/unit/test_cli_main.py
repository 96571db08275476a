# SPDX-License-Identifier: Apache-2.0
"""The command line's frame: version, help, errors, exit codes."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from soci.digest import sha256_digest
from soci.errors import DeadlineExceeded, InvalidConfig, NotFound
from soci_cli.__main__ import VERBS, run
from soci_cli.border import first_error, run_command
from soci_cli.unpack import extract_key
from soci_cli.values import VERSION, Globals, human_bytes, parse_duration

ROOT = Path(__file__).parents[2]


def test_the_version_that_nerdctl_reads_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    """The first x.y.z of ``soci --version`` is the compatible one, and our own is the project's."""
    assert run(["--version"]) == 0
    out = capsys.readouterr().out
    found = re.findall(r"\d+\.\d+\.\d+", out)
    assert found[0] == "0.15.0"
    assert found[1] == VERSION == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_version_and_help_import_no_heavy_library() -> None:
    """Neither gRPC nor an HTTP library is loaded just to print a version."""
    code = "import sys; from soci_cli.__main__ import run; run(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert not {"grpc", "httpx", "aiohttp", "nats", "rich"} & set(re.findall(r"'(\w+)'", done.stdout))
    assert all(verb in done.stdout for verb in VERBS)


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Our errors leave as ``soci: message`` with exit code 1, and nothing on stdout."""
    assert run(["--address", str(tmp_path / "none.sock"), "pull", "a:1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("soci: no containerd at ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["frob"], ["pull"], ["--frob", "pull", "a"], ["run", "--pull", "maybe", "a"]])
def test_misuse_has_its_own_exit_code(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line is exit code 2 and says what is wrong."""
    assert run(words) == 2
    assert capsys.readouterr().err.startswith("soci: ")


@pytest.mark.parametrize(
    "words", [["pull", "A b"], ["pull", "a", "--platform", "linux"], ["--timeout", "x", "pull", "a"]]
)
def test_bad_values_are_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A value that does not parse is one of our errors, before anything is contacted."""
    assert run(words) == 1
    assert capsys.readouterr().err.startswith("soci: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("1.5", 1.5), ("90s", 90.0), ("1m30s", 90.0), ("1h0.5m", 3630.0), ("250ms", 0.25)]
)
def test_durations(text: str, seconds: float) -> None:
    """Seconds, or Go's form."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1x", "-1s", "1s ", "1m30", "1e3", "9" * 10, "\u0663s"])
def test_durations_that_are_none(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(InvalidConfig):
        parse_duration(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    """Binary units with one digit."""
    assert human_bytes(count) == text


def test_the_timeout_ends_a_command_and_names_itself() -> None:
    """``--timeout`` is a `DeadlineExceeded` that names the flag; the work is cancelled."""
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    with pytest.raises(DeadlineExceeded, match=r"--timeout 0\.05 s"):
        run_command(work, Globals(timeout=0.05))
    assert cancelled


def test_our_own_error_is_found_in_a_group() -> None:
    """Of what a task group raised, our error is told, however deep; without one, the first."""
    ours, other = NotFound("x"), ValueError("y")
    assert first_error(BaseExceptionGroup("", [other, BaseExceptionGroup("", [ours])])) is ours
    assert first_error(BaseExceptionGroup("", [other])) is other

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    async def fail() -> None:
        raise ours

    with pytest.raises(NotFound):
        run_command(work, Globals())


def test_keys_of_layers_are_unlike() -> None:
    """Two tries for one layer have two keys; both end in the chain id, as containerd's own do."""
    chain = sha256_digest(b"")
    keys = {extract_key(chain) for _ in range(50)}
    assert len(keys) == 50
    assert all(re.fullmatch(rf"extract-\d+-[\w-]{{4}} {chain}", key) for key in keys)
