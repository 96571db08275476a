# SPDX-License-Identifier: Apache-2.0
"""Lazy pulls on a node without containerd: images of one layer, their truth, and Prepare as containerd calls it.

The rest is real: snapshotter, mounter, fetchers, NATS, the registry, overlayfs above the FUSE mount.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import os
import random
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soci.build import ZtocBuilder
from soci.digest import Digest, sha256_digest
from soci.index import SOCI_INDEX_V1, SociIndex, encode_index, ztoc_entry
from soci.oci import OCI_MANIFEST, Descriptor
from soci_dev import image
from soci_dev.stack import Stack
from soci_dev.tarball import member
from soci_registry import NoCredentials, Registry, RegistrySettings
from support.snapshotter import Calls, code_of, mounted
from support.truth import check_cache

FILES = 6
FILE_BYTES = 256 << 10
SPAN_BYTES = 64 << 10
READERS = 4
PIECE = 4096
SERVICES = ("mounter", "fetcher", "snapshotter")
SETTINGS = """\
[sociable]
no_regret = false
read_deadline_sec = {deadline}
mount_mode = "{mode}"
[http]
ResponseHeaderTimeoutMsec = 500
RequestTimeoutMsec = 1000
[background_fetch]
disable = true
"""
"""One try of a request is short, and only what is read is fetched."""
MODE = os.environ.get("SOCIABLE_MOUNT_MODE", "fuse")
_CRI = "containerd.io/snapshot/cri."


@dataclass(frozen=True)
class Pushed:
    """An image of one gzip layer with `FILES` files in ``/data``, in a registry together with a SOCI index."""

    built: image.Image
    ztoc: Digest
    ztoc_bytes: bytes = field(repr=False)
    tar: bytes = field(repr=False)
    files: tuple[bytes, ...] = field(repr=False)
    name: str  # repository and tag

    @property
    def layer(self) -> Digest:
        """The layer's digest."""
        return Digest(self.built.layers[0]["digest"])


