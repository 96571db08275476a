# SPDX-License-Identifier: Apache-2.0
"""The indexer: from a real registry and back to it, by itself and as a service that takes jobs from NATS."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from soci.digest import Digest, hex_of, sha256_digest
from soci.errors import InvalidGzip, InvalidInput, LimitExceeded, Mismatch, NotFound, NoZtoc, SociError
from soci.index import (
    INDEX_DIGEST_ANNOTATION,
    SOCI_INDEX_V1,
    SOCIABLE_ZTOC_MEDIA_TYPE,
    ZTOC_MEDIA_TYPE,
    SociIndex,
    encode_index,
    ztoc_entry,
)
from soci.oci import OCI_MANIFEST, Descriptor, Manifest, parse_manifest
from soci_bus.asks import BuildIndex, FetchSpans, FindIndex, PrepareLayer
from soci_bus.events import Event, IndexBegun, IndexFailed, IndexMade, LayerIndexed
from soci_bus.nats import NatsBus, connect
from soci_dev import image
from soci_dev.faults import Status, always
from soci_dev.processes import free_port
from soci_dev.proxy import Proxy
from soci_dev.tarball import member
from soci_fetcher.discovery import find_index
from soci_indexer import __main__ as service
from soci_indexer.build import IndexBuilder
from soci_indexer.notifications import CONTENT_TYPE
from soci_indexing.pool import BuildPool
from soci_registry import NoCredentials, Registry
from soci_runtime.config import Config
from soci_runtime.serve import Process
from support import indexed, vectors
from support.bus import LIMIT
from support.fetching import CONTEXT, GZIP, PATIENCE, fetching, small_image
from support.images import noise

SPAN = 1 << 16
PLATFORM = f"linux/{image.architecture()}"


@asynccontextmanager
async def building() -> AsyncIterator[tuple[Registry, IndexBuilder, list[Event]]]:
    """A builder, its registry client, and what it tells."""
    told: list[Event] = []
    async with Registry(settings=PATIENCE, credentials=NoCredentials()) as registry, BuildPool(2) as pool:
        yield registry, IndexBuilder(registry, pool, told.append), told


def pushed(built: image.Image, host: str) -> str:
    name = "i/" + secrets.token_hex(6)
    return image.push(built, host, name, "1")


def job(reference: str, **changes: Any) -> BuildIndex:
    return replace(BuildIndex(reference, PLATFORM, SPAN, 0), **changes)


async def test_what_was_built_is_found_and_serves(tmp_path: Path, registry: str) -> None:
    """Discovery finds the index, the cache takes its zTOCs, and spans of each layer can be fetched with them."""
    built = small_image(tmp_path / "image")
    reference = pushed(built, registry)
    async with building() as (client, builder, told):
        answer = await builder.build(job(reference), "j1")
        ask = FindIndex(reference, Digest(built.digest))
        found = await find_index(client.repository(reference), ask, v1=True, v2=True)
    assert (found.index, found.found_by, found.layers) == (answer.index, "v1-referrer", answer.indexed)
    assert (answer.manifest, answer.discovery, answer.skipped) == (built.digest, "tag", ())
    layers = built.manifest["layers"]
    assert [one.layer for one in found.layers] == [layer["digest"] for layer in layers]
    assert [(type(event), event.layer, event.ztoc) for event in told if isinstance(event, LayerIndexed)] == [
        (LayerIndexed, one.layer, one.ztoc) for one in found.layers
    ]
    async with fetching(tmp_path / "cache") as one:
        for layer, entry in zip(layers, found.layers, strict=True):
            prepare = PrepareLayer(reference, entry.layer, layer["size"], entry.ztoc, entry.ztoc_size)
            prepared = await one.layers.prepare(prepare, CONTEXT)
            assert prepared.spans >= 4
            await one.spans.fetch(FetchSpans(reference, entry.layer, entry.ztoc, 0, prepared.spans - 1), CONTEXT)
            with one.store.read(entry.layer, entry.ztoc) as reader:
                assert reader.present_count() == reader.spans.count
                assert reader.pread(4, 257 + 1)[:4] == b"star"  # "ustar", in the first header


async def test_two_builds_are_one_index(tmp_path: Path, registry: str) -> None:
    """Digests depend on the image alone, and the second is listed once."""
    reference = pushed(small_image(tmp_path / "image"), registry)
    async with building() as (client, builder, _):
        first = await builder.build(job(reference), "j1")
        second = await builder.build(job(reference), "j2")
        assert first == second
        listed = await client.repository(reference).referrers(
            first.manifest, "application/vnd.amazon.soci.index.v1+json"
        )
        assert [descriptor.digest for descriptor in listed] == [first.index]


async def test_a_plain_tar_is_indexed(tmp_path: Path, registry: str) -> None:
    """A layer without compression gets a zTOC too."""
    reference = pushed(small_image(tmp_path / "image", gzip=False), registry)
    async with building() as (_, builder, _told):
        assert len((await builder.build(job(reference), "j1")).indexed) == 2


async def test_small_layers_are_skipped_and_named(tmp_path: Path, registry: str) -> None:
    """Layers below the minimum are told of with the reason; where none is left it is `NoZtoc`."""
    folder = tmp_path / "image"
    big = small_image(tmp_path / "other", layers=1)
    source = big.folder / "blobs" / "sha256" / big.manifest["layers"][0]["digest"].removeprefix("sha256:")
    small = image.add_layer(folder, [])
    (folder / "blobs" / "sha256" / source.name).write_bytes(source.read_bytes())
    config = json.loads(
        (big.folder / "blobs" / "sha256" / big.manifest["config"]["digest"].removeprefix("sha256:")).read_bytes()
    )
    layer = big.manifest["layers"][0]
    large = image.Layer(layer["digest"], layer["size"], config["rootfs"]["diff_ids"][0], layer["mediaType"], "")
    reference = pushed(image.write_image(folder, [small, large]), registry)
    async with building() as (_, builder, told):
        answer = await builder.build(job(reference, min_layer_size=10_000), "j1")
        assert [one.layer for one in answer.indexed] == [large.digest]
        ((skipped, why),) = answer.skipped
        assert (skipped, "under the minimum of 10000" in why) == (small.digest, True)
        assert [bool(event.skipped) for event in told if isinstance(event, LayerIndexed)] == [True, False]
        with pytest.raises(NoZtoc, match="under the minimum"):
            await builder.build(job(reference, min_layer_size=1 << 40), "j2")


async def _with_layer(folder: Path, host: str, content: bytes, media_type: str, size: int | None = None) -> str:
    """An image whose one layer is ``content``."""
    reference = f"{host}/i/{secrets.token_hex(6)}:1"
    built = small_image(folder, layers=1)
    async with Registry(settings=PATIENCE, credentials=NoCredentials()) as client:
        repository = client.repository(reference)
        await repository.push_blob(content)
        config = (built.folder / "blobs" / "sha256" / built.manifest["config"]["digest"][7:]).read_bytes()
        await repository.push_blob(config)
        layer = {"mediaType": media_type, "digest": sha256_digest(content), "size": size or len(content)}
        await repository.push_manifest(json.dumps({**built.manifest, "layers": [layer]}).encode(), OCI_MANIFEST, "1")
    return reference


async def test_a_layer_that_is_no_gzip(tmp_path: Path, registry: str) -> None:
    """The error names the layer; nothing is pushed for it."""
    content = b"not gzip" * 100
    reference = await _with_layer(tmp_path, registry, content, GZIP)
    async with building() as (_, builder, _told):
        with pytest.raises(InvalidGzip, match=f"layer {sha256_digest(content)}"):
            await builder.build(job(reference), "j1")


async def test_a_manifest_that_lies_about_a_size(tmp_path: Path, registry: str) -> None:
    """The layer's bytes decide."""
    built = small_image(tmp_path / "a", layers=1)
    blob = (built.folder / "blobs" / "sha256" / built.manifest["layers"][0]["digest"][7:]).read_bytes()
    reference = await _with_layer(tmp_path / "b", registry, blob, GZIP, size=len(blob) + 1)
    async with building() as (_, builder, _told):
        with pytest.raises(Mismatch):
            await builder.build(job(reference), "j1")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"span_size": -1}, InvalidInput),
        ({"span_size": 1 << 63}, InvalidInput),
        ({"image": "NOT a reference"}, InvalidInput),
        ({"image": "127.0.0.1:1/nowhere:1"}, SociError),
    ],
    ids=str,
)
async def test_jobs_that_cannot_be_done(
    tmp_path: Path, registry: str, changes: dict[str, Any], error: type[SociError]
) -> None:
    """Odd numbers and names from the bus are errors of ours."""
    reference = pushed(small_image(tmp_path / "image", layers=1), registry)
    async with building() as (_, builder, _told):
        with pytest.raises(error):
            await builder.build(job(reference, **changes), "j1")


