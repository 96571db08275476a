# SPDX-License-Identifier: Apache-2.0
"""`soci convert` against a real containerd and registry, and from file to file without root's capabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from soci.digest import parse_digest, sha256_digest
from soci.index import SOCI_INDEX_V2, parse_index
from soci.oci import Descriptor
from soci_containerd import Client, Image, connect
from soci_dev import image
from soci_dev.stack import Stack
from support.layouts import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, Json, Layout, pack, unpack

COMMAND_SECONDS = 60.0
SMALL = ("--min-layer-size", "0", "--span-size", "65536")


@pytest.fixture(scope="module")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """One of our own: these tests look at all that containerd holds."""
    return make_stack(services=())


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with connect(str(stack.containerd_address), stack.namespace) as connected:
        await connected.ensure_namespace()
        yield connected


@pytest.fixture
def soci(stack: Stack, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `soci` with a root folder of the test's own; fails where the command does, unless ``fails``."""

    def run(*words: str, fails: bool = False, store: str = "containerd") -> subprocess.CompletedProcess[str]:
        flags = ("--root", str(tmp_path / "root"), "--content-store", store)
        command = stack.soci_command(*flags, *words)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def made(tmp_path: Path) -> Layout:
    folder = tmp_path / "source"
    folder.mkdir()
    return Layout(folder)


def multi_platform(made: Layout, name: str, media_type: str = OCI_INDEX, seed: int = 1) -> Json:
    """An image for two platforms with an attestation, in a finished layout; its target."""
    base = made.layer(seed, 300_000)
    entries = [
        made.image(architecture, [base, made.layer(seed + number, 200_000)], docker=media_type == DOCKER_LIST)
        for number, architecture in enumerate(("amd64", "arm64"), 1)
    ]
    if media_type == OCI_INDEX:
        entries.append(made.attestation(entries[0]))
    index = made.index(entries, media_type)
    made.finish({**index, "annotations": {"io.containerd.image.name": name}})
    return index


async def blob(client: Client, digest: str) -> bytes:
    content = await client.content.read(parse_digest(digest))
    assert sha256_digest(content) == digest
    return content


async def document(client: Client, digest: str) -> Json:
    found: Json = json.loads(await blob(client, digest))
    return found


async def whole(client: Client, target: str) -> list[Json]:
    """The entries of a converted image, every blob of which is in containerd."""
    entries: list[Json] = (await document(client, target))["manifests"]
    for entry in entries:
        manifest = await document(client, entry["digest"])
        for part in (manifest["config"], *manifest["layers"]):
            await blob(client, part["digest"])
    return entries


async def collected(client: Client) -> None:
    """containerd has collected garbage."""
    content = b"nobody's"
    await client.images.put(Image("gc", await _put(client, content)))
    await client.images.delete("gc", sync=True)


async def _put(client: Client, content: bytes) -> Descriptor:
    descriptor = Descriptor("text/plain", sha256_digest(content), len(content))
    async with client.lease("test") as leased:
        await leased.content.write(descriptor, content, {})
    return descriptor


def in_registry(stack: Stack, repository: str, target: str, kind: str = "manifests") -> bytes:
    """A manifest or blob as the registry has it, compared with its digest."""
    url = f"http://{stack.registry}/v2/{repository}/{kind}/{target}"
    answer = httpx.get(url, headers={"Accept": f"{OCI_INDEX}, {OCI_MANIFEST}"}, trust_env=False, follow_redirects=True)
    answer.raise_for_status()
    if target.startswith("sha256:"):
        assert sha256_digest(answer.content) == target
    return answer.content


def check_registry(stack: Stack, repository: str, tag: str, target: str) -> list[Json]:
    """The image is in the registry as it was in containerd, down to the last blob; its entries."""
    index = in_registry(stack, repository, tag)
    assert sha256_digest(index) == target
    entries: list[Json] = json.loads(index)["manifests"]
    for entry in entries:
        manifest = json.loads(in_registry(stack, repository, entry["digest"]))
        for part in (manifest["config"], *manifest["layers"]):
            in_registry(stack, repository, part["digest"], "blobs")
    return entries


