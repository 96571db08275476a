# SPDX-License-Identifier: Apache-2.0
"""An image that carries its own SOCI index, from `soci convert` to a container: it needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from soci_dev import image
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from support import lazy
from support.layouts import OCI_INDEX, Layout, unpack

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

SMALL = ("--min-layer-size", "0", "--span-size", str(1 << 18))


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.registry) as running:
        yield running


def check_lazy(stack: Stack, proxy: Proxy, reference: str, built: image.Image) -> None:
    """The image is pulled and run; all of its layers are lazy, by the index in its own manifest."""
    proxy.reset()
    assert lazy.good(lazy.soci(stack, "run", "--plain-http", reference)).startswith("hello\n")
    assert proxy.counts.body_bytes < built.size / 2
    (launched,) = lazy.launches(stack, reference)
    assert lazy.modes(launched) == ["lazy"] * len(built.layers)
    assert lazy.launch(stack, launched["id"])["found_by"] == "v2-annotation"


def test_a_converted_image_runs_lazily(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Converted in containerd, pushed with an ordinary client and pulled through another door, it is all lazy."""
    built = lazy.seeded_image(tmp_path / "image")
    source = image.push(built, stack.registry, "carries", "plain")
    converted = f"{stack.registry}/carries:soci"
    stack.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", source)
    lazy.good(lazy.soci(stack, "--root", str(tmp_path / "root"), "convert", *SMALL, source, converted))
    # One at a time: containerd 1.6 sends a blob of two manifests twice at once, and one of the two may break off.
    stack.ctr("images", "push", "--max-concurrent-uploaded-layers", "1", "--plain-http", converted)
    stack.ctr("images", "rm", "--sync", source, converted)
    check_lazy(stack, proxy, f"{proxy.address}/carries:soci", built)


def test_an_image_converted_in_files_runs_lazily(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """From a directory to a tar without containerd, then into the registry blob by blob: it is all lazy."""
    built = lazy.seeded_image(tmp_path / "image")
    done = lazy.soci(stack, "convert", "--standalone", *SMALL, str(built.folder), str(tmp_path / "out.tar"))
    lazy.good(done)
    layout = unpack(tmp_path / "out.tar", tmp_path / "out")
    put_layout(stack.registry, "in-files", layout)
    check_lazy(stack, proxy, f"{proxy.address}/in-files:1", built)


def put_layout(registry: str, repository: str, layout: Layout) -> None:
    """Push a layout as the tools do: blobs, then manifests, then the image index under tag 1."""
    base = f"http://{registry}/v2/{repository}"
    top = layout.top()["digest"]
    entries = layout.json(top)["manifests"]
    with httpx.Client(trust_env=False) as client:
        for entry in entries:
            manifest = layout.json(entry["digest"])
            for part in (manifest["config"], *manifest["layers"]):
                begun = client.post(f"{base}/blobs/uploads/")
                target = begun.request.url.join(begun.headers["Location"]).copy_merge_params({"digest": part["digest"]})
                client.put(target, content=layout.read(part["digest"])).raise_for_status()
            typed = {"Content-Type": entry["mediaType"]}
            url = f"{base}/manifests/{entry['digest']}"
            client.put(url, content=layout.read(entry["digest"]), headers=typed).raise_for_status()
        typed = {"Content-Type": OCI_INDEX}
        client.put(f"{base}/manifests/1", content=layout.read(top), headers=typed).raise_for_status()


def test_without_its_index_the_image_still_runs(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Where somebody deleted the SOCI index from the registry, the layers come whole, and nothing is mixed up."""
    built = lazy.seeded_image(tmp_path / "image")
    out = tmp_path / "out"
    words = ("convert", "--standalone", "--format", "oci-dir", *SMALL, str(built.folder), str(out))
    lazy.good(lazy.soci(stack, *words))
    layout = Layout(out)
    put_layout(stack.registry, "dangling", layout)
    index = layout.json(layout.top()["digest"])["manifests"][1]
    base = f"http://{stack.registry}/v2/dangling/manifests"
    httpx.delete(f"{base}/{index['digest']}", trust_env=False).raise_for_status()
    reference = f"{proxy.address}/dangling:1"
    assert lazy.good(lazy.soci(stack, "run", "--plain-http", reference)).startswith("hello\n")
    (launched,) = lazy.launches(stack, reference)
    assert "lazy" not in lazy.modes(launched)
    assert json.loads(httpx.get(f"{base}/1", headers={"Accept": OCI_INDEX}, trust_env=False).content)["manifests"]
