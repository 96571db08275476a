# SPDX-License-Identifier: Apache-2.0
"""Groups of verbs that are imported when they are used, some of them under two names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose verbs live in modules of their own.

    ``verbs``: verb → (``module:attribute``, its line in the help); without attribute it is ``command``. ``aliases``:
    other spelling → verb.
    """

    def __init__(
        self,
        *arguments: Any,
        verbs: Mapping[str, tuple[str, str]],
        aliases: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.verbs = verbs
        self.aliases = aliases or {}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs in their order."""
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the verb's module."""
        found = self.verbs.get(self.aliases.get(cmd_name, cmd_name))
        if found is None:
            return None
        module, _, attribute = found[0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute or "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The verbs' lines, without importing them."""
        spelled = {verb: [verb, *(alias for alias, of in self.aliases.items() if of == verb)] for verb in self.verbs}
        with formatter.section("Commands"):
            formatter.write_dl([(", ".join(spelled[verb]), line) for verb, (_, line) in self.verbs.items()])


class AliasedGroup(click.Group):
    """A group whose verbs have other spellings too: ``aliases`` is spelling → verb."""

    def __init__(self, *arguments: Any, aliases: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.aliases = aliases

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of either spelling."""
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))