@pytest.mark.root
async def test_an_image_of_one_manifest(stack: Stack, client: Client, made: Layout, soci) -> None:  # type: ignore[no-untyped-def]
    """A pulled image becomes an index of itself and its SOCI index; the old name still stands for the old image."""
    base, top = made.layer(11, 300_000), made.layer(12, 200_000)
    built = image.write_image(made.folder, [base, top])
    source = image.push(built, stack.registry, "convert/single", "1")
    destination = f"{stack.registry}/convert/single:2"
    soci("pull", "--plain-http", "--snapshotter", "overlayfs", source)
    done = soci("convert", *SMALL, source, destination)
    target = (await client.images.get(destination)).target
    assert done.stderr.splitlines()[-1].startswith(f"{destination}: {target.digest}, with SOCI indexes for linux/")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert sorted(line.split(" -> ")[0] for line in lines) == sorted(f"layer {one.digest}" for one in (base, top))
    shown, index = await whole(client, target.digest)
    assert (target.media_type, index["artifactType"]) == (OCI_INDEX, SOCI_INDEX_V2)
    parsed = parse_index(await blob(client, index["digest"]))
    assert [entry.layer for entry in parsed.layers] == [base.digest, top.digest]
    assert [entry.span_size for entry in parsed.layers] == [65536, 65536]
    assert shown["annotations"] == {"com.amazon.soci.index-digest": index["digest"]}
    assert (await client.images.get(source)).target.digest == built.digest

    again = soci("convert", "--quiet", *SMALL, source, destination)
    assert again.stdout == f"{target.digest}\n"
    reused = soci("convert", *SMALL, destination, destination)
    assert all(line.endswith("(already exists)") for line in reused.stdout.splitlines())
    assert (await client.images.get(destination)).target == target
    forced = soci("convert", "--force", *SMALL, destination, destination)
    assert not any(line.endswith("(already exists)") for line in forced.stdout.splitlines())
    assert (await client.images.get(destination)).target == target

    # One at a time: containerd 1.6 sends a blob of two manifests twice at once, and one of the two may break off.
    stack.ctr("images", "push", "--max-concurrent-uploaded-layers", "1", "--plain-http", destination)
    check_registry(stack, "convert/single", "2", target.digest)


@pytest.mark.root
@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST], ids=["oci", "docker"])
async def test_an_image_of_several_platforms(  # type: ignore[no-untyped-def]
    stack: Stack, client: Client, made: Layout, tmp_path: Path, soci, media_type: str
) -> None:
    """All platforms are converted, pushed with an ordinary client, and valid in the registry."""
    kind = "oci" if media_type == OCI_INDEX else "docker"
    name, destination = f"{stack.registry}/convert/{kind}:1", f"{stack.registry}/convert/{kind}:soci"
    multi_platform(made, name, media_type, seed=20)
    stack.ctr("images", "import", "--all-platforms", str(pack(made.folder, tmp_path / "source.tar")))
    soci("convert", "--all-platforms", *SMALL, name, destination)
    target = (await client.images.get(destination)).target.digest
    stack.ctr("images", "push", "--max-concurrent-uploaded-layers", "1", "--plain-http", destination)
    entries = check_registry(stack, f"convert/{kind}", "soci", target)
    indexes = [entry for entry in entries if entry.get("artifactType") == SOCI_INDEX_V2]
    assert [entry["platform"]["architecture"] for entry in indexes] == ["amd64", "arm64"]
    images = {entry["digest"]: entry for entry in entries}
    for index in indexes:
        shown = images[index["annotations"]["com.amazon.soci.image-manifest-digest"]]
        manifest = json.loads(in_registry(stack, f"convert/{kind}", shown["digest"]))
        assert manifest["annotations"]["com.amazon.soci.index-digest"] == index["digest"]
        assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    for entry in entries:
        if "vnd.docker.reference.type" in entry.get("annotations", {}):
            assert entry["annotations"]["vnd.docker.reference.digest"] in images


