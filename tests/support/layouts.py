# SPDX-License-Identifier: Apache-2.0
"""OCI image layouts made document by document, so that a test can put anything into them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soci_dev import image
from soci_dev.tarball import member
from support.images import noise

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

Json = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """A layout that is being made in ``folder``."""

    folder: Path

    def put(self, value: object, media_type: str, **more: Any) -> Json:
        """Store a JSON document as it is, members in their order; its descriptor."""
        return self.blob(json.dumps(value, separators=(",", ":")).encode(), media_type, **more)

    def blob(self, content: bytes, media_type: str, **more: Any) -> Json:
        """Store bytes; their descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / "blobs" / "sha256" / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content), **more}

    def layer(self, seed: int, size: int = 20_000) -> image.Layer:
        """A gzip layer with one file of noise."""
        return image.add_layer(self.folder, [member(f"file-{seed}", content=noise(seed, size))])

    def image(
        self,
        architecture: str,
        layers: Sequence[image.Layer],
        *,
        docker: bool = False,
        platform: bool = True,
        manifest_more: Json | None = None,
        **more: Any,
    ) -> Json:
        """One platform's image; its descriptor with the platform."""
        config = {
            "architecture": architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.put(config, DOCKER_CONFIG if docker else OCI_CONFIG),
            "layers": [
                {
                    "mediaType": DOCKER_LAYER if docker else layer.media_type,
                    "digest": layer.digest,
                    "size": layer.size,
                }
                for layer in layers
            ],
            **(manifest_more or {}),
        }
        if platform:
            more = {"platform": {"architecture": architecture, "os": "linux"}, **more}
        return self.put(manifest, media_type, **more)

    def attestation(self, subject: Json) -> Json:
        """What BuildKit adds for ``subject``: an indented manifest, tied to it by the entry's annotations."""
        digest = {"sha256": subject["digest"].removeprefix("sha256:")}
        claim = {"_type": "https://in-toto.io/Statement/v0.1", "subject": [{"name": "_", "digest": digest}]}
        statement = self.put(claim, "application/vnd.in-toto+json")
        config = {
            "architecture": "unknown",
            "os": "unknown",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": []},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.put(config, OCI_CONFIG),
            "layers": [statement],
        }
        return self.blob(
            json.dumps(manifest, indent=2).encode(),
            OCI_MANIFEST,
            annotations={
                "vnd.docker.reference.digest": subject["digest"],
                "vnd.docker.reference.type": "attestation-manifest",
            },
            platform={"architecture": "unknown", "os": "unknown"},
        )

    def index(self, entries: Sequence[Json], media_type: str = OCI_INDEX, **more: Any) -> Json:
        """An image index; its descriptor."""
        document = {"schemaVersion": 2, "mediaType": media_type, "manifests": list(entries), **more}
        return self.put(document, media_type)

    def finish(self, *entries: Json) -> Path:
        """Write ``oci-layout`` and ``index.json``."""
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(entries)}))
        return self.folder

    def remove(self, digest: str) -> None:
        """Take a blob away."""
        self._path(digest).unlink()

    def read(self, digest: str) -> bytes:
        """A blob's bytes, compared with the digest."""
        content = self._path(digest).read_bytes()
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
        return content

    def json(self, digest: str) -> Json:
        """A blob's JSON."""
        found: Json = json.loads(self.read(digest))
        return found

    def top(self) -> Json:
        """The only entry of ``index.json``."""
        (entry,) = json.loads((self.folder / "index.json").read_bytes())["manifests"]
        found: Json = entry
        return found

    def _path(self, digest: str) -> Path:
        return self.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


def unpack(archive: Path, folder: Path) -> Layout:
    """A layout's tar, unpacked."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return Layout(folder)


def pack(folder: Path, archive: Path) -> Path:
    """A layout as a tar with ``./`` before its names, as tar(1) makes them."""
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, ".")
    return archive
