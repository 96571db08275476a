# SPDX-License-Identifier: Apache-2.0
"""References to bytes: manifests, referrers, blobs and their ranges, pushes; with tokens, redirects and retries."""

from __future__ import annotations

from soci_registry.client import Registry, Repository
from soci_registry.credentials import Credentials, DockerConfig, FirstOf, FixedLogin, Login, NoCredentials
from soci_registry.fetch import Fetched, PushedManifest, Resolved
from soci_registry.settings import MANIFEST_BYTES_MAX, RegistrySettings, Retry

__all__ = [
    "MANIFEST_BYTES_MAX",
    "Credentials",
    "DockerConfig",
    "Fetched",
    "FirstOf",
    "FixedLogin",
    "Login",
    "NoCredentials",
    "PushedManifest",
    "Registry",
    "RegistrySettings",
    "Repository",
    "Resolved",
    "Retry",
]
