# SPDX-License-Identifier: Apache-2.0
"""A thin asynchronous client of containerd: its services as values, its errors as ours.

It speaks to containerd 1.6 and later over the unix socket, and knows nothing of Sociable's own services.
"""

from __future__ import annotations

from soci_containerd.client import Client, connect
from soci_containerd.values import Container, ContentInfo, Image, Mount, Snapshot, TaskState

__all__ = ["Client", "Container", "ContentInfo", "Image", "Mount", "Snapshot", "TaskState", "connect"]
