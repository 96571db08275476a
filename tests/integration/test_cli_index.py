# SPDX-License-Identifier: Apache-2.0
"""`soci create`, `push`, `index`, `ztoc`, `prefetch` and `rebuild-db` against a real containerd and registry."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from soci.digest import Digest, parse_digest, sha256_digest
from soci.errors import NotFound
from soci.index import EMPTY_CONFIG_DIGEST, SOCI_INDEX_V1, parse_index
from soci.oci import Descriptor, parse_manifest
from soci_containerd import Client, Image, connect
from soci_dev import image
from soci_dev.stack import Stack
from soci_dev.tarball import member
from support.images import noise
from support.layouts import DOCKER_LIST, OCI_INDEX, Json, Layout
from support.registry import front

pytestmark = pytest.mark.root

COMMAND_SECONDS = 60.0
ALL = ("--min-layer-size", "0", "--span-size", "65536")
TEXT = noise(5, 150_000)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """One of our own: these tests look at all that containerd holds."""
    return make_stack(services=())


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    """containerd, from which all images and content are taken afterwards."""
    async with connect(str(stack.containerd_address), stack.namespace) as connected:
        await connected.ensure_namespace()
        yield connected
    for name in stack.ctr("images", "ls", "-q").stdout.split():
        stack.ctr("images", "rm", "--sync", name)


@pytest.fixture
def soci(stack: Stack, tmp_path: Path) -> Run:
    """Runs `soci` with a root folder of the test's own; fails where the command does, unless ``fails``."""

    def run(*words: str, fails: bool = False, store: str = "containerd") -> subprocess.CompletedProcess[str]:
        flags = ("--root", str(tmp_path / "root"), "--content-store", store)
        command = stack.soci_command(*flags, *words)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
        assert (done.returncode == 1) == fails, done.stdout + done.stderr
        if fails:
            assert re.fullmatch(r"soci: [^\n]+\n", done.stderr.splitlines(keepends=True)[-1])
        return done

    return run


@pytest.fixture
def made(tmp_path: Path) -> Layout:
    folder = tmp_path / "source"
    folder.mkdir()
    return Layout(folder)


def single(made: Layout, *, docker: bool = False, architecture: str = "") -> Json:
    """An image of two layers: one of noise, and one with the file `text`, links to it and a directory."""
    files = image.add_layer(
        made.folder,
        [
            member("./dir", b"5", mode=0o755),
            member("./dir/text", content=TEXT),
            member("hard", b"1", linkname="dir/text"),
            member("soft", b"2", linkname="dir/text"),
            member("empty"),
        ],
    )
    return made.image(architecture or image.architecture(), [made.layer(1, 200_000), files], docker=docker)


async def put(client: Client, made: Layout, name: str, target: Json) -> None:
    """The image in containerd under ``name``, with the labels that keep all of it. No puller is needed for that."""

    async def blob(entry: Json, labels: dict[str, str]) -> None:
        kept = Descriptor(entry["mediaType"], parse_digest(entry["digest"]), entry["size"])
        await leased.content.write(kept, made.read(entry["digest"]), labels)

    async def document(entry: Json) -> None:
        content = made.json(entry["digest"])
        if "manifests" in content:
            for one in content["manifests"]:
                await document(one)
            kept = {f"m.{at}": one["digest"] for at, one in enumerate(content["manifests"])}
        else:
            for one in (content["config"], *content["layers"]):
                await blob(one, {})
            kept = {f"l.{at}": one["digest"] for at, one in enumerate((content["config"], *content["layers"]))}
        await blob(entry, {f"containerd.io/gc.ref.content.{key}": value for key, value in kept.items()})

    async with client.lease("test") as leased:
        await document(target)
        kept = Descriptor(target["mediaType"], parse_digest(target["digest"]), target["size"])
        await leased.images.put(Image(name, kept))


async def collect(client: Client) -> None:
    """containerd collects its garbage now."""
    content = b"nobody's"
    descriptor = Descriptor("text/plain", sha256_digest(content), len(content))
    async with client.lease("test") as leased:
        await leased.content.write(descriptor, content, {})
    await client.images.put(Image("gc", descriptor))
    await client.images.delete("gc", sync=True)
    assert not await client.content.exists(descriptor.digest)


def rows(output: str) -> list[list[str]]:
    """The cells of a table, headers first."""
    return [re.split(r" {4,}", line) for line in output.splitlines()]