async def test_a_span_size_that_makes_too_many_spans(tmp_path: Path, registry: str) -> None:
    """Memory is bounded, whatever the job says."""
    reference = pushed(small_image(tmp_path / "image", layers=1, gzip=False), registry)
    async with building() as (_, builder, _told):
        with pytest.raises(LimitExceeded):
            await builder.build(job(reference, span_size=1), "j1")


async def test_the_platform_of_an_image_index(tmp_path: Path, registry: str) -> None:
    """Of an image index the job's platform is indexed; one that it has not is `NotFound`."""
    built = small_image(tmp_path / "image", layers=1)
    reference = pushed(built, registry)
    size = len((built.folder / "blobs" / "sha256" / built.digest[7:]).read_bytes())
    manifests = [
        {
            "mediaType": OCI_MANIFEST,
            "digest": built.digest,
            "size": size,
            "platform": {"os": "linux", "architecture": "s390x"},
        }
    ]
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    async with building() as (client, builder, _):
        await client.repository(reference).push_manifest(json.dumps(index).encode(), str(index["mediaType"]), "many")
        many = reference.removesuffix(":1") + ":many"
        assert (await builder.build(job(many, platform="linux/s390x"), "j1")).manifest == built.digest
        with pytest.raises(NotFound):
            await builder.build(job(many, platform="linux/riscv64"), "j2")
        with pytest.raises(InvalidInput):
            await builder.build(job(many, platform="///"), "j3")