@pytest.mark.root
async def test_the_collector_keeps_what_the_image_needs(  # type: ignore[no-untyped-def]
    stack: Stack, client: Client, made: Layout, tmp_path: Path, soci
) -> None:
    """With the source gone the converted image is whole; with both gone, nothing is left of either."""
    name, destination = "example.com/gc/source:1", "example.com/gc/soci:1"
    source = multi_platform(made, name, seed=30)
    stack.ctr("images", "import", "--all-platforms", str(pack(made.folder, tmp_path / "source.tar")))
    soci("convert", "--platform", "linux/arm64", "-p", "linux/amd64", *SMALL, name, destination)
    await client.images.delete(name, sync=True)
    assert not await client.content.exists(parse_digest(source["digest"]))
    target = (await client.images.get(destination)).target.digest
    entries = await whole(client, target)
    assert len(entries) == 5
    await client.images.delete(destination, sync=True)
    for entry in entries:
        assert not await client.content.exists(parse_digest(entry["digest"]))


@pytest.mark.root
async def test_artifacts_in_our_own_store(  # type: ignore[no-untyped-def]
    stack: Stack, client: Client, made: Layout, tmp_path: Path, soci
) -> None:
    """With ``--content-store soci`` the artifacts are below the root, and the image in containerd is whole too."""
    name, destination = "example.com/own/source:1", "example.com/own/soci:1"
    multi_platform(made, name, seed=40)
    stack.ctr("images", "import", "--all-platforms", str(pack(made.folder, tmp_path / "source.tar")))
    soci("convert", "--platform", "linux/amd64", *SMALL, name, destination, store="soci")
    target = (await client.images.get(destination)).target.digest
    entries = await whole(client, target)
    index = next(entry for entry in entries if entry.get("artifactType") == SOCI_INDEX_V2)
    own = Layout(tmp_path / "root" / "content")
    for part in own.json(index["digest"])["layers"]:
        assert own.read(part["digest"])
    await collected(client)
    await whole(client, target)


@pytest.mark.root
def test_what_cannot_be_converted(stack: Stack, made: Layout, tmp_path: Path, soci) -> None:  # type: ignore[no-untyped-def]
    """Bad names, absent images and platforms, sizes and layers that are too small say what is wrong, exit code 1."""
    name = "example.com/bad/source:1"
    multi_platform(made, name, seed=50)
    stack.ctr("images", "import", "--all-platforms", str(pack(made.folder, tmp_path / "source.tar")))
    digest = "sha256:" + "0" * 64
    for words, said in (
        ((name, "example.com/bad/soci"), "the destination image must be a tagged ref"),
        ((name, f"example.com/bad/soci@{digest}"), "the destination image must be a tagged ref"),
        ((name, f"example.com/bad/soci:1@{digest}"), "the destination image must be a tagged ref"),
        (("example.com/none:1", "example.com/bad/soci:1"), "example.com/none:1"),
        (("--platform", "linux/s390x", name, "example.com/bad/soci:1"), "no image for linux/s390x"),
        ((name, "example.com/bad/soci:1"), "no ztocs created"),
        (("--optimizations", "speed", name, "example.com/bad/soci:1"), "speed"),
    ):
        done = soci("convert", *words, fails=True)
        assert (done.returncode, done.stdout.count("->")) == (1, 0)
        assert said in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].startswith("soci: ")
    assert "example.com/bad/soci" not in stack.ctr("images", "ls", "-q").stdout
    for words in (("--span-size", "-1"), ("--min-layer-size", str(1 << 63)), ("--format", "oci-dir")):
        assert soci("convert", *words, name, "example.com/bad/soci:1", fails=True).returncode in (1, 2)
    assert stack.ctr("leases", "ls", "-q").stdout == ""


