# SPDX-License-Identifier: Apache-2.0
"""``soci index``: its verbs."""

from __future__ import annotations

from typing import Final

import click

from soci_cli.groups import LazyGroup

VERBS: Final = {
    "build": ("soci_cli.index_build", "Ask the indexer for the index of an image in a registry."),
    "list": ("soci_cli.index_local:list_command", "List the indexes made here."),
    "info": ("soci_cli.index_local:info_command", "Show an index."),
    "verify": ("soci_cli.verify", "Prove an image's index against its layers in the registry."),
    "remove": ("soci_cli.index_local:remove_command", "Remove indexes."),
}


@click.group("index", cls=LazyGroup, verbs=VERBS, aliases={"ls": "list", "rm": "remove"})
def command() -> None:
    """Build, list, show and remove SOCI indexes."""
