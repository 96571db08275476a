# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration from file, environment and flags."""

from __future__ import annotations

import json
import math
import tomllib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci.errors import InvalidConfig
from soci_runtime import config as module
from soci_runtime.config import Config, Loaded, MirrorSetting, load, load_config
from soci_runtime.config_file import parse_file
from soci_runtime.inert import INERT
from soci_runtime.settings import SETTINGS

NOTHING: dict[str, str] = {}
PARALLEL = "[pull_modes.parallel_pull_unpack]"


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default file of these tests, which is not there."""
    path = tmp_path / "default.toml"
    monkeypatch.setattr(module, "DEFAULT_FILE", path)
    return path


def loaded(text: str, tmp_path: Path, environment: dict[str, str] | None = None, **flags: Any) -> Loaded:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, flags, environment or NOTHING)


def configured(text: str, tmp_path: Path, environment: dict[str, str] | None = None, **flags: Any) -> Config:
    return loaded(text, tmp_path, environment, **flags).config


def test_nothing_set_gives_the_defaults() -> None:
    """All fields are the documented ones, and the node is the host's name as a subject token."""
    config = load_config(None, {"root": None, "address": None}, NOTHING)
    expected = Config()
    for field in fields(Config):
        if field.name != "node":
            assert getattr(config, field.name) == getattr(expected, field.name), field.name
    assert config.node
    assert load_config(None, {"node": config.node}, NOTHING).node == config.node
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
        ('[sociable]\nroot = "/r"', "root", Path("/r")),
        ('[sociable]\naddress = "fd://"', "address", "fd://"),
        ('[sociable]\nlog_level = "WARN"', "log_level", "warning"),
        ("max_concurrency = 0", "max_concurrency", 100),
        ("max_concurrency = -7", "max_concurrency", -1),
        ("[http]\nDialTimeoutMsec = 1500", "dial_timeout", 1.5),
        ("[HTTP]\ndialtimeoutmsec = 1500", "dial_timeout", 1.5),
        ("[http]\nRequestTimeoutMsec = 0", "request_timeout", 300.0),
        ("[http]\nMaxRetries = 0", "max_retries", 8),
        ("[http]\nMaxRetries = -1", "max_retries", 0),
        ("[http]\nMaxRetries = 3", "blob_max_retries", 3),
        ("[http]\nMaxRetries = -1\n[blob]\nmax_retries = 0", "blob_max_retries", 0),
        ("[http]\nMaxRetries = 3\n[blob]\nmax_retries = 5", "blob_max_retries", 5),
        ("[http]\nMaxWaitMsec = 20", "blob_max_wait", 0.02),
        ("[resolver]\nauth_client_ttl_sec = -1", "auth_client_ttl", math.inf),
        ("[resolver]\nauth_client_ttl_sec = 0", "auth_client_ttl", 3600.0),
        ('[content_store]\ntype = ""', "content_store", "soci"),
        ('[content_store]\ntype = "containerd"', "content_store", "containerd"),
        ('[content_store]\ncontainerd_address = "unix:///c"', "containerd_address", "/c"),
        ('[cri_keychain]\nimage_service_path = ""', "cri_image_service", "/run/containerd/containerd.sock"),
        ("[cri_keychain]\nenable_keychain = true", "cri_keychain", True),
        (f"{PARALLEL}\nmax_concurrent_downloads_per_image = 0", "max_downloads_per_image", 3),
        (f"{PARALLEL}\nmax_concurrent_unpacks_per_image = -2", "max_unpacks_per_image", -1),
        (f'{PARALLEL}\nconcurrent_download_chunk_size = "1.5 Mb"', "download_chunk", 3 << 19),
        (f'{PARALLEL}\nconcurrent_download_chunk_size = "4096"', "download_chunk", 4096),
        (f"{PARALLEL}\nconcurrent_download_chunk_size = 4096", "download_chunk", 4096),
        (f'{PARALLEL}\nconcurrent_download_chunk_size = "0gb"', "download_chunk", 0),
        (f'{PARALLEL}\nconcurrent_download_chunk_size = ""', "download_chunk", 0),
        ("", "soci_v2", True),
    ],
)
def test_keys_of_the_file(tmp_path: Path, text: str, field: str, value: Any) -> None:
    """Each key sets its field, in whatever case; what only the reference has is passed over."""
    found = getattr(configured(text, tmp_path), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('mount_timeout_sec = "7"', "mount_timeout_sec: '7' is not a number"),
        ("mount_timeout_sec = true", "mount_timeout_sec"),
        ("mount_timeout_sec = nan", "mount_timeout_sec: nan must be between 0.1 and 86400 seconds"),
        ("mount_timeout_sec = inf", "mount_timeout_sec: inf must be"),
        ("mount_timeout_sec = -1", "mount_timeout_sec: -1 must be"),
        (f"mount_timeout_sec = 1{'0' * 400}", "mount_timeout_sec: 1000"),
        (f"mount_timeout_sec = 1{'0' * 5000}", "config.toml"),
        (f"x = {'[' * 5000}", "config.toml"),
        ("[mount_timeout_sec]", "mount_timeout_sec: {} is not a number"),
        ("http = 5", "http: 5 is not a table"),
        ("[http]\nMaxRetries = 1\nmaxretries = 1", "http.maxretries is there twice"),
        ("[http]\nMaxWaitMsec = 1.5", "http.MaxWaitMsec: 1.5 is not a whole number"),
        (f"[http]\nMaxWaitMsec = 1{'0' * 400}", "http.MaxWaitMsec: 1000"),
        ("debug = 1", "debug: 1 is not true or false"),
        ("[fuse]\nattr_timeout = true", "fuse.attr_timeout: True is not a whole number"),
        ('[content_store]\ntype = "other"', "content_store.type: 'other' is none of soci, containerd"),
        ('[content_store]\ncontainerd_address = "c.sock"', "content_store.containerd_address: 'c.sock'"),
        ('[sociable]\nwhole_fallback = "perhaps"', "'perhaps' is none of auto, always, never"),
        (
            f'{PARALLEL}\nconcurrent_download_chunk_size = "much"',
            "concurrent_download_chunk_size: 'much' is not a size",
        ),
        (f'{PARALLEL}\nconcurrent_download_chunk_size = "1tb"', "'1tb' is not a size"),
        (f"{PARALLEL}\nconcurrent_download_chunk_size = -1", "-1 must be between 0"),
        (f"{PARALLEL}\nmax_concurrent_downloads = 2", "max_concurrent_downloads_per_image is above .*_downloads, 2"),
        ('[sociable]\nkubelet_credential_config = "/c"', "needs sociable.kubelet_credential_bin_dir"),
        ('[sociable]\npeer_listen = "h:1"', "sociable.peer_listen needs sociable.peer_secret_file"),
        ('[sociable]\npeer_tls_cert = "/c"', "sociable.peer_tls_cert and sociable.peer_tls_key go together"),
        ('[sociable]\npeer_tls_ca = "/c"', "sociable.peer_tls_ca with them"),
        ('[sociable]\naddress = "/a"\n[cri_keychain]\nenable_keychain = true\nimage_service_path = "/a"', "own socket"),
        ("[resolver]\nhost = 1", "resolver.host: 1 is not a table"),
        ('[resolver.host."h"]\nmirrors = 1', 'resolver.host."h".mirrors: 1 is not a list'),
        ('[[resolver.host."h".mirrors]]\ninsecure = true', "a mirror without host"),
        ('[[resolver.host."h".mirrors]]\nhost = "m"\ninsecure = 1', "insecure: 1 is not true or false"),
        ('[[resolver.host."h".mirrors]]\nhost = "m"\nrequest_timeout_sec = nan', "request_timeout_sec must be"),
        ('[resolver.host."h"]\n[resolver.host."H"]', "is there twice"),
        ("[snapshotter]\nmin_layer_size = 1.5", "snapshotter.min_layer_size"),
        ("[snapshotter]\nmin_layer_size = -1", "min_layer_size"),
        ("[snapshotter]\nmin_layer_size = true", "snapshotter.min_layer_size"),
        ("[blob]\nmax_span_verification_retries = 1000000", "max_span_verification_retries: 1000000 must be"),
        ('[sociable]\nplain_http = "a"', "sociable.plain_http"),
        ("[sociable]\nplain_http = [1]", "sociable.plain_http"),
        ('[sociable]\nnode = "a.b"', "sociable.node: 'a.b'"),
        ('[sociable]\nnode = "a b"', "sociable.node: 'a b'"),
        ("[sociable]\nread_deadline_sec = 0", "read_deadline"),
        ("[sociable]\nwebhook_token = 123456", "sociable.webhook_token: not a text$"),
        ("sociable = 5", "sociable: 5 is not a table"),
        ("a = ", "config.toml"),
        ("a = 1\na = 2", "config.toml"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, text: str, words: str) -> None:
    """The message names file or key, and what is wrong with it."""
    with pytest.raises(InvalidConfig, match=words):
        configured(text, tmp_path)


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    """Each later one counts; an empty variable and an absent flag say nothing."""
    text = '[sociable]\nnode = "file"\nnats_url = "nats://file:1"'
    environment = {"SOCIABLE_NODE": "environment", "NATS_URL": "", "SOCI_SNAPSHOTTER_LOG_LEVEL": "debug"}
    config = configured(text, tmp_path, environment, log_level="error", node=None, root=tmp_path)
    assert (config.node, config.nats_url, config.log_level) == ("environment", "nats://file:1", "error")
    assert config.root == tmp_path
    assert configured(text, tmp_path).node == "file"
    assert configured(text, tmp_path, environment, node="flag").node == "flag"


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
        ({"log_level": "loud"}, "--log-level: 'loud' is none of debug"),
        ({"address": "relative.sock"}, "address"),
        ({"address": "/" + "x" * 107}, "107 bytes"),
        ({"address": "fd://3"}, "--address: 'fd://3'"),
        ({"mount_timeout": 5}, "mount_timeout cannot be set by a flag"),
        ({"node": "ä"}, "--node: 'ä'"),
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


def test_every_field_is_set_by_one_setting() -> None:
    """The table of settings and the class agree, and no key means two things."""
    assert sorted(one.field for one in SETTINGS) == sorted(field.name for field in fields(Config))
    keys = [one.key.lower() for one in SETTINGS] + [one.key for one in INERT]
    assert len(set(keys)) == len(keys)
    for one in SETTINGS:
        written = tomllib.loads(f"x = {one.kind.write(one.default)}")["x"]
        assert one.take(written, "default") == one.default, "a default is within its limits"


def test_every_field_is_read_by_a_service() -> None:
    """A setting that nobody reads would promise what does not happen."""
    sources = "".join(
        file.read_text(encoding="utf-8")
        for folder in ("services", "libs/runtime")
        for file in (Path(__file__).parents[2] / folder).rglob("*.py")
    )
    assert {field.name for field in fields(Config) if f"config.{field.name}" not in sources} == set()


@given(
    st.dictionaries(
        st.sampled_from(
            [one.key for one in SETTINGS] + [one.key for one in INERT] + ["resolver.host.h.mirrors", "x.y"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.datetimes().map(str),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_no_value_is_a_defect(values: dict[str, Any]) -> None:
    """Whatever a key is set to, the file is taken or refused by name."""
    text = "\n".join(f"{key} = {toml(value)}" for key, value in values.items())
    with suppress(InvalidConfig):
        parse_file(text, "file")


def toml(value: Any) -> str:
    """A TOML value; what TOML has no word for is left broken."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)} = {toml(one)}' for key, one in value.items())} }}"
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


REFERENCE = """
http_cache_type = ""
filesystem_cache_type = ""
resolve_result_entry = 30
debug = false
disable_verification = false
max_concurrency = 100
mount_timeout_sec = 30
fuse_metrics_emit_wait_duration_sec = 60
metrics_address = ""
metrics_network = "tcp"
no_prometheus = false
debug_address = ""
metadata_store = "db"
metadata_db_no_sync = false
metadata_insertion_chunk_size = 5000
skip_check_snapshotter_supported = false
[http]
DialTimeoutMsec = 3000
ResponseHeaderTimeoutMsec = 3000
RequestTimeoutMsec = 300000
MaxRetries = 8
MinWaitMsec = 30
MaxWaitMsec = 300000
[blob]
valid_interval = 60
check_always = false
fetching_timeout_sec = 300
max_retries = 8
min_wait_msec = 30
max_wait_msec = 300000
force_single_range_mode = false
max_span_verification_retries = 0
[directory_cache]
max_lru_cache_entry = 10
max_cache_fds = 10
sync_add = false
direct = true
[fuse]
attr_timeout = 1
entry_timeout = 1
negative_timeout = 1
log_fuse_operations = false
[background_fetch]
disable = false
silence_period_msec = 30000
fetch_period_msec = 500
max_queue_size = 300
drop_policy = "newest"
emit_metric_period_sec = 10
[content_store]
type = "soci"
containerd_address = "/run/containerd/containerd.sock"
[prefetch]
enable = false
max_concurrency = 0
[pull_modes.soci_v1]
enable = false
[pull_modes.soci_v2]
enable = true
[pull_modes.parallel_pull_unpack]
enable = false
experimental_parallel_pull_as_fallback = false
max_concurrent_downloads = -1
max_concurrent_downloads_per_image = 3
max_concurrent_unpacks = -1
max_concurrent_unpacks_per_image = 1
concurrent_download_chunk_size = ""
discard_unpacked_layers = false
[kubeconfig_keychain]
enable_keychain = false
kubeconfig_path = ""
[cri_keychain]
enable_keychain = false
image_service_path = "/run/containerd/containerd.sock"
[resolver]
auth_client_ttl_sec = 3600
enable_auth_client_sharing = false
[resolver.host]
[snapshotter]
min_layer_size = 0
allow_invalid_mounts_on_restart = false
"""


def test_the_references_own_defaults(tmp_path: Path) -> None:
    """A file with every key of the reference, as it comes, is taken without a word, even by ``--strict``; what it sets
    is what holds without a file, but for the three that differ here."""
    file = tmp_path / "config.toml"
    file.write_text(REFERENCE)
    found = load(file, {}, NOTHING, strict=True)
    assert (found.unknown, found.without_effect) == ((), ())
    plain = load(None, {}, NOTHING).config
    different = {
        field.name for field in fields(Config) if getattr(found.config, field.name) != getattr(plain, field.name)
    }
    assert different == {"span_attempts", "soci_v1", "max_unpacks_per_image"}
    ours = {one.key for one in SETTINGS if one.ours}
    named = {f"{table}.{key}" if table else key for table, key in keys_of(REFERENCE)}
    streams = {one.key for one in INERT if "decompress_streams" in one.key}
    assert named | ours | streams == {one.key for one in SETTINGS} | {one.key for one in INERT}


def keys_of(text: str) -> list[tuple[str, str]]:
    table, found = "", []
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
            found += [("resolver", "host")] if table == "resolver.host" else []
        elif line:
            found.append((table, line.split()[0]))
    return found


def test_mirrors(tmp_path: Path) -> None:
    """The reference's mirrors, by host, in their order, their keys and hosts in whatever case."""
    text = """
    [Resolver.Host."Docker.io"]
    [[Resolver.Host."Docker.io".Mirrors]]
    Host = "https://m:5000/v2"
    INSECURE = true
    request_timeout_sec = -1
    [[Resolver.Host."Docker.io".Mirrors]]
    host = "n"
    [Resolver.Host."a.example"]
    """
    assert configured(text, tmp_path).resolver_hosts == (
        ("a.example", ()),
        (
            "docker.io",
            (MirrorSetting("https://m:5000/v2", insecure=True, request_timeout=math.inf), MirrorSetting("n")),
        ),
    )


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("mount_timeout_sek = 5", ["mount_timeout_sek (is mount_timeout_sec meant?)"]),
        ("[sociable]\nread_deadline_sek = 5", ["sociable.read_deadline_sek (is sociable.read_deadline_sec meant?)"]),
        ("[snapshoter]\nmin_layer_size = 5", ["snapshoter (is snapshotter meant?)"]),
        ("min_layer_size = 5", ["min_layer_size (is snapshotter.min_layer_size meant?)"]),
        ("[tomorrow]\nx = {y = 1}", ["tomorrow"]),
        ('[[resolver.host."h".mirrors]]\nhost = "m"\nlevel = 1', ['resolver.host."h".mirrors.level']),
    ],
)
def test_unknown_keys_are_told_or_refused(tmp_path: Path, text: str, unknown: list[str]) -> None:
    """A key that nobody knows is told, with the nearest that is known, and refused where that is asked for."""
    found = loaded(text, tmp_path)
    assert list(found.unknown) == unknown
    with pytest.raises(InvalidConfig) as refused:
        load(tmp_path / "config.toml", {}, NOTHING, strict=True)
    assert str(refused.value) == f"{tmp_path / 'config.toml'}: no setting: {', '.join(unknown)}"


def test_many_unknown_keys_cost_little(tmp_path: Path) -> None:
    """Of a file full of them the first are named and the others counted."""
    found = loaded("".join(f"k{number} = 1\n" for number in range(50_000)), tmp_path)
    assert found.unknown[0] == "k0"
    assert found.unknown[-1] == "and 49980 more"
    assert len(found.unknown) == 21


def test_keys_without_effect_are_told_where_they_are_set(tmp_path: Path) -> None:
    """A key of the reference that means nothing here is told with the reason if it is set to something unusual."""
    usual = 'filesystem_cache_type = "directory"\n[fuse]\nattr_timeout = 1\n[directory_cache]\ndirect = true'
    assert loaded(usual, tmp_path).without_effect == ()
    unusual = "[Fuse]\nAttr_Timeout = 7\n[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = '/x'"
    told = dict(loaded(unusual, tmp_path).without_effect)
    assert set(told) == {"fuse.attr_timeout", "pull_modes.parallel_pull_unpack.decompress_streams.gzip.path"}
    assert "isal" in told["pull_modes.parallel_pull_unpack.decompress_streams.gzip.path"]


def test_who_set_a_value(tmp_path: Path) -> None:
    """A value's origin is its file and key, its variable or its flag; a default has none."""
    text = '[Sociable]\nNode = "file"\nnats_url = "nats://file:1"\n[http]\nMaxRetries = 1\nMaxWaitMsec = 0'
    found = loaded(text, tmp_path, {"NATS_URL": "nats://e:1"}, log_level="error")
    file = tmp_path / "config.toml"
    assert dict(found.origins) == {
        "node": f"{file}: Sociable.Node",
        "nats_url": "NATS_URL",
        "log_level": "--log-level",
        "max_retries": f"{file}: http.MaxRetries",
        "blob_max_retries": f"{file}: http.MaxRetries",
    }
    assert found.file == str(file)
