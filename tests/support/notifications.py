# SPDX-License-Identifier: Apache-2.0
"""Notifications as a registry of CNCF distribution writes them."""

from __future__ import annotations

import json
from typing import Any

from soci.oci import OCI_MANIFEST

DIGEST = "sha256:" + "a" * 64


def event(action: str = "push", host: str = "registry.example:5000", **target: Any) -> dict[str, Any]:
    """An event as distribution writes it, of which some members of the target may be others."""
    about = {
        "mediaType": OCI_MANIFEST,
        "size": 100,
        "digest": DIGEST,
        "length": 100,
        "repository": "team/app",
        "url": f"http://registry.example:5000/v2/team/app/manifests/{DIGEST}",
        "tag": "v1",
    }
    return {
        "id": "1f6c",
        "timestamp": "2026-01-01T00:00:00Z",
        "action": action,
        "target": {name: value for name, value in (about | target).items() if value is not None},
        "request": {"id": "2", "addr": "192.0.2.1:1", "host": host, "method": "PUT", "useragent": "x"},
        "actor": {},
        "source": {"addr": "registry:5000", "instanceID": "3"},
    }


def body(*events: Any) -> bytes:
    return json.dumps({"events": events}).encode()