@pytest.fixture
def anybody() -> Iterator[tuple[Path, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A folder, and a way to run `soci` in it without root's capabilities and without containerd."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "soci_cli", "--address", "/nowhere", "--root", "/nowhere/root", "convert"]
            return subprocess.run(
                [*bare, *command, "--standalone", *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=COMMAND_SECONDS,
                cwd=folder,
            )

        yield folder, run


def test_from_file_to_file(made: Layout, anybody) -> None:  # type: ignore[no-untyped-def]
    """Directory and tar, in and out, need neither containerd nor rights, and agree; again changes nothing."""
    folder, run = anybody
    multi_platform(made, "example.com/files:1", seed=60)
    pack(made.folder, folder / "source.tar")
    unpack(folder / "source.tar", folder / "source")
    for source, out, words in (
        ("source.tar", "one.tar", ()),
        ("source", "two.tar", ("--format", "oci-archive")),
        ("source", "three", ("--format", "oci-dir")),
        ("three", "four.tar", ()),
        ("one.tar", "one.tar", ()),
    ):
        done = run("--all-platforms", *SMALL, *words, source, out)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1].endswith("with SOCI indexes for linux/amd64, linux/arm64")
    tars = [(folder / name).read_bytes() for name in ("one.tar", "two.tar", "four.tar")]
    assert tars[0] == tars[1] == tars[2]
    three = Layout(folder / "three")
    assert three.top() == unpack(folder / "one.tar", folder / "unpacked").top()
    assert three.top()["annotations"] == {"io.containerd.image.name": "example.com/files:1"}
    kinds = [entry.get("artifactType") for entry in three.json(three.top()["digest"])["manifests"]]
    assert kinds == [None, None, None, SOCI_INDEX_V2, SOCI_INDEX_V2]
    quiet = run("--quiet", "--platform", "linux/arm64", *SMALL, "source.tar", "five.tar")
    assert (quiet.stdout, quiet.stderr) == (unpack(folder / "five.tar", folder / "five").top()["digest"] + "\n", "")
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *("source.tar", "source", "one.tar", "two.tar", "three", "four.tar", "unpacked", "five.tar", "five")
    }


def test_bad_files(made: Layout, anybody) -> None:  # type: ignore[no-untyped-def]
    """What is no image layout is one line and exit code 1."""
    folder, run = anybody
    (folder / "text").write_text("no tar")
    (folder / "empty").mkdir()
    made.finish()
    pack(made.folder, folder / "none.tar")
    for source, said in (
        ("missing.tar", "missing.tar"),
        ("text", "text: "),
        ("empty", "not an OCI image layout: there is no oci-layout"),
        ("none.tar", "lists no manifests"),
    ):
        done = run(source, "out.tar")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("soci: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (folder / "out.tar").exists()


@pytest.mark.root
async def test_containerd_takes_what_was_converted_in_files(  # type: ignore[no-untyped-def]
    stack: Stack, client: Client, made: Layout, anybody, soci
) -> None:
    """A converted tar can be imported, and is the same image as what the same source becomes in containerd."""
    folder, run = anybody
    name, destination = "example.com/imported:1", "example.com/imported:soci"
    multi_platform(made, name, seed=70)
    pack(made.folder, folder / "source.tar")
    done = run("--quiet", "--all-platforms", *SMALL, "source.tar", "out.tar")
    assert done.returncode == 0, done.stderr
    stack.ctr("images", "import", "--all-platforms", str(folder / "source.tar"))
    assert soci("convert", "--quiet", "--all-platforms", *SMALL, name, destination).stdout == done.stdout
    stack.ctr("images", "rm", "--sync", name, destination)
    stack.ctr("images", "import", "--all-platforms", str(folder / "out.tar"))
    assert (await client.images.get(name)).target.digest == done.stdout.strip()
    await whole(client, done.stdout.strip())