GOLDEN = ("gnu-types", "pax-types", "spans")


async def test_the_bytes_of_an_index(tmp_path: Path, registry: str) -> None:
    """zTOCs are those that the format's other builder made of the same layers, and the index's bytes follow from them:
    the same image has the same index, whoever makes it and on however many cores.
    """
    chosen = [one for name in GOLDEN for one in vectors.vectors(name=name, span_size=1 << 22)]
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers = []
    for one in chosen:
        content = vectors.content(one["input"])
        (blobs / hex_of(sha256_digest(content))).write_bytes(content)
        diff_id = sha256_digest(gzip.decompress(content))
        layers.append(image.Layer(sha256_digest(content), len(content), diff_id, GZIP, ""))
    built = image.write_image(tmp_path, layers)
    reference = pushed(built, registry)
    subject = Descriptor(OCI_MANIFEST, Digest(built.digest), len(indexed.blob_of(built, built.digest)))
    entries = [
        ztoc_entry(Descriptor(GZIP, Digest(layer.digest), layer.size), one["ztoc_digest"], one["ztoc_size"], 1 << 22)
        for layer, one in zip(layers, chosen, strict=True)
    ]
    async with building() as (client, builder, _):
        answer = await builder.build(job(reference, span_size=1 << 22), "j1")
        found = await client.repository(reference).manifest(answer.index)
    assert found.content == encode_index(SociIndex.v1(tuple(entries), subject))


