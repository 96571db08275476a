# SPDX-License-Identifier: Apache-2.0
"""The generated messages: the names and numbers that containerd and the kubelet know."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
SERVICES = {
    "containerd.services.snapshots.v1.snapshots": "containerd.services.snapshots.v1.Snapshots",
    "containerd.services.content.v1.content": "containerd.services.content.v1.Content",
    "containerd.services.images.v1.images": "containerd.services.images.v1.Images",
    "containerd.services.containers.v1.containers": "containerd.services.containers.v1.Containers",
    "containerd.services.tasks.v1.tasks": "containerd.services.tasks.v1.Tasks",
    "containerd.services.diff.v1.diff": "containerd.services.diff.v1.Diff",
    "containerd.services.leases.v1.leases": "containerd.services.leases.v1.Leases",
    "containerd.services.namespaces.v1.namespace": "containerd.services.namespaces.v1.Namespaces",
    "containerd.services.version.v1.version": "containerd.services.version.v1.Version",
    "containerd.services.events.v1.events": "containerd.services.events.v1.Events",
    "cri.runtime.v1.api": "runtime.v1.ImageService",
    "grpc.health.v1.health": "grpc.health.v1.Health",
}


def test_generated_code_is_current() -> None:
    """What is committed is what the .proto files give."""
    done = subprocess.run(
        [sys.executable, PROTO / "generate", "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("module", "service"), SERVICES.items())
def test_services_have_their_names_on_the_wire(module: str, service: str) -> None:
    """Our package is our own, and the service is still called what the other side calls."""
    generated = importlib.import_module(f"soci_proto.{module}_pb2")
    assert service in {s.full_name for s in generated.DESCRIPTOR.services_by_name.values()}


def test_commit_has_the_parent_of_newer_containerd() -> None:
    """A Commit with a parent (containerd 2.2 and later) is field 5, read as such from its bytes."""
    snapshots = importlib.import_module("soci_proto.containerd.services.snapshots.v1.snapshots_pb2")
    assert snapshots.CommitSnapshotRequest.FromString(b"\x2a\x01p").parent == "p"


def test_a_proxy_loses_no_field_of_a_newer_kubelet() -> None:
    """A field that our CRI messages do not name passes through unchanged."""
    api = importlib.import_module("soci_proto.cri.runtime.v1.api_pb2")
    newer = api.PullImageRequest(image=api.ImageSpec(image="a")).SerializeToString() + b"\xa2\x06\x01x"  # field 100
    assert api.PullImageRequest.FromString(newer).SerializeToString() == newer