async def test_an_index_is_made_kept_and_freed_with_its_image(client: Client, soci: Run, made: Layout) -> None:
    """create says each layer, stores index and zTOCs in containerd; they live as long as the image, no longer."""
    target = single(made)
    layers = [one["digest"] for one in made.json(target["digest"])["layers"]]
    await put(client, made, "test/create:1", target)
    done = soci("create", *ALL, "test/create:1")
    (digest,) = soci("index", "ls", "-q").stdout.split()
    content = await client.content.read(parse_digest(digest))
    index = parse_index(content)
    found = sorted(re.fullmatch(r"layer (\S+) -> ztoc (\S+)", line).groups() for line in done.stdout.splitlines())  # type: ignore[union-attr]
    assert found == sorted((entry.layer, entry.ztoc.digest) for entry in index.layers)
    assert [entry.layer for entry in index.layers] == layers
    assert f"index {digest} for linux/" in done.stderr
    assert (index.version, index.subject and index.subject.digest) == (1, target["digest"])
    ztocs = [entry.ztoc.digest for entry in index.layers]
    assert content.decode() == expected_index(index.layers, target)
    labels = dict((await client.images.get("test/create:1")).labels)
    assert labels == {"containerd.io/gc.ref.content.soci-index": digest}
    await collect(client)
    for blob in (digest, EMPTY_CONFIG_DIGEST, *ztocs):
        assert await client.content.exists(parse_digest(blob))
    await client.images.delete("test/create:1", sync=True)
    for blob in (digest, EMPTY_CONFIG_DIGEST, *ztocs):
        assert not await client.content.exists(parse_digest(blob))


def expected_index(layers: Any, target: Json) -> str:
    """An index's bytes in the form that its readers know, from its facts alone."""
    entries = ",".join(
        f'{{"mediaType":"application/octet-stream","digest":"{entry.ztoc.digest}","size":{entry.ztoc.size},'
        f'"annotations":{{"com.amazon.soci.image-layer-digest":"{entry.layer}",'
        '"com.amazon.soci.image-layer-mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",'
        '"com.amazon.soci.span-size":"65536"}}'
        for entry in layers
    )
    return (
        '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":'
        '"application/vnd.amazon.soci.index.v1+json","digest":'
        '"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},'
        f'"layers":[{entries}],"subject":{{"mediaType":"application/vnd.oci.image.manifest.v1+json",'
        f'"digest":"{target["digest"]}","size":{target["size"]}}},'
        '"annotations":{"com.amazon.soci.build-tool-identifier":"AWS SOCI CLI v0.2"}}'
    )


@pytest.mark.parametrize("store", ["containerd", "soci"])
async def test_two_runs_make_the_same(client: Client, soci: Run, made: Layout, tmp_path: Path, store: str) -> None:
    """Forced, with reused zTOCs or on another root, the index is the same; only --force builds anew."""
    await put(client, made, "test/same:1", single(made))
    first = soci("create", "-q", *ALL, "test/same:1", store=store).stdout
    again = soci("create", *ALL, "test/same:1", store=store).stdout
    assert again.count(" (already exists)\n") == 2
    forced = soci("create", "--force", *ALL, "test/same:1", store=store).stdout
    assert "already exists" not in forced
    assert soci("create", "-q", "--force", *ALL, "test/same:1", store=store).stdout == first
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    assert soci("create", "-q", *ALL, "test/same:1", store=store).stdout == first


