# SPDX-License-Identifier: Apache-2.0
"""References to bytes: manifests, referrers, blobs and their ranges, pushes; with tokens, mirrors and retries."""

from __future__ import annotations

from soci_registry.asked import AskedLogin
from soci_registry.client import Registry, Repository
from soci_registry.credentials import Credentials, DockerConfig, FirstOf, FixedLogin, Login, NoCredentials
from soci_registry.fetch import Fetched, PushedManifest, Resolved
from soci_registry.hosts import HostBook, Mirror
from soci_registry.kube_secrets import KubeSecrets
from soci_registry.kubelet import KubeletProviders
from soci_registry.settings import MANIFEST_BYTES_MAX, RegistrySettings, Retry

__all__ = [
    "MANIFEST_BYTES_MAX",
    "AskedLogin",
    "Credentials",
    "DockerConfig",
    "Fetched",
    "FirstOf",
    "FixedLogin",
    "HostBook",
    "KubeSecrets",
    "KubeletProviders",
    "Login",
    "Mirror",
    "NoCredentials",
    "PushedManifest",
    "Registry",
    "RegistrySettings",
    "Repository",
    "Resolved",
    "Retry",
]
