# SPDX-License-Identifier: Apache-2.0
"""The configuration as text: ``config default`` and ``config dump``."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from soci_runtime import config as module
from soci_runtime import kinds
from soci_runtime.config import Config, Loaded, MirrorSetting, load
from soci_runtime.config_file import parse_file
from soci_runtime.config_text import REDACTED, default_text, dump_text
from soci_runtime.serve import Process, service_command
from soci_runtime.settings import SETTINGS

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
SOCKETS = TEXTS.map(lambda text: f"/{text}"[:20])
MIRRORS = st.builds(
    MirrorSetting, TEXTS.filter(bool), st.booleans(), st.just(math.inf) | st.integers(0, 86_400).map(float)
)


def values_of(setting: Any) -> st.SearchStrategy[Any]:
    """Every value that a setting may have."""
    low, high = setting.limits or (0, 0)
    if setting.choices:
        return st.sampled_from(setting.choices)
    by_kind = {
        kinds.FLAG: st.booleans(),
        kinds.SECONDS: st.floats(low, high),
        kinds.MILLISECONDS: st.integers(1, int(min(high, 86_400) * 1000)).map(lambda value: value / 1000),
        kinds.SECONDS_OR_NEVER: st.just(math.inf) | st.integers(1, 86_400).map(float),
        kinds.TEXT: TEXTS.filter(lambda text: "@" not in text),
        kinds.SOCKET: SOCKETS,
        kinds.ADDRESS: SOCKETS | st.just("fd://"),
        kinds.NODE: st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
        kinds.LEVEL: st.sampled_from(kinds.LEVELS),
        kinds.PATH: SOCKETS.map(lambda text: Path(text).absolute()),
        kinds.WORDS: st.lists(TEXTS, max_size=3).map(tuple),
        kinds.MIRRORS: st.dictionaries(
            TEXTS.map(str.lower).filter(lambda text: text == text.lower()), st.lists(MIRRORS, max_size=2).map(tuple)
        ).map(lambda hosts: tuple(sorted(hosts.items()))),
    }
    if setting.kind in by_kind:
        return by_kind[setting.kind]
    numbers = st.integers(int(low), int(high))
    return numbers.filter(bool) if setting.kind is kinds.COUNT else numbers  # 0 stands for the default


def as_set(config: Config) -> Config:
    """``config`` with limits that agree, and without secrets, which are not written."""
    return replace(
        config,
        webhook_token="",
        max_downloads=-1,
        max_unpacks=-1,
        kubelet_credential_bin_dir="/plugins",
        peer_secret_file="/secret",
        peer_tls_cert="/cert",
        peer_tls_key="/key",
        cri_image_service=f"/other{config.cri_image_service}",
        resolver_hosts=tuple((h, tuple(one for one in m if "@" not in one.host)) for h, m in config.resolver_hosts),
    )


def read_back(text: str, tmp: Path) -> Config:
    file = tmp / "back.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, {}, {}, strict=True).config


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own file is not read."""
    monkeypatch.setattr(module, "DEFAULT_FILE", tmp_path / "none.toml")


def test_the_defaults_read_back(tmp_path: Path) -> None:
    """The printed file is read without a remark, and is what holds without a file."""
    parsed = parse_file(default_text(), "default")
    assert (parsed.slips, parsed.without_effect) == ([], [])
    assert read_back(default_text(), tmp_path) == load(None, {}, {}).config
    assert all(one.key.rpartition(".")[2] in default_text() for one in SETTINGS)


def test_a_changed_default_is_followed(tmp_path: Path) -> None:
    """Who changes [http] in the printed file changes spans' requests too, as where nothing is printed."""
    text = default_text().replace("MaxRetries = 8", "MaxRetries = 2")
    assert read_back(text, tmp_path).blob_max_retries == 2


@given(values=st.fixed_dictionaries({one.field: values_of(one) for one in SETTINGS}))
def test_what_is_dumped_reads_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    """Any configuration but its secrets comes back from its own dump."""
    config = as_set(Config(**values))
    assert read_back(dump_text(Loaded(config)), tmp_path_factory.getbasetemp()) == config


def test_the_dump_names_who_set_a_value(tmp_path: Path) -> None:
    """Each line ends with its origin."""
    file = tmp_path / "c.toml"
    file.write_text("mount_timeout_sec = 7")
    lines = dump_text(load(file, {"node": "n"}, {"NATS_URL": "nats://e:1"})).splitlines()
    assert f"mount_timeout_sec = 7  # {file}: mount_timeout_sec" in lines
    assert 'node = "n"  # --node' in lines
    assert 'nats_url = "nats://e:1"  # NATS_URL' in lines
    assert "read_deadline_sec = 60  # default" in lines


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ('[sociable]\nwebhook_token = "hunter2"', "hunter2"),
        ('[sociable]\nnats_url = "nats://me:hunter2@h:1"', "hunter2"),
        ('[sociable]\nnats_url = "nats://a:1, me:hunter2@h:1"', "hunter2"),
        ('[[resolver.host.h.mirrors]]\nhost = "https://me:hunter2@m"', "hunter2"),
    ],
)
def test_secrets_are_not_dumped(tmp_path: Path, text: str, secret: str) -> None:
    """A secret's line is a comment that says it is set, and does not read back as a secret of its own."""
    file = tmp_path / "c.toml"
    file.write_text(text)
    dumped = dump_text(load(file, {}, {}))
    assert secret not in dumped
    assert REDACTED in dumped
    assert REDACTED not in json.dumps(tomllib.loads(dumped))


def test_the_commands(tmp_path: Path) -> None:
    """``config default`` and ``config dump`` print and start nothing; a bad file is told, with status 1."""

    async def service(config: Config, process: Process) -> None:
        raise AssertionError

    command = service_command("soci-x", service)
    run = CliRunner().invoke
    assert run(command, ["config", "default"], catch_exceptions=False).output == default_text()
    dumped = run(command, ["--node", "n", "config", "dump"], catch_exceptions=False)
    assert 'node = "n"  # --node' in dumped.output
    assert dumped.exit_code == 0
    file = tmp_path / "c.toml"
    file.write_text("slip = 1")
    assert run(command, ["--config", str(file), "config", "dump"]).exit_code == 0
    refused = run(command, ["--strict", "--config", str(file), "config", "dump"])
    assert refused.exit_code == 1
    assert "no setting: slip" in refused.output
