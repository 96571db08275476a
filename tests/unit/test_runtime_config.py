# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration from file, environment and flags."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from soci.errors import InvalidConfig
from soci_runtime import config as module
from soci_runtime.config import Config, load_config, parse_config

NOTHING: dict[str, str] = {}


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default file of these tests, which is not there."""
    path = tmp_path / "default.toml"
    monkeypatch.setattr(module, "DEFAULT_FILE", path)
    return path


def load(text: str, tmp_path: Path, environment: dict[str, str] | None = None, **flags: Any) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, flags, environment or NOTHING)


def test_nothing_set_gives_the_defaults() -> None:
    """All fields are the documented ones, and the node is the host's name as a subject token."""
    config = load_config(None, {"root": None, "address": None}, NOTHING)
    expected = Config()
    for field in fields(Config):
        if field.name != "node":
            assert getattr(config, field.name) == getattr(expected, field.name), field.name
    assert module._NODE.fullmatch(config.node)
    assert (config.cache, config.mounts) == (config.root / "cache", config.root / "mounts")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("mount_timeout_sec = 7", "mount_timeout", 7.0),
        ("mount_timeout_sec = 0", "mount_timeout", 30.0),
        ("MOUNT_TIMEOUT_SEC = 7", "mount_timeout", 7.0),
        ("disable_verification = true", "disable_verification", True),
        ("[snapshotter]\nmin_layer_size = 10", "min_layer_size", 10),
        ("[Snapshotter]\nMin_Layer_Size = 10", "min_layer_size", 10),
        ("[pull_modes.soci_v1]\nenable = false", "soci_v1", False),
        ("[pull_modes.soci_v2]\nenable = false", "soci_v2", False),
        ("[blob]\nmax_span_verification_retries = 0", "span_attempts", 1),
        ("[blob]\nmax_span_verification_retries = 5", "span_attempts", 6),
        ("[blob]\nmax_span_verification_retries = -1", "span_attempts", 4),
        ('[sociable]\nnats_url = "nats://h:1"', "nats_url", "nats://h:1"),
        ('[sociable]\nnode = "n1"', "node", "n1"),
        ("[sociable]\nread_deadline_sec = 1.5", "read_deadline", 1.5),
        ("[sociable]\nindex_failure_ttl_sec = 0", "index_failure_ttl", 0.0),
        ('[sociable]\nplain_http = ["a:1", "b"]', "plain_http", ("a:1", "b")),
        ('metadata_store = "db"\n[directory_cache]\nmax_cache_fds = 3\n[future]\nx = {y = 1}', "span_attempts", 3),
        ("", "soci_v2", True),
    ],
)
def test_keys_of_the_file(tmp_path: Path, text: str, field: str, value: Any) -> None:
    """Each key sets its field, in whatever case; what only the reference has is passed over."""
    found = getattr(load(text, tmp_path), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('mount_timeout_sec = "7"', "mount_timeout_sec: '7' is not a float"),
        ("mount_timeout_sec = true", "mount_timeout_sec"),
        ("mount_timeout_sec = nan", "mount_timeout"),
        ("mount_timeout_sec = inf", "mount_timeout"),
        ("mount_timeout_sec = -1", "mount_timeout must be between"),
        ("disable_verification = 1", "disable_verification: 1 is not a bool"),
        ("[snapshotter]\nmin_layer_size = 1.5", "snapshotter.min_layer_size"),
        ("[snapshotter]\nmin_layer_size = -1", "min_layer_size"),
        ("[snapshotter]\nmin_layer_size = true", "snapshotter.min_layer_size"),
        ("[blob]\nmax_span_verification_retries = 1000000", "span_attempts"),
        ('[sociable]\nplain_http = "a"', "sociable.plain_http"),
        ("[sociable]\nplain_http = [1]", "sociable.plain_http"),
        ('[sociable]\nnode = "a.b"', "node 'a.b'"),
        ('[sociable]\nnode = "a b"', "node 'a b'"),
        ("[sociable]\nread_deadline_sec = 0", "read_deadline"),
        ("[sociable]\nread_deadline_sek = 5", "sociable.read_deadline_sek is no setting; .*read_deadline_sec"),
        ("sociable = 5", "sociable is no setting"),
        ("a = ", "config.toml"),
        ("a = 1\na = 2", "config.toml"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, text: str, words: str) -> None:
    """The message names file or key, and what is wrong with it."""
    with pytest.raises(InvalidConfig, match=words):
        load(text, tmp_path)


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    """Each later one counts; an empty variable and an absent flag say nothing."""
    text = '[sociable]\nnode = "file"\nnats_url = "nats://file:1"'
    environment = {"SOCIABLE_NODE": "environment", "NATS_URL": "", "SOCI_SNAPSHOTTER_LOG_LEVEL": "debug"}
    config = load(text, tmp_path, environment, log_level="error", node=None, root=tmp_path)
    assert (config.node, config.nats_url, config.log_level) == ("environment", "nats://file:1", "error")
    assert config.root == tmp_path
    assert load(text, tmp_path).node == "file"
    assert load(text, tmp_path, environment, node="flag").node == "flag"


@pytest.mark.parametrize(
    ("name", "value", "field", "found"),
    [
        ("SOCI_SNAPSHOTTER_ROOT", "/r", "root", Path("/r")),
        ("SOCI_SNAPSHOTTER_ADDRESS", "unix:///run/x.sock", "address", "/run/x.sock"),
        ("SOCI_SNAPSHOTTER_LOG_LEVEL", "warning", "log_level", "warning"),
        ("NATS_URL", "nats://h:1", "nats_url", "nats://h:1"),
        ("SOCIABLE_NODE", "n-1", "node", "n-1"),
    ],
)
def test_the_environment(name: str, value: str, field: str, found: Any) -> None:
    """Each variable sets its field."""
    assert getattr(load_config(None, {}, {name: value}), field) == found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"log_level": "loud"}, "log level 'loud' is none of debug"),
        ({"address": "relative.sock"}, "address"),
        ({"address": "/" + "x" * 107}, "107 bytes"),
        ({"address": "fd://"}, "address"),
        ({"node": "ä"}, "node"),
        ({"node": "x" * 65}, "node"),
        ({"root": 5}, "--root: 5"),
        ({"nats_url": 5}, "--nats-url: 5"),
    ],
)
def test_wrong_flags_are_named(flags: dict[str, Any], words: str) -> None:
    """The message names the flag or its value."""
    with pytest.raises(InvalidConfig, match=words):
        load_config(None, flags, NOTHING)


