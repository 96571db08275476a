# SPDX-License-Identifier: Apache-2.0
"""The span cache in a whole stack: kept over restarts, proven, freed with the image; and what `soci cache` says."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soci.digest import Digest, hex_of, sha256_digest
from soci.index import SOCI_INDEX_V1, SociIndex, encode_index, ztoc_entry
from soci.oci import OCI_MANIFEST, Descriptor, Manifest, parse_manifest
from soci.span import Spans
from soci.toc import Ztoc
from soci.ztoc import encode_ztoc
from soci_dev import image
from soci_dev.proxy import Proxy
from soci_dev.stack import Stack
from soci_dev.tarball import member
from soci_registry import NoCredentials, Registry, RegistrySettings
from soci_registry.content import RegistryContent
from support import indexed, lazy
from support.images import _busybox, noise

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

LIMIT = 30.0
ALL = "for i in 0 1 2 3 4 5 6 7; do /bin/busybox sha256sum /data/$i; done"


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.registry) as running:
        yield running


def soci_cache(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``soci cache`` whatever its exit status."""
    return lazy.soci(stack, "--root", str(stack.root), "cache", *words)


def cached(stack: Stack, built: image.Image) -> dict[str, dict[str, Any]]:
    """What `soci cache ls` says of the image's layers, by their digests."""
    found = json.loads(lazy.good(soci_cache(stack, "ls", "--json")))
    wanted = {layer["digest"] for layer in built.layers}
    return {one["layer"]: one for one in found if one["layer"] in wanted}


def folders(stack: Stack, built: image.Image) -> list[Path]:
    """The layers' folders that are there."""
    places = (stack.root / "cache/layers" / hex_of(layer["digest"]) for layer in built.layers)
    return [one for place in places if place.exists() for one in place.iterdir()]


def sharing(folder: Path, own: bytes) -> image.Image:
    """Two layers, of which the first is the same whatever ``own`` is."""
    base = image.add_layer(folder, iter([member("shared", content=b"by two images"), *_busybox()]))
    return image.write_image(
        folder, [base, image.add_layer(folder, iter([member("own", content=own)]))], cmd=["/bin/sh", "/hello"]
    )


def age(stack: Stack, built: image.Image) -> None:
    """As if the layers had been opened last a while ago: the grace need not be waited for."""
    for place in folders(stack, built):
        os.utime(place, (1, 1))


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < ends, "it did not come to be so"
        time.sleep(0.05)


