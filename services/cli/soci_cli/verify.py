# SPDX-License-Identifier: Apache-2.0
"""``soci index verify``: prove an image's SOCI index, whoever made it, against the layers in the registry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from soci.digest import Digest, parse_digest
from soci.errors import InvalidManifest
from soci.oci import Descriptor, Manifest, Platform, choose_platform, parse_manifest, parse_platform
from soci.reference import Reference, parse_reference
from soci_cli.border import FAILED, run_command
from soci_cli.pull import open_registry
from soci_cli.tables import indented
from soci_cli.values import DEFAULT_PLATFORM, Globals, human_bytes
from soci_indexing.discovery import Located, locate
from soci_indexing.verify import LayerVerdict, Verdict, verify_index
from soci_registry import Registry, Repository
from soci_registry.content import RegistryContent


@dataclass(frozen=True, slots=True)
class Proof:
    """What was looked at, and what was found."""

    image: str
    manifest: Digest
    located: Located
    verdict: Verdict


async def verify(
    registry: Registry,
    reference: Reference,
    platform: Platform,
    index: Digest | None,
    report: Callable[[LayerVerdict], None],
) -> Proof:
    """Find the image's index as a node would, and prove it. Raises `NoIndex` where there is none."""
    repository = registry.repository(reference)
    subject, manifest = await _manifest(repository, reference, platform)
    located = await locate(repository, str(reference), subject.digest, index, v1=True, v2=True)
    verdict = await verify_index(RegistryContent(repository), subject, manifest, located.index, report)
    return Proof(str(reference), subject.digest, located, verdict)


async def _manifest(repository: Repository, reference: Reference, platform: Platform) -> tuple[Descriptor, Manifest]:
    fetched = await repository.manifest(reference.target)
    parsed = parse_manifest(fetched.content)
    if not isinstance(parsed, Manifest):
        fetched = await repository.manifest(choose_platform(parsed, platform).digest)
        parsed = parse_manifest(fetched.content)
    if not isinstance(parsed, Manifest):
        raise InvalidManifest(f"{reference}: an image index inside an image index")
    return Descriptor(fetched.media_type, fetched.digest, len(fetched.content)), parsed


def layer_line(found: LayerVerdict) -> str:
    """One line of progress."""
    line = f"layer {found.layer.digest[:19]}  {human_bytes(found.layer.size):>10}  "
    if found.ztoc is None:
        return line + "no zTOC: it comes whole"
    if found.defects:
        count = len(found.defects) + found.more
        return line + (f"{count} defects" if count > 1 else "1 defect")
    return line + f"proven: {found.algorithm}, {found.spans} spans, {found.members} members"


def as_json(proof: Proof) -> dict[str, Any]:
    """The answer of ``--json``."""
    verdict = proof.verdict
    return {
        "image": proof.image,
        "manifest": proof.manifest,
        "index": verdict.index,
        "version": verdict.version or None,
        "found_by": proof.located.found_by,
        "proven": verdict.proven,
        "layers": [
            {
                "layer": layer.layer.digest,
                "size": layer.layer.size,
                "ztoc": layer.ztoc.digest if layer.ztoc else None,
                "compression": layer.algorithm or None,
                "spans": layer.spans,
                "members": layer.members,
                "defects": len(layer.defects) + layer.more,
            }
            for layer in verdict.layers
        ],
        "defects": [
            {"layer": defect.layer, "place": defect.place, "text": defect.text} for defect in verdict.all_defects
        ],
    }


@click.command("verify")
@click.argument("image")
@click.option("--platform", default=DEFAULT_PLATFORM, show_default=True, help="os/architecture[/variant].")
@click.option("--index", default="", metavar="DIGEST", help="Prove this index, whatever the image says.")
@click.option("--plain-http", is_flag=True, help="Speak HTTP to the image's registry.")
@click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(  # noqa: PLR0913  one parameter a flag
    flags: Globals, image: str, platform: str, index: str, *, plain_http: bool, json_output: bool
) -> int:
    """Prove the SOCI index of IMAGE against its layers, streamed from the registry.

    Every span and every entry of the tables of contents is compared with what the layers hold. The exit status is 0
    where all of it is right; else 1, with each defect on a line.
    """
    reference, wanted = parse_reference(image), parse_platform(platform)
    digest = parse_digest(index) if index else None

    def report(found: LayerVerdict) -> None:
        if not json_output:
            print(layer_line(found), file=sys.stderr, flush=True)

    async def work() -> Proof:
        async with open_registry(reference, plain_http=plain_http) as registry:
            return await verify(registry, reference, wanted, digest, report)

    proof = run_command(work, flags)
    if json_output:
        print(indented(as_json(proof)))
    else:
        _print(proof)
    return 0 if proof.verdict.proven else FAILED


def _print(proof: Proof) -> None:
    for defect in proof.verdict.all_defects:
        print(defect)
    for layer in proof.verdict.layers:
        if layer.more:
            print(f"layer {layer.layer.digest}: and {layer.more} more defects")
    word = "proven" if proof.verdict.proven else "NOT as it should be"
    print(f"{proof.image}: index {proof.verdict.index} ({proof.located.found_by}) is {word}")