def test_a_relative_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths go to other processes, which have other working folders."""
    monkeypatch.chdir(tmp_path)
    assert load_config(None, {"root": Path("here")}, NOTHING).root == tmp_path / "here"


def test_which_file_is_read(tmp_path: Path, no_default_file: Path) -> None:
    """The default file where it is there; else the environment's; a named one counts before both."""
    other = tmp_path / "other.toml"
    other.write_text("mount_timeout_sec = 2")
    environment = {"SOCI_SNAPSHOTTER_CONFIG": str(other)}
    assert load_config(None, {}, environment).mount_timeout == 2.0
    no_default_file.write_text("mount_timeout_sec = 3")
    assert load_config(None, {}, NOTHING).mount_timeout == 3.0
    assert load_config(None, {}, environment).mount_timeout == 2.0
    assert load_config(no_default_file, {}, environment).mount_timeout == 3.0


@pytest.mark.parametrize("make", ["gone", "folder", "large", "not utf-8"])
def test_a_named_file_must_be_readable(tmp_path: Path, make: str) -> None:
    """A file that was named, by flag or environment, and cannot be read is an error with its path."""
    path = tmp_path / "named.toml"
    if make == "folder":
        path.mkdir()
    elif make == "large":
        path.write_bytes(b"#" * (module.CONFIG_LIMIT + 1))
    elif make == "not utf-8":
        path.write_bytes(b"a = '\xff'")
    with pytest.raises(InvalidConfig, match=r"named\.toml"):
        load_config(path, {}, NOTHING)
    with pytest.raises(InvalidConfig, match=r"named\.toml"):
        load_config(None, {}, {"SOCI_SNAPSHOTTER_CONFIG": str(path)})


def test_every_key_is_of_a_field() -> None:
    """The table of keys and the class agree."""
    names = {field.name for field in fields(Config)}
    assert set(module._KEYS.values()) <= names
    assert set(module._ENVIRONMENT.values()) <= names
    assert parse_config("", "x") == {}