def test_a_layer_goes_with_its_last_image(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Two images share their base: once the one is removed its own layer is gone and the base is there; after the
    other there is nothing. Nobody but containerd was told."""
    first, second = sharing(tmp_path / "1", b"1"), sharing(tmp_path / "2", b"2")
    assert first.layers[0] == second.layers[0]
    assert first.layers[1] != second.layers[1]
    references = [lazy.push(first, proxy, "shares-1"), lazy.push(second, proxy, "shares-2")]
    for reference in references:
        lazy.build_index(stack, reference)
        lazy.good(lazy.soci(stack, "run", "--plain-http", reference))
    base, data = (layer["digest"] for layer in first.layers)
    assert set(cached(stack, first)) == {base, data}
    assert all(one["in_use"] for one in cached(stack, first).values())

    age(stack, first)
    stack.ctr("images", "rm", "--sync", references[0])
    until(lambda: set(cached(stack, first)) == {base})
    assert cached(stack, second)[base]["in_use"]
    assert lazy.good(lazy.soci(stack, "run", "--plain-http", references[1])).startswith("hello\n")

    age(stack, second)
    stack.ctr("images", "rm", "--sync", references[1])
    until(lambda: not folders(stack, second))


def test_nothing_is_fetched_twice_across_restarts(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Fetchers, mounter and snapshotter are killed and started anew; what was read once needs no registry again."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "restarts")
    lazy.build_index(stack, reference)
    words = ("run", "--plain-http", reference, "/bin/sh", "-c", ALL)
    first = lazy.good(lazy.soci(stack, *words))
    proxy.reset()
    for name in stack.daemons:
        if name.startswith(("fetcher", "mounter", "snapshotter")):
            stack.kill(name)
            stack.start(name)
    until(lambda: stack.ctr("snapshots", "--snapshotter", "sociable", "ls", check=False).returncode == 0)
    assert lazy.good(lazy.soci(stack, *words)) == first
    assert proxy.counts.get == 0
    assert all(one["here"] for one in cached(stack, built).values())
    assert len(cached(stack, built)) == 2


def test_a_layer_that_was_read_whole_is_proven(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """All spans came by reads; the layer then is complete, by the diff_id of its image's configuration."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "proven")
    lazy.build_index(stack, reference)
    data = built.layers[1]["digest"]
    lazy.good(lazy.soci(stack, "run", "--plain-http", reference, "/bin/sh", "-c", ALL))
    until(lambda: cached(stack, built)[data]["here"] == cached(stack, built)[data]["spans"])
    until(lambda: cached(stack, built)[data]["state"] == "complete")


def other_windows(ztoc: Ztoc) -> Ztoc:
    """A zTOC whose last checkpoint inflates to other bytes: what it looks back at is in upper case."""
    spans = Spans.of(ztoc)
    assert spans.checkpoints is not None
    window = bytes(spans.checkpoints.window(spans.count - 1) or b"")
    assert len(window) == 32768
    return replace(ztoc, checkpoints=ztoc.checkpoints.replace(window, window.upper()))


async def push_forged(reference: str, built: image.Image) -> None:
    """Push an index whose digests are all right, and whose second zTOC is forged."""
    raw = (built.folder / "blobs/sha256" / hex_of(Digest(built.digest))).read_bytes()
    manifest = parse_manifest(raw)
    assert isinstance(manifest, Manifest)
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as registry:
        repository = registry.repository(reference)
        entries = []
        for number, layer in enumerate(manifest.layers):
            ztoc = indexed.zip_ztoc(built, number)
            content = encode_ztoc(other_windows(ztoc) if number else ztoc)
            await repository.push_blob(content)
            entries.append(ztoc_entry(layer, sha256_digest(content), len(content), indexed.SPAN_SIZE))
        index = encode_index(SociIndex.v1(tuple(entries), Descriptor(OCI_MANIFEST, Digest(built.digest), len(raw))))
        await repository.push_blob(b"{}")
        descriptor = Descriptor(OCI_MANIFEST, sha256_digest(index), len(index), artifact_type=SOCI_INDEX_V1)
        await RegistryContent(repository).push(descriptor, index)


def test_a_forged_index_is_found_out(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """Every digest in it is right, and yet a file would be another: once the layer is here, its diff_id tells. From
    then on reads fail, and an event says why."""
    words = [noise(seed, 5).hex().encode() for seed in range(200)]
    text = b" ".join(words[at % 199 * at % 200] for at in range(60_000))
    base = image.add_layer(tmp_path, _busybox())
    built = image.write_image(tmp_path, [base, image.add_layer(tmp_path, iter([member("text", content=text)]))])
    reference = lazy.push(built, proxy, "forged")
    asyncio.run(push_forged(reference, built))
    before = set((stack.root / "mounts").iterdir())
    run = ("run", "--plain-http", reference, "/bin/busybox", "sha256sum", "/text")
    lazy.soci(stack, *run)
    data = built.layers[1]["digest"]
    until(lambda: cached(stack, built)[data]["state"] == "rejected")
    (shown,) = (one / "text" for one in set((stack.root / "mounts").iterdir()) - before if (one / "text").exists())
    with shown.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError) as caught:
            file.read()
    assert caught.value.errno == errno.EIO
    assert lazy.soci(stack, *run).returncode != 0
    log = "".join(path.read_text() for path in stack.logs.glob("fetcher*"))
    assert "not what its image promises" in log


def test_the_command(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    """`ls`, `info`, `verify` and `gc` tell the same story; damage is found, named and mended by the next read."""
    built = lazy.seeded_image(tmp_path)
    reference = lazy.push(built, proxy, "told")
    lazy.build_index(stack, reference)
    words = ("run", "--plain-http", reference, "/bin/busybox", "sha256sum", "/data/3")
    first = lazy.good(lazy.soci(stack, *words))
    data = built.layers[1]["digest"]
    lines = lazy.good(soci_cache(stack, "ls")).splitlines()
    assert lines[0].split() == ["LAYER", "ZTOC", "SIZE", "SPANS", "STATE", "IN", "USE", "LAST", "USE"]
    assert any(line.startswith(data[:19]) for line in lines)
    assert data in lazy.good(soci_cache(stack, "ls", "-q")).split()
    info = json.loads(lazy.good(soci_cache(stack, "info", "--json")))
    assert info["layers"] == len(lines) - 1
    assert info["in_use"] >= 2
    assert info["budget"] > info["used"] > 0
    sound = soci_cache(stack, "verify", data)
    assert sound.returncode == 0, sound.stderr
    place = next(one for one in folders(stack, built) if one.parent.name == hex_of(data))
    tar = bytearray((place / "layer.tar").read_bytes())
    at = next(at for at in range(len(tar) // 2, len(tar)) if tar[at])
    with (place / "layer.tar").open("r+b") as file:
        file.seek(at)
        file.write(bytes([tar[at] ^ 255]))
    damaged = soci_cache(stack, "verify")
    assert damaged.returncode == 1
    assert damaged.stdout.count("damaged spans") == 1
    assert data in damaged.stdout
    assert soci_cache(stack, "verify", data).returncode == 0
    assert lazy.good(lazy.soci(stack, *words)) == first

    unknown = soci_cache(stack, "verify", "sha256:" + "0" * 64)
    assert unknown.returncode == 1
    assert "soci cache ls" in unknown.stderr
    kept = soci_cache(stack, "gc")
    assert kept.returncode == 0, kept.stderr
    assert data not in kept.stdout
