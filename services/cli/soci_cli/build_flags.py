# SPDX-License-Identifier: Apache-2.0
"""Flags that several verbs share: platforms, and what an index is to be like."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import click

from soci.build import DEFAULT_SPAN_SIZE
from soci.errors import InvalidConfig
from soci.oci import Platform, parse_platform
from soci_indexing.build import DEFAULT_MIN_LAYER_SIZE, MAX_SIZE, IndexWish

F = TypeVar("F", bound=Callable[..., Any])

MAX_NAMES_BYTES: Final = 4 << 20
"""Bytes of a ``--prefetch-files-json`` file."""


class PlatformCommand(click.Command):
    """A verb with `platform_flags` that takes ``--all-platforms true``, as nerdctl says it, for one flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As the base class."""
        pairs = zip(["", *args], args, strict=False)
        return super().parse_args(ctx, [word for before, word in pairs if (before, word) != _SAID_IN_FULL])


_SAID_IN_FULL: Final = ("--all-platforms", "true")


def platform_flags(function: F) -> F:
    """``--platform`` (as ``platforms``, repeatable) and ``--all-platforms``."""
    function = click.option("--all-platforms", is_flag=True, help="Every platform that the image has.")(function)
    return click.option(
        "--platform",
        "-p",
        "platforms",
        multiple=True,
        help="os/architecture[/variant]; several with commas, or the flag again.",
    )(function)


def index_flags(function: F) -> F:
    """``--span-size``, ``--min-layer-size``, ``--optimizations``, ``--force``, ``--prefetch-file…``."""
    size = click.IntRange(0, MAX_SIZE)
    for option in (
        click.option("--prefetch-files-json", type=click.Path(), help="A file with a JSON list of names of files."),
        click.option(
            "--prefetch-file", "prefetch_files", multiple=True, help="A file of the image that is needed first."
        ),
        click.option("--force", "-f", is_flag=True, help="Build zTOCs that are here already, too."),
        click.option("--optimizations", multiple=True, help="xattr: note which layers have no extended attributes."),
        click.option(
            "--min-layer-size",
            type=size,
            default=DEFAULT_MIN_LAYER_SIZE,
            show_default=True,
            help="Smaller layers (in bytes) get no zTOC.",
        ),
        click.option(
            "--span-size",
            type=size,
            default=DEFAULT_SPAN_SIZE,
            show_default=True,
            help="Bytes of a span, uncompressed.",
        ),
    ):
        function = option(function)
    return function


def parse_platforms(texts: Sequence[str]) -> tuple[Platform, ...]:
    """Platforms without repetitions, in the order given; a text may name several with commas between them."""
    return tuple(dict.fromkeys(parse_platform(name) for text in texts for name in text.split(",")))


def wish_of(  # noqa: PLR0913  one parameter a flag
    *,
    span_size: int,
    min_layer_size: int,
    optimizations: Sequence[str],
    force: bool,
    prefetch_files: Sequence[str],
    prefetch_files_json: str | None,
    version: Literal[1, 2],
) -> IndexWish:
    """What `index_flags` mean. Raises `InvalidInput`, `InvalidConfig`."""
    names = [*prefetch_files, *(read_names(Path(prefetch_files_json)) if prefetch_files_json else ())]
    kept = tuple(name.strip() for name in names if name.strip())
    return IndexWish(
        span_size=span_size,
        min_layer_size=min_layer_size,
        optimizations=frozenset(optimizations),
        force=force,
        prefetch_files=kept,
        version=version,
    )


def read_names(path: Path) -> list[str]:
    """The JSON list of strings in a file; `InvalidConfig` for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_NAMES_BYTES + 1)
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_NAMES_BYTES:
        raise InvalidConfig(f"{path} has more than {MAX_NAMES_BYTES} bytes")
    try:
        names = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidConfig(f"{path} is not a JSON list of strings")
    return names
