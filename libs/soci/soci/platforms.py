# SPDX-License-Identifier: Apache-2.0
"""Platforms of images: ``os/architecture[/variant]`` (OCI image-spec, image-index.md "platform")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from soci.errors import InvalidInput

_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_ARCHITECTURES: Final = {  # other names in use, to Go's architecture and, where the name says it, the variant
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
_SAME_VARIANTS: Final = {  # each architecture's baseline, however it is spelled
    ("amd64", "v1"): "",
    ("arm64", "8"): "",
    ("arm64", "v8"): "",
    ("arm", ""): "v7",
    ("arm", "5"): "v5",
    ("arm", "6"): "v6",
    ("arm", "7"): "v7",
    ("arm", "8"): "v8",
}


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on. ``str()`` gives ``os/architecture[/variant]``."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""  # Windows only; kept for re-writing, never compared
    os_features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def normalized(self) -> Platform:
        """The same platform by its usual name: ``linux/aarch64`` and ``linux/arm64/v8`` are ``linux/arm64``."""
        architecture = self.architecture.lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = self.variant.lower() or implied
        variant = _SAME_VARIANTS.get((architecture, variant), variant)
        system = self.os.lower()
        return Platform("darwin" if system == "macos" else system, architecture, variant)

    def matches(self, other: Platform) -> bool:
        """Whether both name one operating system, architecture and variant."""
        return self.normalized() == other.normalized()


def parse_platform(text: str) -> Platform:
    """``os/architecture[/variant]`` as a normalized `Platform`; raises `InvalidInput`."""
    parts = text.split("/") if len(text) <= 200 else []
    if len(parts) not in (2, 3) or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidInput(f"not a platform (os/architecture or os/architecture/variant): {text[:80]!r}")
    variant = parts[2] if len(parts) == 3 else ""
    return Platform(parts[0], parts[1], variant).normalized()