async def test_the_store_below_root(client: Client, soci: Run, made: Layout, tmp_path: Path) -> None:
    """With --content-store soci nothing is added to containerd, and index and zTOCs are in an image layout."""
    await put(client, made, "test/below:1", single(made))
    digest = soci("create", "-q", *ALL, "test/below:1", store="soci").stdout.strip()
    folder = tmp_path / "root" / "content"
    blobs = {path.name for path in (folder / "blobs" / "sha256").iterdir()}
    index = parse_index((folder / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes())
    named = {digest, EMPTY_CONFIG_DIGEST, *(entry.ztoc.digest for entry in index.layers)}
    assert blobs == {one.removeprefix("sha256:") for one in named}
    listed = json.loads((folder / "index.json").read_bytes())["manifests"]
    assert [one["digest"] for one in listed] == [digest]
    assert not await client.content.exists(parse_digest(digest))
    assert not (await client.images.get("test/below:1")).labels
    assert soci("index", "ls", "-q", store="soci").stdout.strip() == digest
    shown = json.loads(soci("index", "info", digest, store="soci").stdout)
    assert shown["layers"][0]["digest"] == index.layers[0].ztoc.digest
    soci("index", "rm", digest, store="soci")
    assert soci("index", "ls", "-q", store="soci").stdout == ""
    assert json.loads((folder / "index.json").read_bytes())["manifests"] == []


async def test_several_platforms_and_all_stay(client: Client, soci: Run, made: Layout) -> None:
    """Each platform's index has a label of its own, so none is collected; filters tell them apart."""
    base = made.layer(1, 200_000)
    entries = [made.image(one, [base, made.layer(at, 200_000)]) for at, one in enumerate(("amd64", "arm64"), 2)]
    entries.append(made.attestation(entries[0]))
    await put(client, made, "test/multi:1", made.index(entries))
    digests = soci("create", "-q", *ALL, "--all-platforms", "test/multi:1").stdout.split()
    assert len(digests) == 2
    labels = dict((await client.images.get("test/multi:1")).labels)
    assert labels == {
        "containerd.io/gc.ref.content.soci-index": digests[0],
        "containerd.io/gc.ref.content.soci-index.1": digests[1],
    }
    again = soci("create", "-q", *ALL, "-p", "linux/arm64", "test/multi:1").stdout.split()
    assert again == digests[1:]
    assert dict((await client.images.get("test/multi:1")).labels) == labels
    await collect(client)
    for digest in digests:
        assert await client.content.exists(parse_digest(digest))
    arm = soci("index", "ls", "--platform", "linux/arm64", "--json").stdout
    assert [(one["digest"], one["platform"], one["manifest_digest"]) for one in json.loads(arm)] == [
        (digests[1], "linux/arm64", entries[1]["digest"])
    ]
    soci("index", "rm", digests[0])
    assert dict((await client.images.get("test/multi:1")).labels) == {
        "containerd.io/gc.ref.content.soci-index.1": digests[1]
    }
    absent = soci("create", *ALL, "-p", "linux/s390x", "test/multi:1", fails=True)
    assert "linux/s390x" in absent.stderr


async def test_dockers_formats_and_foreign_architectures(client: Client, soci: Run, made: Layout) -> None:
    """Docker's list and manifest types stay as found; an image of one foreign manifest needs no --platform."""
    entry = single(made, docker=True, architecture="riscv64")
    await put(client, made, "test/docker:1", entry)
    digest = soci("create", "-q", *ALL, "test/docker:1").stdout.strip()
    index = parse_index(await client.content.read(parse_digest(digest)))
    assert index.subject == Descriptor(
        "application/vnd.docker.distribution.manifest.v2+json", parse_digest(entry["digest"]), entry["size"]
    )
    await put(client, made, "test/docker:2", made.index([entry], DOCKER_LIST))
    assert soci("create", "-q", *ALL, "-p", "linux/riscv64", "test/docker:2").stdout.strip() == digest
    soci("create", *ALL, "-p", "linux/amd64", "test/docker:1", fails=True)


async def test_small_layers_are_skipped_and_none_is_an_error(client: Client, soci: Run, made: Layout) -> None:
    """A skipped layer has its line on stdout; an image of small layers only has no index and says so."""
    small, large = made.layer(1, 1_000), made.layer(2, 300_000)
    await put(client, made, "test/small:1", made.image(image.architecture(), [small, large]))
    done = soci("create", "--min-layer-size", "20000", "test/small:1")
    lines = sorted(done.stdout.splitlines())
    assert lines[0].startswith(f"layer {large.digest} -> ztoc sha256:")
    assert lines[1].startswith(f"ztoc skipped - layer {small.digest} (application/vnd.oci.image.layer.v1.tar+gzip)")
    nothing = soci("create", "test/small:1", fails=True)
    assert "no zTOC for any layer" in nothing.stderr
    absent = soci("create", "test/none:1", fails=True)
    assert "test/none:1" in absent.stderr


@pytest.mark.parametrize(
    "words",
    [("--span-size", "-1"), ("--min-layer-size", "-1"), ("--span-size", str(2**63)), ("--min-layer-size", str(2**63))],
)
def test_impossible_sizes_are_refused(stack: Stack, words: tuple[str, str]) -> None:
    """Negative sizes and those beyond 63 bits fail before anything is looked at."""
    done = subprocess.run(
        stack.soci_command("create", *words, "x:1"), capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert words[0] in done.stderr


async def test_lists_of_indexes(client: Client, soci: Run, made: Layout) -> None:
    """ls has the known columns, newest first, a row for each name of an image, and its filters."""
    target = single(made)
    await put(client, made, "test/list:1", target)
    await put(client, made, "test/list:2", target)
    old = soci("create", "-q", *ALL, "test/list:1").stdout.strip()
    new = soci("create", "-q", "--min-layer-size", "0", "test/list:1").stdout.strip()
    table = rows(soci("index", "ls").stdout)
    assert table[0] == ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"]
    size = (await client.content.info(parse_digest(new))).size
    assert table[1][:6] == [
        new,
        str(size),
        "test/list:1",
        f"linux/{image.architecture()}",
        "application/vnd.oci.image.manifest.v1+json",
        "v1",
    ]
    assert [(row[0], row[2]) for row in table[1:]] == [
        (new, "test/list:1"),
        (new, "test/list:2"),
        (old, "test/list:1"),
        (old, "test/list:2"),
    ]
    assert re.fullmatch(r"\d+s ago", table[1][6])
    assert soci("index", "list", "--quiet").stdout.split() == [new, old]
    assert soci("index", "list", "--ref", "test/list:2", "-q").stdout.split() == [new, old]
    assert soci("index", "ls", "-q", "-p", "linux/s390x").stdout == ""
    soci("index", "ls", "--ref", "test/none:1", fails=True)
    await client.images.delete("test/list:1", sync=True)
    await client.images.delete("test/list:2", sync=True)
    assert [one["image_ref"] for one in json.loads(soci("index", "ls", "--json").stdout)] == ["", ""]


async def test_infos_and_their_refusals(client: Client, soci: Run, made: Layout) -> None:
    """info takes only its own kind; another kind, an unknown digest and no digest are told apart."""
    await put(client, made, "test/info:1", single(made))
    digest = soci("create", "-q", *ALL, "test/info:1").stdout.strip()
    ztoc = soci("ztoc", "ls", "-q").stdout.split()[0]
    shown = soci("index", "info", digest).stdout
    assert shown.startswith('{\n  "schemaVersion": 2,\n  "mediaType": "application/vnd.oci.image.manifest.v1+json",')
    assert json.loads(shown) == json.loads(await client.content.read(parse_digest(digest)))
    assert "a zTOC" in soci("index", "info", ztoc, fails=True).stderr
    assert "a SOCI index" in soci("ztoc", "info", digest, fails=True).stderr
    unknown = "sha256:" + "0" * 64
    for words in (("index", "info"), ("ztoc", "info"), ("prefetch", "info"), ("index", "rm")):
        assert unknown in soci(*words, unknown, fails=True).stderr
        assert "not a sha256" in soci(*words, "sha256:12", fails=True).stderr
        soci(*words, "", fails=True)


async def test_removing(client: Client, soci: Run, made: Layout) -> None:
    """rm takes digests or an image, never both or a zTOC; what other indexes need stays, and can be used again."""
    shared = made.layer(1, 200_000)
    for name in ("one", "two"):
        await put(
            client,
            made,
            f"test/{name}:1",
            made.image(image.architecture(), [shared, made.layer(len(name) + (name == "two"), 200_000)]),
        )
    one, two = (soci("create", "-q", *ALL, f"test/{name}:1").stdout.strip() for name in ("one", "two"))
    soci("index", "rm", "--ref", "test/one:1", one, fails=True)
    soci("index", "rm", fails=True)
    ztoc = soci("ztoc", "ls", "-q").stdout.split()[0]
    soci("index", "rm", one, ztoc, fails=True)
    assert set(soci("index", "ls", "-q").stdout.split()) == {one, two}
    soci("index", "remove", "--ref", "test/one:1")
    assert soci("index", "ls", "-q").stdout.split() == [two]
    assert not await client.content.exists(parse_digest(one))
    await collect(client)
    for entry in parse_index(await client.content.read(parse_digest(two))).layers:
        assert await client.content.exists(entry.ztoc.digest)
    rebuilt = soci("create", *ALL, "test/one:1").stdout
    assert f"layer {shared.digest} -> ztoc" in rebuilt
    assert "(already exists)" in next(line for line in rebuilt.splitlines() if shared.digest in line)
    soci("index", "rm", one, two)
    assert soci("index", "ls", "-q").stdout == ""


async def test_ztocs(client: Client, soci: Run, made: Layout) -> None:
    """ls with its filters, and info with all that a zTOC says, to the last file."""
    target = single(made)
    await put(client, made, "test/ztoc:1", target)
    await put(client, made, "test/other:1", made.image("s390x", [made.layer(9, 150_000)]))
    index = parse_index(
        await client.content.read(parse_digest(soci("create", "-q", *ALL, "test/ztoc:1").stdout.strip()))
    )
    soci("create", *ALL, "test/other:1")
    entry = index.layers[1]
    table = rows(soci("ztoc", "ls", "--ztoc-digest", entry.ztoc.digest).stdout)
    assert table == [["DIGEST", "SIZE", "LAYER DIGEST"], [entry.ztoc.digest, str(entry.ztoc.size), entry.layer]]
    assert len(soci("ztoc", "list", "-q").stdout.split()) == 3
    of_image = json.loads(soci("ztoc", "ls", "--image-ref", "test/ztoc:1", "--json").stdout)
    assert {one["layer_digest"] for one in of_image} == {one.layer for one in index.layers}
    facts = json.loads(soci("ztoc", "info", entry.ztoc.digest).stdout)
    assert {key: facts[key] for key in ("version", "build_tool", "size", "span_size", "num_files")} == {
        "version": "0.9",
        "build_tool": "AWS SOCI CLI v0.2",
        "size": entry.ztoc.size,
        "span_size": 65536,
        "num_files": 5,
    }
    assert list(facts["files"][1]) == ["filename", "offset", "size", "type", "start_span", "end_span"]
    assert [(one["filename"], one["size"], one["type"]) for one in facts["files"]] == [
        ("./dir/", 0, "dir"),
        ("./dir/text", 150_000, "reg"),
        ("hard", 0, "hardlink"),
        ("soft", 0, "symlink"),
        ("empty", 0, "reg"),
    ]
    text = facts["files"][1]
    assert (text["offset"], text["start_span"], text["end_span"]) == (1024, 0, facts["num_spans"] - 1)
    assert facts["num_multi_span_files"] == 1
    assert facts["num_spans"] > 1


async def test_files_are_read_by_a_ztoc(stack: Stack, client: Client, soci: Run, made: Layout, tmp_path: Path) -> None:
    """get-file gives exactly the file's bytes and a line feed, by any spelling of its name, or writes a file."""
    await put(client, made, "test/get:1", single(made))
    index = parse_index(
        await client.content.read(parse_digest(soci("create", "-q", *ALL, "test/get:1").stdout.strip()))
    )
    ztoc = index.layers[1].ztoc.digest
    for name in ("./dir/text", "/dir/text", "hard"):
        command = stack.soci_command("--root", str(tmp_path / "root"), "ztoc", "get-file", ztoc, name)
        done = subprocess.run(command, capture_output=True, check=True, timeout=COMMAND_SECONDS)
        assert done.stdout == TEXT + b"\n"
    output = tmp_path / "out"
    assert soci("ztoc", "get-file", ztoc, "dir/text", "-o", str(output)).stdout == ""
    assert output.read_bytes() == TEXT
    assert soci("ztoc", "get-file", ztoc, "empty").stdout == "\n"
    for name, why in (("none", "no file"), ("soft", "symlink"), ("dir", "dir")):
        assert why in soci("ztoc", "get-file", ztoc, name, "-o", str(tmp_path / "x"), fails=True).stderr
    assert not (tmp_path / "x").exists()
    soci("ztoc", "get-file", "sha256:" + "0" * 64, "dir/text", fails=True)


async def test_prefetch_lists(client: Client, soci: Run, made: Layout, tmp_path: Path) -> None:
    """Files named one by one or in a JSON file become a list that ls and info show, kept with its index."""
    await put(client, made, "test/prefetch:1", single(made))
    names = tmp_path / "names.json"
    names.write_text('[" /soft ", "", "dir/text"]')
    words = ("--prefetch-files-json", str(names), "--prefetch-file", "no/such")
    done = soci("create", *ALL, *words, "test/prefetch:1")
    assert "no/such" in done.stderr
    (digest,) = soci("index", "ls", "-q").stdout.split()
    index = parse_index(await client.content.read(parse_digest(digest)))
    (entry,) = index.prefetch
    last = max(one["end_span"] for one in json.loads(soci("ztoc", "info", index.layers[1].ztoc.digest).stdout)["files"])
    assert await client.content.read(entry.ztoc.digest) == (
        b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":%d}]}' % last
    )
    table = rows(soci("prefetch", "ls").stdout)
    assert table[0] == ["DIGEST", "LAYER DIGEST", "SPANS", "CREATED"]
    assert table[1][:3] == [entry.ztoc.digest, entry.layer, str(last + 1)]
    assert json.loads(soci("prefetch", "list", "--json").stdout)[0]["spans"] == last + 1
    shown = json.loads(soci("prefetch", "info", entry.ztoc.digest, "--json").stdout)
    assert shown == {
        "digest": entry.ztoc.digest,
        "size": entry.ztoc.size,
        "layer_digests": [entry.layer],
        "ranges": [{"start_span": 0, "end_span": last, "priority": 0}],
        "total_spans": last + 1,
    }
    assert f"{last + 1} spans in 1 ranges" in soci("prefetch", "info", entry.ztoc.digest).stdout
    await collect(client)
    assert await client.content.exists(entry.ztoc.digest)
    names.write_text('{"a": 1}')
    assert "not a JSON list" in soci("create", *ALL, *words, "test/prefetch:1", fails=True).stderr


@pytest.mark.parametrize("store", ["containerd", "soci"])
@pytest.mark.parametrize("verb", ["rebuild-db", "rebuild_db"])
async def test_the_database_can_be_built_anew(
    client: Client, soci: Run, made: Layout, tmp_path: Path, store: str, verb: str
) -> None:
    """After its loss it knows all it knew, prefetch lists and version 2 too; what is gone is forgotten, strangers ignored."""
    single_target = single(made)
    await put(client, made, "docker.io/test/rebuild:1", made.index([single_target]))
    soci("create", *ALL, "--prefetch-file", "soft", "docker.io/test/rebuild:1", store=store)
    soci("convert", *ALL, "docker.io/test/rebuild:1", "docker.io/test/rebuild:2", store=store)

    def known() -> dict[str, list[Json]]:
        lists = {
            kind: json.loads(soci(kind, "ls", "--json", store=store).stdout) for kind in ("index", "ztoc", "prefetch")
        }
        return {kind: sorted(({**one, "created_at": None} for one in found), key=str) for kind, found in lists.items()}

    before = known()
    assert sorted(one["version"] for one in before["index"]) == ["v1", "v2"]
    assert {one["image_ref"] for one in before["index"]} == {"docker.io/test/rebuild:1", "docker.io/test/rebuild:2"}
    (tmp_path / "root" / "artifacts.sqlite3").unlink()
    if store == "soci":
        blobs = tmp_path / "root" / "content" / "blobs" / "sha256"
        (blobs / "README").write_text("not a blob at all")
        (blobs / ("1" * 64)).write_text("neither what its name says")
    soci(verb, store=store)
    assert known() == before
    soci(verb, store=store)
    assert known() == before
    doomed = before["ztoc"][0]["digest"]
    if store == "soci":
        (blobs / doomed.removeprefix("sha256:")).unlink()
    else:
        await client.content.delete(Digest(doomed))
    soci(verb, store=store)
    assert doomed not in {one["digest"] for one in known()["ztoc"]}


def referrers(stack: Stack, repository: str, digest: str) -> list[Json]:
    """The fallback list of a registry that has no referrers API."""
    url = f"http://{stack.registry}/v2/{repository}/manifests/{digest.replace(':', '-')}"
    answer = httpx.get(url, headers={"Accept": OCI_INDEX}, trust_env=False)
    answer.raise_for_status()
    found: list[Json] = answer.json()["manifests"]
    return found


async def test_a_push_is_found_from_its_image(stack: Stack, client: Client, soci: Run, made: Layout) -> None:
    """Index and zTOCs are in the registry whole, and listed for the image's manifest as the newest says of itself."""
    target = single(made)
    built = image.Image(made.folder, target["digest"], made.json(target["digest"]))
    name = image.push(built, stack.registry, "push/one", "1")
    await put(client, made, name, target)
    soci("push", name, fails=True)
    soci("create", "-q", *ALL, name)
    digest = soci("create", "-q", "--min-layer-size", "0", name).stdout.strip()
    done = soci("push", "--plain-http", name)
    assert f"pushed index {digest} to {stack.registry}/push/one" in done.stdout
    assert referrers(stack, "push/one", target["digest"]) == [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": (await client.content.info(parse_digest(digest))).size,
            "annotations": {"com.amazon.soci.build-tool-identifier": "AWS SOCI CLI v0.2"},
            "artifactType": SOCI_INDEX_V1,
        }
    ]
    there = httpx.get(
        f"http://{stack.registry}/v2/push/one/manifests/{digest}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        trust_env=False,
    )
    assert sha256_digest(there.content) == digest
    document = parse_manifest(there.content)
    for entry in (document.config, *document.layers):  # type: ignore[union-attr]
        blob = httpx.get(
            f"http://{stack.registry}/v2/push/one/blobs/{entry.digest}", trust_env=False, follow_redirects=True
        )
        assert sha256_digest(blob.content) == entry.digest
    assert soci("push", "-q", name).stdout == f"{digest}\n"
    assert len(referrers(stack, "push/one", target["digest"])) == 1


async def test_existing_indexes(stack: Stack, client: Client, soci: Run, made: Layout) -> None:
    """Of an index that is there already: warn says so and pushes, skip does nothing, allow does not look."""
    target = single(made)
    built = image.Image(made.folder, target["digest"], made.json(target["digest"]))
    name = image.push(built, stack.registry, "push/existing", "1")
    await put(client, made, name, target)

    def there() -> list[str]:
        return [one["digest"] for one in referrers(stack, "push/existing", target["digest"])]

    first = soci("create", "-q", *ALL, name).stdout.strip()
    assert soci("push", "--existing-index", "skip", name).stderr == ""
    second = soci("create", "-q", "--min-layer-size", "0", name).stdout.strip()
    skipped = soci("push", "--existing-index", "skip", name)
    assert (there(), "skipped" in skipped.stdout, first in skipped.stdout) == ([first], True, True)
    assert soci("push", "--existing-index", "skip", "-q", name).stdout == ""
    warned = soci("push", "-q", name)
    assert (there(), warned.stdout) == ([first, second], f"{second}\n")
    assert first in warned.stderr
    third = soci("create", "-q", "--min-layer-size", "0", "--span-size", "100000", name).stdout.strip()
    allowed = soci("push", "-q", "--existing-index", "allow", "--max-concurrent-uploads", "0", name)
    assert (there(), allowed.stdout, allowed.stderr) == ([first, second, third], f"{third}\n", "")
    soci("push", "--existing-index", "skip", name)
    several = soci("push", name)
    assert all(one in several.stderr for one in (first, second, third))


async def test_where_and_how_a_push_goes(stack: Stack, client: Client, soci: Run, made: Layout, tmp_path: Path) -> None:
    """--hosts-dir says where a registry is; its certificate must be good, unless --skip-verify."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate(tmp_path))
    target = single(made)
    name, near = "registry.example/push/hosts:1", f"{stack.registry}/push/hosts:1"
    for one in (name, near):
        await put(client, made, one, target)
    digest = soci("create", "-q", *ALL, name).stdout.strip()
    soci("push", near)  # so there are no uploads: the registry would name their places without TLS

    async def as_usual(_: web.Request) -> None:
        return None

    async with front(stack.registry, as_usual, tls) as server:
        folder = tmp_path / "hosts" / "registry.example"
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(f'server = "https://{server.address}"\n')
        words = ("--hosts-dir", f"{tmp_path / 'none'},{folder.parent}", name)
        assert "certificate" in (await asyncio.to_thread(soci, "push", *words, fails=True)).stderr
        done = await asyncio.to_thread(soci, "push", "-k", *words)
        assert f"pushed index {digest}" in done.stdout
        assert len(server.requests("PUT", f"/v2/push/hosts/manifests/{digest}")) == 1


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that nobody has reason to trust, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    files = folder / "server.crt", folder / "server.key"
    words = ("-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=registry.example", "-days", "2")
    command = ["openssl", "req", *words, "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_SECONDS)
    return files


async def test_platforms_as_nerdctl_names_them(stack: Stack, client: Client, soci: Run, made: Layout) -> None:
    """``--all-platforms true`` in two words, and platforms with commas between them, are understood."""
    target = single(made)
    name = f"{stack.registry}/push/words:1"
    await put(client, made, name, target)
    digest = soci("create", "--all-platforms", "true", *ALL, "-q", name).stdout.strip()
    assert soci("push", "--all-platforms", "true", "-q", name).stdout == f"{digest}\n"
    assert soci("push", "--platform", "linux/amd64,linux/amd64", "-q", name).stdout == f"{digest}\n"


async def test_a_push_brings_the_image_that_is_missing(stack: Stack, client: Client, soci: Run, made: Layout) -> None:
    """An index is never there before what it refers to; where that is nowhere, the push fails and says so."""
    target = single(made)
    name = f"{stack.registry}/push/missing:1"
    await put(client, made, name, target)
    soci("create", "-q", *ALL, name)
    layer = parse_digest(made.json(target["digest"])["layers"][0]["digest"])
    assert "lacks the image's manifest" in soci("push", name).stdout
    got = httpx.get(
        f"http://{stack.registry}/v2/push/missing/manifests/{target['digest']}",
        headers={"Accept": target["mediaType"]},
        trust_env=False,
    )
    assert sha256_digest(got.content) == target["digest"]
    elsewhere = f"{stack.registry}/push/nowhere:1"
    await put(client, made, elsewhere, target)
    await client.content.delete(layer)
    assert layer in soci("push", elsewhere, fails=True).stderr
    with pytest.raises(httpx.HTTPStatusError):
        referrers(stack, "push/nowhere", target["digest"])


async def test_only_version_1_is_pushed(client: Client, stack: Stack, soci: Run, made: Layout) -> None:
    """An index version 2 of the same image is passed over with a warning, and alone is an error."""
    target = single(made)
    name = f"{stack.registry}/push/two:1"
    await put(client, made, name, target)
    converted = f"{stack.registry}/push/two:converted"
    soci("convert", *ALL, name, converted)
    failed = soci("push", converted, fails=True)
    assert "is v2" in failed.stderr
    assert "run soci create" in failed.stderr


async def test_flags_that_others_give(client: Client, stack: Stack, soci: Run, made: Layout) -> None:
    """Flags without effect are taken, and those that promise something are said to have none."""
    target = single(made)
    name = f"{stack.registry}/push/flags:1"
    await put(client, made, name, target)
    soci("create", "-q", *ALL, name)
    done = soci("push", "--refresh", "x", "--http-trace", "--snapshotter", "x", "--user", "a:b", "-q", name)
    assert done.stderr == "soci: warning: --refresh has no effect\nsoci: warning: --http-trace has no effect\n"
    assert "--user" in soci("push", "--user", "nobody", name, fails=True).stderr


async def test_creates_at_once(client: Client, soci: Run, made: Layout) -> None:
    """Several processes index one image at the same time: all indexes are known, labelled and kept."""
    await put(client, made, "test/once:1", single(made))
    sizes = ("40000", "50000", "60000", "70000")
    runs = [
        asyncio.to_thread(soci, "create", "-q", "--min-layer-size", "0", "--span-size", size, "test/once:1")
        for size in sizes
    ]
    digests = {done.stdout.strip() for done in await asyncio.gather(*runs)}
    assert len(digests) == 4
    assert set((await client.images.get("test/once:1")).labels.values()) == digests
    assert set(soci("index", "ls", "-q").stdout.split()) == digests
    await collect(client)
    for digest in digests:
        assert await client.content.exists(parse_digest(digest))


async def test_an_image_that_is_not_there_leaves_no_lease(
    stack: Stack, client: Client, soci: Run, made: Layout
) -> None:
    """Whatever fails, nothing stays leased."""
    with pytest.raises(NotFound):
        await client.images.get("test/nothing:1")
    soci("create", "test/nothing:1", fails=True)
    target = single(made)
    await put(client, made, "test/broken:1", target)
    await client.content.delete(parse_digest(made.json(target["digest"])["layers"][0]["digest"]))
    assert "layer sha256:" in soci("create", *ALL, "test/broken:1", fails=True).stderr
    assert stack.ctr("leases", "ls", "-q").stdout == ""
    assert soci("index", "ls", "-q").stdout == ""


async def test_bars_are_for_terminals_and_lines_for_pipes(
    stack: Stack, client: Client, made: Layout, tmp_path: Path
) -> None:
    """With stderr on a terminal bars are drawn there, and stdout has the same lines as ever."""
    await put(client, made, "test/bars:1", single(made))
    command = stack.soci_command("--root", str(tmp_path / "root"), "create", *ALL, "test/bars:1")
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as running:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(ours, 1 << 16):
                drawn += piece
        out = running.communicate(timeout=COMMAND_SECONDS)[0]
    os.close(ours)
    assert running.returncode == 0
    assert all(line.startswith("layer sha256:") for line in out.splitlines())
    assert len(out.splitlines()) == 2
    assert b"\x1b[" in drawn
    assert b"index sha256:" in drawn


LOGIN = "Basic " + base64.b64encode(b"me:secret").decode()


async def test_a_push_with_a_login_to_a_registry_of_today(
    stack: Stack, client: Client, soci: Run, made: Layout
) -> None:
    """--user opens the door, a wrong password does not; a registry that lists referrers itself gets no tag."""
    target = single(made)
    built = image.Image(made.folder, target["digest"], made.json(target["digest"]))
    image.push(built, stack.registry, "push/login", "1")
    taken: dict[str, bytes] = {}

    async def manners(request: web.Request) -> web.StreamResponse | None:
        if request.headers.get("Authorization") != LOGIN:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="test"'})
        if "/referrers/" in request.path:
            return web.json_response(
                {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}, content_type=OCI_INDEX
            )
        if request.method == "PUT" and "/manifests/" in request.path:
            taken[request.path.rpartition("/")[2]] = await request.read()
            return web.Response(status=201, headers={"OCI-Subject": target["digest"]})
        return None

    async with front(stack.registry, manners) as registry:
        name = f"{registry.address}/push/login:1"
        await put(client, made, name, target)
        digest = soci("create", "-q", *ALL, name).stdout.strip()
        refused = await asyncio.to_thread(soci, "push", "--user", "me:wrong", name, fails=True)
        assert "refuses the credentials" in refused.stderr
        assert "secret" not in refused.stderr
        done = await asyncio.to_thread(soci, "push", "-q", "--plain-http", "--user", "me:secret", name)
    assert done.stdout == f"{digest}\n"
    assert list(taken) == [digest]
    assert sha256_digest(taken[digest]) == digest
    blobs = [path for method, path, _ in registry.seen if method == "PUT" and "/blobs/uploads/" in path]
    assert len(blobs) == 3