async def test_zstd_layers_are_indexed(tmp_path: Path, registry: str) -> None:
    """Beside a gzip one; their zTOCs have a media type that other readers of indexes leave out."""
    members = [member("a", content=noise(1, 300_000))]
    layers = [image.add_layer(tmp_path, members, compression=kind, frame_bytes=100_000) for kind in ("gzip", "zstd")]
    reference = pushed(image.write_image(tmp_path, layers), registry)
    async with building() as (client, builder, _):
        answer = await builder.build(job(reference), "j1")
        assert [one.layer for one in answer.indexed] == [layer.digest for layer in layers]
        index = parse_manifest((await client.repository(reference).manifest(answer.index)).content)
    assert isinstance(index, Manifest)
    assert [entry.media_type for entry in index.layers] == [ZTOC_MEDIA_TYPE, SOCIABLE_ZTOC_MEDIA_TYPE]


async def test_what_needs_no_index(tmp_path: Path, registry: str) -> None:
    """Of all that is pushed in a manifest's clothes, only images whose layers can be indexed and that have no index."""
    built = small_image(tmp_path / "image", layers=1)
    reference = pushed(built, registry)
    raw: dict[str, Any] = dict(built.manifest)
    ours = job(reference, by="webhook")
    others = {
        "annotated": raw | {"annotations": {INDEX_DIGEST_ANNOTATION: "sha256:" + "1" * 64}},
        "helm": raw | {"config": raw["config"] | {"mediaType": "application/vnd.cncf.helm.config.v1+json"}},
        "attestation": raw | {"layers": [raw["layers"][0] | {"mediaType": "application/vnd.in-toto+json"}]},
    }
    async with building() as (client, builder, _):
        repository = client.repository(reference)
        assert await builder.needless(ours) == ""
        assert "would get" in await builder.needless(replace(ours, min_layer_size=1 << 40))
        for tag, document in others.items():
            await repository.push_manifest(json.dumps(document).encode(), OCI_MANIFEST, tag)
        answers = [await builder.needless(replace(ours, image=reference[:-1] + tag)) for tag in others]
        assert ["names its" in answers[0], "helm" in answers[1], "other things" in answers[2]] == [True] * 3
        made = await builder.build(job(reference), "j1")
        assert "already" in await builder.needless(ours)
        assert "soci.index.v1" in await builder.needless(replace(ours, image=f"{reference[:-2]}@{made.index}"))


# --- as a service


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[None]:
    """The service, as its process runs it."""
    process = Process()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(service.run(config, process))
        try:
            yield
        finally:
            process.stopping.set()
            async with asyncio.timeout(LIMIT):
                await asyncio.wait([running])


async def _events(nats_url: str, what: BuildIndex) -> list[Event]:
    """Submit a job and give its events up to the last."""
    job_id = secrets.token_hex(8)
    seen: list[Event] = []
    async with connect(nats_url, node="cli", name="cli", wait=LIMIT) as bus, bus.watching(job_id) as watched:
        await bus.submit(what, job_id)
        async with asyncio.timeout(LIMIT):
            async for envelope in watched:
                assert envelope.event.id == job_id
                seen.append(envelope.event)
                if isinstance(envelope.event, (IndexMade, IndexFailed)):
                    break
    return seen


async def test_a_job_over_the_bus(tmp_path: Path, registry: str, nats_url: str) -> None:
    """Begun, each layer, made: and the next job after it."""
    built = small_image(tmp_path / "image")
    reference = pushed(built, registry)
    async with serving(Config(root=tmp_path, nats_url=nats_url, node="n1")):
        for _ in range(2):
            events = await _events(nats_url, job(reference))
            assert [type(event) for event in events] == [IndexBegun, LayerIndexed, LayerIndexed, IndexMade]
            made = events[-1]
            assert isinstance(made, IndexMade)
            assert (made.image, made.manifest, made.discovery) == (reference, built.digest, "tag")


