# SPDX-License-Identifier: Apache-2.0
"""The configuration as one frozen value, in base units: what every service reads, and nothing of how it came about.

Keys, limits and meanings stand in `soci_runtime.settings`; a field here without a setting there is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("/var/lib/soci-snapshotter-grpc")
DEFAULT_ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
DEFAULT_NATS = "nats://127.0.0.1:4222"
DEFAULT_CONTAINERD = "/run/containerd/containerd.sock"
UNLIMITED = -1
"""What a limit on how many says where there is none."""
ACTIVATED = "fd://"
"""The address of a snapshotter whose socket systemd holds (sd_listen_fds(3))."""


@dataclass(frozen=True, slots=True)
class MirrorSetting:
    """One mirror of a registry host, as the reference's ``[[resolver.host."…".mirrors]]`` names it."""

    host: str  # a URL, or a bare host[:port]
    insecure: bool = False  # without TLS
    request_timeout: float = 0.0  # seconds; 0: as all requests; inf: none


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting: times in seconds, sizes in bytes; a limit on how many is `UNLIMITED` where there is none."""

    root: Path = DEFAULT_ROOT
    address: str = DEFAULT_ADDRESS  # a path, or `ACTIVATED`
    nats_url: str = DEFAULT_NATS
    node: str = ""  # loaded: never empty
    log_level: str = "info"
    containerd_address: str = DEFAULT_CONTAINERD

    # what the snapshotter decides
    mount_timeout: float = 30.0
    min_layer_size: int = 0
    soci_v1: bool = True
    soci_v2: bool = True
    no_regret: bool = True
    whole_fallback: str = "auto"  # or "always", "never"
    mount_mode: str = "auto"  # or "fuse", "erofs"
    content_store: str = "soci"  # or "containerd"

    # whole layers
    parallel_pull: bool = False
    parallel_pull_fallback: bool = False
    max_downloads: int = UNLIMITED
    max_downloads_per_image: int = 3
    max_unpacks: int = UNLIMITED
    max_unpacks_per_image: int = UNLIMITED
    download_chunk: int = 0  # bytes; 0: the fetcher's own size
    discard_unpacked_layers: bool = False

    # reads
    read_deadline: float = 60.0
    disable_verification: bool = False
    span_attempts: int = 3
    max_concurrency: int = 100

    background_fetch_disable: bool = False
    silence_period: float = 30.0

    cache_budget: int = 0  # bytes; 0: automatic, see `soci_cache.survey`

    # registries
    plain_http: tuple[str, ...] = ()
    registry_concurrency: int = 16
    index_failure_ttl: float = 30.0
    dial_timeout: float = 3.0
    response_timeout: float = 3.0
    request_timeout: float = 300.0
    max_retries: int = 8
    min_wait: float = 0.03
    max_wait: float = 300.0
    fetching_timeout: float = 300.0
    blob_max_retries: int = 8
    blob_min_wait: float = 0.03
    blob_max_wait: float = 300.0
    resolver_hosts: tuple[tuple[str, tuple[MirrorSetting, ...]], ...] = ()  # host in lower case → mirrors in order
    hosts_dir: str = ""
    auth_client_ttl: float = 3600.0  # inf: for ever

    # credentials
    kube_keychain: bool = False
    kubeconfig: str = ""
    cri_keychain: bool = False
    cri_image_service: str = DEFAULT_CONTAINERD
    kubelet_credential_config: str = ""
    kubelet_credential_bin_dir: str = ""

    # peers
    peer_listen: str = ""
    peer_url: str = ""
    peer_secret_file: str = ""
    peer_tls_cert: str = ""
    peer_tls_key: str = ""
    peer_tls_ca: str = ""

    # the indexer's webhook
    webhook_address: str = ""
    webhook_token: str = dataclasses.field(default="", repr=False)
    webhook_registry: str = ""
    webhook_min_layer_size: int = 10 << 20

    @property
    def cache(self) -> Path:
        """The span cache."""
        return self.root / "cache"

    @property
    def mounts(self) -> Path:
        """Where the mounter shows layers."""
        return self.root / "mounts"
