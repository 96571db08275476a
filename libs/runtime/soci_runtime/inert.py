# SPDX-License-Identifier: Apache-2.0
"""Keys of the reference's file that are accepted and do nothing here: each with its default there, and the reason.

A file written for the reference is read without an error or a warning about them; one that sets such a key to
something else is told at info that it has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from soci_runtime.kinds import FLAG, TEXT, WHOLE, WORDS, Kind


@dataclass(frozen=True, slots=True)
class Inert:
    """One key. ``usual`` are the values that ask for nothing."""

    key: str
    kind: Kind
    usual: tuple[Any, ...]
    why: str


_FILES: Final = "spans are kept in one sparse file a layer, which the kernel caches"
_METADATA: Final = "tables of contents are read from the zTOCs, without a database"
_KERNEL: Final = "layers never change, so the kernel may keep names and attributes for ever"
_FILL: Final = "background fill goes as fast as readers, link and disk let it, over all layers in use"
_METRICS: Final = "no metrics are served"
_DECOMPRESSOR: Final = "layers are inflated in the process, by isal and zstandard"
_DECOMPRESS: Final = "pull_modes.parallel_pull_unpack.decompress_streams"

# fmt: off
INERT: Final[tuple[Inert, ...]] = (
    Inert("http_cache_type", TEXT, ("",), "ignored by the reference, too"),
    Inert("filesystem_cache_type", TEXT, ("", "directory"), _FILES),
    Inert("resolve_result_entry", WHOLE, (0, 30), "a layer that is shown is held as long as it is shown"),
    Inert("debug", FLAG, (False,), "use --log-level debug"),
    Inert("fuse_metrics_emit_wait_duration_sec", WHOLE, (0, 60), _METRICS),
    Inert("metrics_address", TEXT, ("",), _METRICS),
    Inert("metrics_network", TEXT, ("", "tcp"), _METRICS),
    Inert("no_prometheus", FLAG, (False, True), _METRICS),
    Inert("debug_address", TEXT, ("",), "there is no pprof in a Python process"),
    Inert("metadata_store", TEXT, ("", "db", "db-multi"), _METADATA),
    Inert("metadata_db_no_sync", FLAG, (False,), _METADATA),
    Inert("metadata_insertion_chunk_size", WHOLE, (0, 5000), _METADATA),
    Inert("skip_check_snapshotter_supported", FLAG, (False, True), "the file system is not probed at the start"),
    Inert("blob.valid_interval", WHOLE, (0, 60), "whether a layer can be had shows when bytes of it are needed"),
    Inert("blob.check_always", FLAG, (False,), "whether a layer can be had shows when bytes of it are needed"),
    Inert("blob.force_single_range_mode", FLAG, (False, True), "a request never asks for more than one range"),
    Inert("directory_cache.max_lru_cache_entry", WHOLE, (0, 10), _FILES),
    Inert("directory_cache.max_cache_fds", WHOLE, (0, 10), _FILES),
    Inert("directory_cache.sync_add", FLAG, (False,), _FILES),
    Inert("directory_cache.direct", FLAG, (True,), _FILES),
    Inert("fuse.attr_timeout", WHOLE, (0, 1), _KERNEL),
    Inert("fuse.entry_timeout", WHOLE, (0, 1), _KERNEL),
    Inert("fuse.negative_timeout", WHOLE, (0, 1), _KERNEL),
    Inert("fuse.log_fuse_operations", FLAG, (False,), "operations are too many to be logged; misses are events"),
    Inert("background_fetch.fetch_period_msec", WHOLE, (0, 500), _FILL),
    Inert("background_fetch.max_queue_size", WHOLE, (0, 300), _FILL),
    Inert("background_fetch.drop_policy", TEXT, ("", "newest"), _FILL),
    Inert("background_fetch.emit_metric_period_sec", WHOLE, (0, 10), _METRICS),
    Inert("prefetch.enable", FLAG, (False,), "prefetch lists are made, but not used at a launch"),
    Inert("prefetch.max_concurrency", WHOLE, (0,), "prefetch lists are made, but not used at a launch"),
    Inert("snapshotter.allow_invalid_mounts_on_restart", FLAG, (False, True),
          "a start waits for no layer: each is shown again at once, or when a call needs it"),
    Inert("resolver.enable_auth_client_sharing", FLAG, (False, True), "logins and tokens are always shared by host"),
    Inert(f"{_DECOMPRESS}.gzip.path", TEXT, ("",), _DECOMPRESSOR),
    Inert(f"{_DECOMPRESS}.gzip.args", WORDS, ((),), _DECOMPRESSOR),
    Inert(f"{_DECOMPRESS}.zstd.path", TEXT, ("",), _DECOMPRESSOR),
    Inert(f"{_DECOMPRESS}.zstd.args", WORDS, ((),), _DECOMPRESSOR),
)
# fmt: on

INERT_BY_KEY: Final = {one.key: one for one in INERT}
