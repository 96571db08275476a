# SPDX-License-Identifier: Apache-2.0
"""Every setting once: where it is set, in which unit, within which limits, and what it means.

The parser, ``config default``, ``config dump`` and the table in docs/configuration.md are all made from this. Keys
are spelled as the reference spells them, and matched without regard to case.
"""

from __future__ import annotations

from typing import Final

from soci_runtime.kinds import (
    ADDRESS,
    ATTEMPTS,
    BYTES,
    COUNT,
    FLAG,
    LEVEL,
    LONGEST_SECONDS,
    MILLISECONDS,
    MIRRORS,
    NODE,
    PATH,
    RETRIES,
    SECONDS,
    SECONDS_OR_NEVER,
    SIZE,
    SOCKET,
    TEXT,
    WORDS,
)
from soci_runtime.setting import Setting

MOST_SPAN_ATTEMPTS: Final = 100
MOST_RETRIES: Final = 1000
MOST_AT_A_TIME: Final = 1 << 16
"""The largest of the limits on how many."""
MOST_REQUESTS: Final = 512
"""The largest limit on requests to a host: each of them is a byte that is locked."""
MOST_BYTES: Final = 1 << 62

_SOME: Final = (0.1, LONGEST_SECONDS)
_WAIT: Final = (0.001, LONGEST_SECONDS)
_COUNT: Final = (-1, MOST_AT_A_TIME)
_RETRIES: Final = (0, MOST_RETRIES)
_PARALLEL: Final = "pull_modes.parallel_pull_unpack"