def content(seed: int, size: int = FILE_BYTES) -> bytes:
    """Bytes of which gzip makes about half, the same each time for one seed."""
    source = random.Random(seed)
    return b"".join(source.randbytes(PIECE) * 2 for _ in range(size // PIECE // 2))


def push(host: str, folder: Path, *, files: int = FILES, size: int = FILE_BYTES) -> Pushed:
    """An image that no other test has."""
    seed, name = secrets.randbits(40), "faults/" + secrets.token_hex(6)
    contents = tuple(content(seed + number, size) for number in range(files))
    members = [member("data", b"5", mode=0o755)]
    members += [member(f"data/{number}", content=data) for number, data in enumerate(contents)]
    built = image.write_image(folder, [image.add_layer(folder, members)])
    image.push(built, host, name, "1")
    digest = Digest(built.layers[0]["digest"])
    blob = (folder / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()
    builder = ZtocBuilder("gzip", SPAN_BYTES)
    builder.feed(blob)
    ztoc = builder.finish().ztoc_bytes
    asyncio.run(_push_index(f"{host}/{name}:1", built, ztoc))
    return Pushed(built, sha256_digest(ztoc), ztoc, gzip.decompress(blob), contents, f"{name}:1")


async def _push_index(reference: str, built: image.Image, ztoc: bytes) -> None:
    first = built.layers[0]
    layer = Descriptor(first["mediaType"], Digest(first["digest"]), int(first["size"]))
    manifest = (built.folder / "blobs" / "sha256" / built.digest.removeprefix("sha256:")).read_bytes()
    subject = Descriptor(OCI_MANIFEST, Digest(built.digest), len(manifest))
    entry = ztoc_entry(layer, sha256_digest(ztoc), len(ztoc), SPAN_BYTES)
    index = encode_index(SociIndex.v1((entry,), subject))
    async with Registry(settings=RegistrySettings(), credentials=NoCredentials()) as registry:
        repository = registry.repository(reference)
        for blob in (b"{}", ztoc):
            await repository.push_blob(blob)
        await repository.push_manifest(index, OCI_MANIFEST, sha256_digest(index))
        listed = Descriptor(OCI_MANIFEST, sha256_digest(index), len(index), artifact_type=SOCI_INDEX_V1)
        await repository.attach_referrer_tag(subject.digest, listed)


def node(make_stack: Callable[..., Stack], deadline: float, **options: Any) -> Node:
    """A node whose reads may take ``deadline`` seconds."""
    settings = SETTINGS.format(deadline=deadline, mode=MODE)
    return Node(make_stack(services=SERVICES, containerd=False, settings=settings, **options))


@dataclass
class Node:
    """A stack without containerd, and what its cache must hold."""

    stack: Stack
    tars: dict[Digest, bytes] = field(default_factory=dict, repr=False)

    def pull(self, host: str, pushed: Pushed, *, lazy: bool = True) -> str:
        """Prepare the image's layer as containerd does, its registry reached by ``host``; the layer's chain id.

        We must have brought it: lazily, or whole where ``lazy`` is False.
        """
        self.tars[pushed.layer] = pushed.tar
        chain = sha256_digest(pushed.tar)  # of one layer: its diff_id
        labels = {
            "containerd.io/snapshot.ref": chain,
            f"{_CRI}image-ref": f"{host}/{pushed.name}",
            f"{_CRI}manifest-digest": pushed.built.digest,
            f"{_CRI}layer-digest": pushed.layer,
        }
        with closing(Calls(self.stack.snapshotter_address)) as calls:
            key = f"k8s.io/1/extract-{secrets.token_hex(4)} {chain}"
            code = code_of(lambda: calls.prepare(key, labels=labels))
        how = self.stack.daemons["snapshotter"].output().splitlines()[-1]
        assert code == "ALREADY_EXISTS", how
        assert (pushed.layer in self.here()) == lazy, how
        return chain

    @contextmanager
    def rootfs(self, chain: str) -> Iterator[Path]:
        """The layer under an overlay of its own, as a container sees it; its ``data`` folder."""
        key = f"look-{secrets.token_hex(4)}"
        with closing(Calls(self.stack.snapshotter_address)) as calls:
            (name,) = [one.name for one in calls.list() if one.labels.get("containerd.io/snapshot.ref") == chain]
            mounts = calls.prepare(key, name)
            try:
                with mounted(mounts) as target:
                    yield target / "data"
            finally:
                with suppress(Exception):  # a snapshotter that a test killed says nothing of the test
                    calls.remove(key)

    def here(self) -> dict[Digest, list[int]]:
        """The spans that are in the cache, all of them right."""
        return check_cache(self.stack.root / "cache", self.tars)

    def alive(self) -> None:
        """No process has ended."""
        ended = {
            name: daemon.returncode for name, daemon in self.stack.daemons.items() if daemon.returncode is not None
        }
        assert not ended

    def read_peak(self, name: str) -> int:
        """The most memory in bytes that a process had since `forget_peak`, as the kernel counts resident pages."""
        return _status(self.stack.daemons[name].pid, "VmHWM")

    def forget_peak(self, name: str) -> int:
        """Begin to look for a peak; the memory that the process has now."""
        pid = self.stack.daemons[name].pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak
        return _status(pid, "VmRSS")


def _status(pid: int, key: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def read(data: Path, number: int) -> bytes:
    """A file's bytes by plain reads."""
    return (data / str(number)).read_bytes()


def read_tree(data: Path) -> tuple[bytes, ...]:
    """All files, several at a time, in the order of their numbers."""
    names = sorted(data.iterdir(), key=lambda path: int(path.name))
    with ThreadPoolExecutor(READERS) as readers:
        return tuple(readers.map(Path.read_bytes, names))


def drop_pages(data: Path) -> None:
    """Have the kernel forget what it cached of all files, as a reboot would: the next read asks us."""
    for path in data.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fails(data: Path, number: int) -> bool:
    """Whether reading the file ends with EIO; any other error is raised."""
    try:
        read(data, number)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return True
    return False
