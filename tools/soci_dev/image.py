# SPDX-License-Identifier: Apache-2.0
"""Builds OCI images without an engine: layers from tar members, an image layout on disk, a push by plain HTTP.

An image is a folder in the OCI image layout; blobs are deterministic, so the same members give the same digests.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, Protocol, cast

import httpx
import zstandard

from soci.errors import Unavailable
from soci_dev.tarball import Member, members_of

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_ZSTD: Final = "application/vnd.oci.image.layer.v1.tar+zstd"
LAYER_TAR: Final = "application/vnd.oci.image.layer.v1.tar"
GZIP_LEVEL: Final = 6
"""What Docker and most builders use."""
ZSTD_LEVEL: Final = 3

Compression = Literal["gzip", "zstd", "none"]

_GZIP_WINDOW: Final = 31  # zlib: 15 bits of window, gzip framing; its header carries no time and no name
_CHUNK: Final = 1 << 20
_EPOCH: Final = "1970-01-01T00:00:00Z"
_PUSH_TIMEOUT_S: Final = 120.0
_SKIPPABLE: Final = 0x184D2A50  # a frame of the zstd format (RFC 8878 §3.1.2) that holds no data
_MEDIA_TYPES: Final[Mapping[Compression, str]] = {"gzip": LAYER_GZIP, "zstd": LAYER_ZSTD, "none": LAYER_TAR}
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in a layout. ``digest`` and ``size`` are of the blob as pushed, ``diff_id`` of the tar."""

    digest: str
    size: int
    diff_id: str
    media_type: str
    created_by: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image in layout ``folder``; ``size`` is the sum of its layers' blobs in bytes."""

    folder: Path
    digest: str
    manifest: Mapping[str, Any]

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """The manifest's layer descriptors, the base first."""
        return cast("list[Mapping[str, Any]]", self.manifest["layers"])

    @property
    def size(self) -> int:
        """Bytes of all layer blobs."""
        return sum(int(layer["size"]) for layer in self.layers)


def architecture() -> str:
    """This machine's architecture in Go's words, as images name it."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def add_layer(
    folder: Path,
    members: Iterable[Member],
    *,
    created_by: str = "",
    gzip: bool = True,
    compression: Compression | None = None,
    frame_bytes: int = 0,
) -> Layer:
    """Write a layer's blob into layout ``folder``, streaming.

    ``compression`` goes before ``gzip``. A zstd layer is one frame, or with ``frame_bytes`` a frame for every so many
    bytes of the tar, and a skippable frame behind them: how layers in the form zstd:chunked look from outside.
    """
    kind: Compression = compression or ("gzip" if gzip else "none")
    blobs = _blobs(folder)
    with tempfile.NamedTemporaryFile(dir=blobs, prefix=".layer-", delete=False) as file:
        sink = _Sink(file, _compressor(kind, frame_bytes))
        with tarfile.open(fileobj=cast("IO[bytes]", sink), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as tar:
            for info, content in members:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        tar.addfile(info, source)
                else:
                    tar.addfile(info, None if content is None else io.BytesIO(content))
        size = sink.finish()
    digest = f"sha256:{sink.blob.hexdigest()}"
    Path(file.name).rename(blobs / digest.removeprefix("sha256:"))
    return Layer(digest, size, f"sha256:{sink.tar.hexdigest()}", _MEDIA_TYPES[kind], created_by)


def add_tree(folder: Path, tree: Path, *, overlay: bool = False, created_by: str = "") -> Layer:
    """`add_layer` of a directory tree, or of an overlayfs upper directory."""
    return add_layer(folder, members_of(tree, overlay=overlay), created_by=created_by)


def write_image(
    folder: Path,
    layers: Sequence[Layer],
    *,
    entrypoint: Sequence[str] = (),
    cmd: Sequence[str] = (),
    env: Sequence[str] = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",),
    working_dir: str = "/",
    user: str = "",
) -> Image:
    """Write config, manifest and the layout's index; the layers must be in ``folder`` already."""
    settings = {"Entrypoint": list(entrypoint), "Cmd": list(cmd), "Env": list(env), "WorkingDir": working_dir}
    config = {
        "created": _EPOCH,
        "architecture": architecture(),
        "os": "linux",
        "config": {**settings, "User": user} if user else settings,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": _EPOCH, "created_by": layer.created_by} for layer in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _put(folder, CONFIG, config),
        "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers],
    }
    descriptor = _put(folder, MANIFEST, manifest)
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    # Last: a layout without its index is an unfinished one.
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    return Image(folder, descriptor["digest"], manifest)


