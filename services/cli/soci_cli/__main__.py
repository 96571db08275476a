# SPDX-License-Identifier: Apache-2.0
"""``soci``: global flags, the verbs, and what the shell gets to see of errors.

Verbs are imported when they are used, so that ``soci --version`` and ``soci --help`` answer at once.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from soci.errors import SociError
from soci_cli.border import INTERRUPTED, say_error
from soci_cli.groups import LazyGroup
from soci_cli.values import (
    COMPATIBLE_VERSION,
    CONTENT_STORES,
    DEFAULT_ADDRESS,
    DEFAULT_NAMESPACE,
    DEFAULT_NATS,
    DEFAULT_ROOT,
    VERSION,
    Globals,
    parse_duration,
)

VERBS: Final = {
    "pull": ("soci_cli.pull", "Pull an image lazily."),
    "run": ("soci_cli.run", "Run a command in a container from an image."),
    "create": ("soci_cli.create", "Make the SOCI index of an image in containerd."),
    "convert": ("soci_cli.convert", "Make an image that carries its own SOCI index."),
    "push": ("soci_cli.push", "Push an image's SOCI index to its registry."),
    "index": ("soci_cli.index", "Build, list, show and remove SOCI indexes."),
    "ztoc": ("soci_cli.ztoc", "List and show zTOCs, and read files by them."),
    "prefetch": ("soci_cli.prefetch", "List and show prefetch lists."),
    "rebuild-db": ("soci_cli.rebuild", "Build the artifacts database anew from the content store."),
    "launch": ("soci_cli.launch", "See how images were launched."),
    "layers": ("soci_cli.layers", "See the layers that are mounted, and how."),
    "cache": ("soci_cli.cache", "See, check and free the node's span cache."),
    "snapshots": ("soci_cli.snapshots", "See the node's snapshots; rebuild their table from the log."),
}
"""Verb → the module whose ``command`` it is, and its line in the help."""


def _duration(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    return parse_duration(value)


def _print_version(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
    if value and not context.resilient_parsing:
        print(f"soci version {COMPATIBLE_VERSION} (sociable {VERSION})")
        context.exit()


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    aliases={"rebuild_db": "rebuild-db"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--address",
    "-a",
    envvar="CONTAINERD_ADDRESS",
    default=DEFAULT_ADDRESS,
    show_default=True,
    help="containerd's socket.",
)
@click.option(
    "--namespace",
    "-n",
    envvar="CONTAINERD_NAMESPACE",
    default=DEFAULT_NAMESPACE,
    show_default=True,
    help="containerd's namespace.",
)
@click.option(
    "--timeout", default="0", callback=_duration, help="End the command after this time (30, 1m30s); 0 is never."
)
@click.option(
    "--content-store",
    type=click.Choice(CONTENT_STORES),
    default="containerd",
    show_default=True,
    help="Where indexes and zTOCs are kept: in containerd, or below --root.",
)
@click.option("--root", default=DEFAULT_ROOT, show_default=True, help="The folder of the artifacts database.")
@click.option("--nats-url", envvar="NATS_URL", default=DEFAULT_NATS, show_default=True, help="The bus.")
@click.option("--node", default="", help="The node whose services are asked; default: this host's name.")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
@click.option(
    "--version",
    "-v",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.pass_context
def cli(  # noqa: PLR0913  one parameter a flag
    context: click.Context,
    *,
    address: str,
    namespace: str,
    timeout: float,
    content_store: str,
    root: str,
    nats_url: str,
    node: str,
    debug: bool,
) -> None:
    """Start containers before their images arrive."""
    context.obj = Globals(
        address, namespace, timeout, debug, nats_url, node or socket.gethostname(), content_store, Path(root)
    )


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the answer is the exit code: 1 for errors, 2 for misuse, else what the verb says."""
    debug = "--debug" in arguments
    try:
        result = cli.main(args=list(arguments), prog_name="soci", standalone_mode=False)
    except click.ClickException as error:
        print(f"soci: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except SociError as error:
        return say_error(error, debug=debug)
    except BrokenPipeError:
        # Nobody reads us any more; keep the interpreter from failing again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
