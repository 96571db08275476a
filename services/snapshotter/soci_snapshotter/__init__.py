# SPDX-License-Identifier: Apache-2.0
"""The snapshotter: containerd's door. Snapshots v1 over a unix socket, its truth an event log in SQLite."""
