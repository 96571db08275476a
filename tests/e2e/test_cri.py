# SPDX-License-Identifier: Apache-2.0
"""The kubelet's way: PullImage over CRI, with containerd's own CRI plugin sending the labels."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from soci_containerd import connect
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_proto.cri.runtime.v1 import api_pb2 as cri
from soci_proto.cri.runtime.v1 import api_pb2_grpc as cri_rpc
from support import lazy

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

PULL_SECONDS = 60.0
NAMESPACE = "k8s.io"


async def test_cri_pulls_lazily(stack: Stack, tmp_path: Path) -> None:
    """PullImage with ``disable_snapshot_annotations = false`` is answered with every layer shown lazily, and most
    of the image has not moved; the kubelet can then see and remove the image."""
    with Proxy(stack.registry) as proxy:
        built = lazy.seeded_image(tmp_path)
        reference = lazy.push(built, proxy, "cri")
        lazy.build_index(stack, reference)
        proxy.reset()
        async with grpc.aio.insecure_channel(f"unix:{stack.containerd_address}") as channel:
            images = cri_rpc.ImageServiceStub(channel)
            spec = cri.ImageSpec(image=reference)
            await images.PullImage(cri.PullImageRequest(image=spec), timeout=PULL_SECONDS)
            assert proxy.counts.body_bytes < built.size / 2
            (launched,) = lazy.launches(stack, reference)
            assert lazy.modes(launched) == ["lazy", "lazy"]
            assert launched["namespace"] == NAMESPACE

            async with connect(str(stack.containerd_address), NAMESPACE) as client:
                top = await client.snapshots("sociable").stat(lazy.top_chain(built))
            assert top.labels["containerd.io/snapshot/remote"] == "remote snapshot"

            status = await images.ImageStatus(cri.ImageStatusRequest(image=spec), timeout=PULL_SECONDS)
            assert status.image.id
            await images.RemoveImage(cri.RemoveImageRequest(image=spec), timeout=PULL_SECONDS)