def read_image(folder: Path) -> Image | None:
    """The image of a finished layout, or None."""
    try:
        digest = str(json.loads((folder / "index.json").read_bytes())["manifests"][0]["digest"])
        return Image(folder, digest, json.loads(_blob(folder, digest).read_bytes()))
    except FileNotFoundError:
        return None


def push(
    image: Image,
    registry: str,
    repository: str,
    tag: str = "latest",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> str:
    """Push to ``registry`` (``host:port``, plain HTTP); returns the reference ``host:port/repository:tag``.

    ``progress`` is told how many bytes of layers are there, of how many. Raises `Unavailable`.
    """
    base = f"http://{registry}/v2/{repository}"
    done = 0
    try:
        with httpx.Client(timeout=_PUSH_TIMEOUT_S, trust_env=False) as client:
            for descriptor in [image.manifest["config"], *image.layers]:
                _push_blob(client, base, image.folder, descriptor["digest"])
                done += int(descriptor["size"]) if descriptor in image.layers else 0
                progress(done, image.size)
            body = _blob(image.folder, image.digest).read_bytes()
            answer = client.put(f"{base}/manifests/{tag}", content=body, headers={"Content-Type": MANIFEST})
            answer.raise_for_status()
    except httpx.HTTPError as error:
        raise Unavailable(f"push of {repository}:{tag} to {registry}: {error}") from error
    return f"{registry}/{repository}:{tag}"


def _push_blob(client: httpx.Client, base: str, folder: Path, digest: str) -> None:
    if client.head(f"{base}/blobs/{digest}").status_code == httpx.codes.OK:
        return
    begun = client.post(f"{base}/blobs/uploads/")
    begun.raise_for_status()
    target = begun.request.url.join(begun.headers["Location"]).copy_merge_params({"digest": digest})
    blob = _blob(folder, digest)
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.stat().st_size)}
    client.put(target, content=_chunks(blob), headers=headers).raise_for_status()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _put(folder: Path, media_type: str, value: object) -> dict[str, Any]:
    data = json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    (_blobs(folder) / digest.removeprefix("sha256:")).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _blobs(folder: Path) -> Path:
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    return blobs


def _blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Uncompressed:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _Chunked:
    """zstd, a frame for every ``frame_bytes`` of what comes in."""

    def __init__(self, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self._left = frame_bytes
        self._zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        self._frame = self._zstd.compressobj()

    def compress(self, data: bytes, /) -> bytes:
        out = []
        while data:
            part, data = data[: self._left], data[self._left :]
            out.append(self._frame.compress(part))
            self._left -= len(part)
            if not self._left:
                out.append(self._frame.flush())
                self._frame, self._left = self._zstd.compressobj(), self._frame_bytes
        return b"".join(out)

    def flush(self) -> bytes:
        last = self._frame.flush() if self._left < self._frame_bytes else b""
        about = b"what a reader of such layers would look for"
        return last + struct.pack("<II", _SKIPPABLE, len(about)) + about


def _compressor(kind: Compression, frame_bytes: int) -> _Compressor:
    if kind == "gzip":
        return zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    if kind == "none":
        return _Uncompressed()
    return _Chunked(frame_bytes) if frame_bytes else zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()


class _Sink:
    """What tarfile writes to: hashes the tar, compresses, hashes and writes the blob."""

    def __init__(self, file: IO[bytes], compressor: _Compressor) -> None:
        self.tar = hashlib.sha256()
        self.blob = hashlib.sha256()
        self._file = file
        self._size = 0
        self._compressor = compressor

    def write(self, data: bytes) -> int:
        self.tar.update(data)
        self._out(self._compressor.compress(data))
        return len(data)

    def finish(self) -> int:
        self._out(self._compressor.flush())
        return self._size

    def _out(self, data: bytes) -> None:
        self.blob.update(data)
        self._size += self._file.write(data)