@pytest.mark.parametrize("how", ["small", "missing", "away", "defect"])
async def test_a_job_that_fails_over_the_bus(
    tmp_path: Path, proxy: Proxy, nats_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its code and reason are told at once, whoever's fault it is, and the job is not tried again."""
    reference = pushed(small_image(tmp_path / "image"), proxy.upstream).replace(proxy.upstream, proxy.address)
    what = job(reference, min_layer_size=1 << 40 if how == "small" else 0)
    expected = {"small": NoZtoc.code, "missing": NotFound.code, "away": "unauthorized", "defect": SociError.code}[how]
    if how == "missing":
        what = replace(what, image=reference.removesuffix(":1") + ":2")
    if how == "away":
        proxy.hook = always(Status(403), blobs_only=False)
    if how == "defect":

        async def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(IndexBuilder, "build", broken)
    async with serving(Config(root=tmp_path, nats_url=nats_url, node="n1")):
        events = await _events(nats_url, what)
        failed = events[-1]
        assert isinstance(failed, IndexFailed)
        assert (failed.code, failed.image) == (expected, what.image)
        assert failed.why
        assert sum(isinstance(event, IndexBegun) for event in events) == 1
        async with connect(nats_url, node="cli", name="cli", wait=LIMIT) as bus:
            await no_jobs_left(bus)


async def no_jobs_left(bus: NatsBus) -> None:
    """Wait until every job is done or dropped."""
    async with asyncio.timeout(LIMIT):
        while (await bus._link.jetstream.stream_info("SOCI_JOBS")).state.messages:
            await asyncio.sleep(0.02)


async def answering(client: httpx.AsyncClient) -> None:
    """Wait until somebody listens."""
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                await client.get("/")
            except httpx.TransportError:
                await asyncio.sleep(0.02)
            else:
                return


def notification(host: str, repository: str, digest: str) -> bytes:
    """What a registry tells of a push."""
    target = {"mediaType": OCI_MANIFEST, "repository": repository, "digest": digest, "tag": "1"}
    return json.dumps({"events": [{"action": "push", "target": target, "request": {"host": host}}]}).encode()


async def test_a_notification_becomes_an_index(tmp_path: Path, registry: str, nats_url: str) -> None:
    """Told twice it is one job; of the index that was pushed itself, nothing more is made."""
    folder = tmp_path / "image"
    built = image.write_image(folder, [image.add_layer(folder, [member("f", content=noise(1, 24 << 20))])])
    reference = pushed(built, registry)
    repository = reference.removeprefix(registry + "/").removesuffix(":1")
    port = free_port()
    config = Config(root=tmp_path, nats_url=nats_url, node="n1", webhook_address=str(port), webhook_token="secret")
    headers = {"Content-Type": CONTENT_TYPE, "Authorization": "Bearer secret"}
    async with (
        connect(nats_url, node="n1", name="test", wait=LIMIT) as bus,
        bus.watching("*") as watched,
        serving(config),
        httpx.AsyncClient(trust_env=False, base_url=f"http://127.0.0.1:{port}") as client,
        Registry(settings=PATIENCE, credentials=NoCredentials()) as reader,
    ):
        await answering(client)
        for _ in range(2):
            content = notification(registry, repository, built.digest)
            assert (await client.post("/notifications", content=content, headers=headers)).status_code == 200
        seen: list[Event] = []
        async with asyncio.timeout(LIMIT):
            async for envelope in watched:
                seen.append(envelope.event)
                if isinstance(envelope.event, IndexMade):
                    break
        made = seen[-1]
        assert isinstance(made, IndexMade)
        assert [type(event) for event in seen] == [IndexBegun, LayerIndexed, IndexMade]
        assert (made.image, made.manifest) == (f"{reference}@{built.digest}", built.digest)
        content = notification(registry, repository, made.index)
        assert (await client.post("/notifications", content=content, headers=headers)).status_code == 200
        await no_jobs_left(bus)
        found = await reader.repository(reference).referrers(Digest(built.digest), SOCI_INDEX_V1)
        assert [one.digest for one in found] == [made.index]
        assert await reader.repository(reference).referrers(made.index, SOCI_INDEX_V1) == []