# A table reads best as one: a setting a paragraph, not an argument a line.
# fmt: off
SETTINGS: Final[tuple[Setting, ...]] = (
    Setting("root", "sociable.root", PATH,
            "folder of all state, the same for all services of a node: snapshots, span cache, mounts",
            flag="--root", environment="SOCI_SNAPSHOTTER_ROOT", reference="--root"),
    Setting("address", "sociable.address", ADDRESS,
            "socket on which containerd finds the snapshotter; `fd://`: the one that systemd passes",
            flag="--address", environment="SOCI_SNAPSHOTTER_ADDRESS", reference="--address"),
    Setting("log_level", "sociable.log_level", LEVEL, "lines below it are not written",
            flag="--log-level", environment="SOCI_SNAPSHOTTER_LOG_LEVEL", reference="--log-level"),
    Setting("nats_url", "sociable.nats_url", TEXT, "the bus", flag="--nats-url", environment="NATS_URL"),
    Setting("node", "sociable.node", NODE,
            "this node's name on the bus: all services of a node need the same; empty: the host's name",
            flag="--node", environment="SOCIABLE_NODE"),

    # what the snapshotter decides
    Setting("mount_timeout", "mount_timeout_sec", SECONDS, "in so long a layer is shown, or comes whole",
            _SOME, zero=True),
    Setting("min_layer_size", "snapshotter.min_layer_size", BYTES, "smaller layers come whole; 0: none does",
            (0, MOST_BYTES)),
    Setting("soci_v1", "pull_modes.soci_v1.enable", FLAG, "look for indexes by referrers"),
    Setting("soci_v2", "pull_modes.soci_v2.enable", FLAG, "look for indexes bound in the image manifest"),
    Setting("no_regret", "sociable.no_regret", FLAG, "bring a layer whole where that is expected to be quicker"),
    Setting("whole_fallback", "sociable.whole_fallback", TEXT,
            "whether we bring layers that have no index, rather than containerd",
            choices=("auto", "always", "never")),
    Setting("content_store", "content_store.type", TEXT,
            "where blobs of layers that we bring whole are kept, so that the image can be pushed; `soci`: nowhere",
            choices=("soci", "containerd"), zero=True),
    Setting("containerd_address", "content_store.containerd_address", SOCKET,
            "the socket of that containerd", zero=True),

    Setting("mount_mode", "sociable.mount_mode", TEXT,
            "how lazy layers are shown: by FUSE alone, by the kernel's EROFS, or by it where it can and survives us",
            choices=("auto", "fuse", "erofs")),

    # whole layers
    Setting("parallel_pull", f"{_PARALLEL}.enable", FLAG, "bring all layers whole, several at a time"),
    Setting("parallel_pull_fallback", f"{_PARALLEL}.experimental_parallel_pull_as_fallback", FLAG,
            "do so with images that have no index"),
    Setting("max_downloads", f"{_PARALLEL}.max_concurrent_downloads", COUNT,
            "requests at a time of all whole layers; negative: unlimited", _COUNT, zero=True),
    Setting("max_downloads_per_image", f"{_PARALLEL}.max_concurrent_downloads_per_image", COUNT,
            "and of one image's", _COUNT, zero=True),
    Setting("max_unpacks", f"{_PARALLEL}.max_concurrent_unpacks", COUNT,
            "layers unpacked at a time; negative: one a core, at most 8", _COUNT, zero=True),
    Setting("max_unpacks_per_image", f"{_PARALLEL}.max_concurrent_unpacks_per_image", COUNT,
            "and of one image's; negative: as many as in all", _COUNT, zero=True),
    Setting("download_chunk", f"{_PARALLEL}.concurrent_download_chunk_size", SIZE,
            "bytes of a request for a part of a whole layer, as in `16mb`; 0: as the fetcher chooses",
            (0, MOST_BYTES)),
    Setting("discard_unpacked_layers", f"{_PARALLEL}.discard_unpacked_layers", FLAG,
            "keep no blob of a layer that was unpacked, whatever `[content_store] type` is"),

    # reads
    Setting("read_deadline", "sociable.read_deadline_sec", SECONDS,
            "a read whose bytes cannot be had by then fails with EIO", _SOME),
    Setting("disable_verification", "disable_verification", FLAG,
            "leave out the check of a file's tar header against the table of contents"),
    Setting("span_attempts", "blob.max_span_verification_retries", ATTEMPTS,
            "more tries for a span that does not match its digest; negative: 3", (1, MOST_SPAN_ATTEMPTS)),
    Setting("max_concurrency", "max_concurrency", COUNT,
            "tables of contents brought before their layers are asked for, at a time; never more than 8", _COUNT,
            zero=True),

    Setting("background_fetch_disable", "background_fetch.disable", FLAG,
            "do not fill layers in use in the background"),
    Setting("silence_period", "background_fetch.silence_period_msec", MILLISECONDS,
            "filling begins once no read has waited for so long", _WAIT, zero=True),

    Setting("cache_budget", "sociable.cache_budget", SIZE,
            "bytes that the span cache may take, as in `20gb`; 0: what leaves a fifth of its disk free",
            (0, MOST_BYTES)),

    # registries
    Setting("plain_http", "sociable.plain_http", WORDS, "registry hosts spoken to without TLS, beside loopback"),
    Setting("registry_concurrency", "sociable.registry_concurrency", COUNT,
            "requests to one registry host at a time, of all fetchers of the node together; a quarter is kept for "
            "bytes that somebody waits for", (1, MOST_REQUESTS)),
    Setting("index_failure_ttl", "sociable.index_failure_ttl_sec", SECONDS,
            "so long a failed look-up of an index is not repeated", (0, LONGEST_SECONDS)),
    Setting("dial_timeout", "http.DialTimeoutMsec", MILLISECONDS, "to connect to a registry", _WAIT, zero=True),
    Setting("response_timeout", "http.ResponseHeaderTimeoutMsec", MILLISECONDS,
            "until an answer begins", _WAIT, zero=True),
    Setting("request_timeout", "http.RequestTimeoutMsec", MILLISECONDS,
            "one try of a request, its body included", _WAIT, zero=True),
    Setting("max_retries", "http.MaxRetries", RETRIES, "more tries of a request; negative: none", _RETRIES, zero=True),
    Setting("min_wait", "http.MinWaitMsec", MILLISECONDS,
            "before the second try; doubled for each further one", _WAIT, zero=True),
    Setting("max_wait", "http.MaxWaitMsec", MILLISECONDS, "the longest wait between tries", _WAIT, zero=True),
    Setting("fetching_timeout", "blob.fetching_timeout_sec", SECONDS, "one request for spans", _WAIT, zero=True),
    Setting("blob_max_retries", "blob.max_retries", RETRIES,
            "as `[http] MaxRetries`, for spans; not set: the same", _RETRIES, zero=True),
    Setting("blob_min_wait", "blob.min_wait_msec", MILLISECONDS,
            "as `[http] MinWaitMsec`, for spans; not set: the same", _WAIT, zero=True),
    Setting("blob_max_wait", "blob.max_wait_msec", MILLISECONDS,
            "as `[http] MaxWaitMsec`, for spans; not set: the same", _WAIT, zero=True),
    Setting("resolver_hosts", "resolver.host", MIRRORS,
            "mirrors of a registry host, tried in order before it; see registries.md"),
    Setting("hosts_dir", "sociable.hosts_dir", TEXT,
            "folders of `<host>/hosts.toml`, separated by `:`, as containerd's `config_path`; empty: none"),
    Setting("auth_client_ttl", "resolver.auth_client_ttl_sec", SECONDS_OR_NEVER,
            "so long a login is used before it is looked up again; negative: for ever",
            (0, float("inf")), zero=True),

    # credentials
    Setting("kube_keychain", "kubeconfig_keychain.enable_keychain", FLAG, "take logins from Kubernetes' secrets"),
    Setting("kubeconfig", "kubeconfig_keychain.kubeconfig_path", TEXT,
            "how to reach Kubernetes; empty: `KUBECONFIG`, or `~/.kube/config`"),
    Setting("cri_keychain", "cri_keychain.enable_keychain", FLAG,
            "take logins from the kubelet, which calls the snapshotter's socket for images"),
    Setting("cri_image_service", "cri_keychain.image_service_path", SOCKET,
            "socket to which those calls are passed on", zero=True),
    Setting("kubelet_credential_config", "sociable.kubelet_credential_config", TEXT,
            "file of kind CredentialProviderConfig: take logins from the kubelet's plugins; empty: do not"),
    Setting("kubelet_credential_bin_dir", "sociable.kubelet_credential_bin_dir", TEXT, "folder of these plugins"),

    # peers
    Setting("peer_listen", "sociable.peer_listen", TEXT,
            "where other nodes' fetchers get spans from this node's: `host:port`; further fetchers of the node take"
            " the next ports; empty: nowhere, and none are asked; see scale.md"),
    Setting("peer_url", "sociable.peer_url", TEXT,
            "the address that other nodes are told, as `http://10.0.0.7:4421`; empty: that of `peer_listen`",
            environment="SOCIABLE_PEER_URL"),
    Setting("peer_secret_file", "sociable.peer_secret_file", TEXT,
            "file of the secret that all nodes share, of at least 32 bytes, for its owner's eyes alone;"
            " needed where `peer_listen` is set"),
    Setting("peer_tls_cert", "sociable.peer_tls_cert", TEXT, "certificate (PEM) of `peer_listen`: TLS where it is set"),
    Setting("peer_tls_key", "sociable.peer_tls_key", TEXT, "its key"),
    Setting("peer_tls_ca", "sociable.peer_tls_ca", TEXT,
            "authority (PEM) of all peers' certificates, whom both sides must show one of; empty: the system's"),

    # the indexer's webhook
    Setting("webhook_address", "sociable.webhook_address", TEXT,
            "where registries tell the indexer of pushes: `host:port`, or a port on 127.0.0.1 alone; empty: nowhere"),
    Setting("webhook_token", "sociable.webhook_token", TEXT,
            "what a notification must carry; needed where `webhook_address` is reached from elsewhere", secret=True),
    Setting("webhook_registry", "sociable.webhook_registry", TEXT,
            "the name by which nodes pull from that registry; empty: the host that the push went to"),
    Setting("webhook_min_layer_size", "sociable.webhook_min_layer_size", BYTES,
            "layers below it get no zTOC", (0, MOST_BYTES)),
)
# fmt: on

BY_FIELD: Final = {one.field: one for one in SETTINGS}
BY_KEY: Final = {one.key.lower(): one for one in SETTINGS}
SAME_AS_HTTP: Final = {"blob_max_retries": "max_retries", "blob_min_wait": "min_wait", "blob_max_wait": "max_wait"}
"""Fields that, not set, have the value of another."""
