# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of ``./dev``; each prints what it does and exits non-zero when something is wrong."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click

from soci.errors import SociError
from soci_dev import checks


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.pass_context
def dev(context: click.Context) -> None:
    """Work on Sociable: see it run, test it, check it. Set-up happens by itself."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@dev.command("help")
@click.pass_context
def show_help(context: click.Context) -> None:
    """Print this."""
    click.echo(context.parent.get_help() if context.parent else "")


@dev.command()
@click.option("--keep", is_flag=True, help="Leave everything running at the end, until Ctrl-C.")
@click.option("--mbit", default=0.0, help="Throttle the registry to this many Mbit/s.")
@click.option("--rtt-ms", default=0.0, help="Delay each answer of the registry.")
def demo(*, keep: bool, mbit: float, rtt_ms: float) -> None:
    """Launch a real image twice, by a full pull and lazily, and compare."""
    from soci_dev.demo import run_demo  # noqa: PLC0415  (rich and httpx are not for every command)

    sys.exit(run_demo(keep=keep, rtt_ms=rtt_ms, mbit=mbit))


@dev.command()
@click.option("--fetchers", default=2, show_default=True, help="How many fetchers work side by side.")
@click.option("--cri", is_flag=True, help="Turn containerd's CRI plugin on.")
def up(*, fetchers: int, cri: bool) -> None:
    """Start a private set of everything, print how to use it, end it with Ctrl-C."""
    from soci_dev.up import run_up  # noqa: PLC0415

    run_up(fetchers=fetchers, cri=cri)


@dev.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def test(words: tuple[str, ...]) -> None:
    """Run pytest; words are passed on to it."""
    sys.exit(checks.run_tests(words))


@dev.command()
@click.argument("parser", required=False)
@click.option("--runs", type=click.IntRange(1), help="Inputs a parser; without it as many as the tests do.")
@click.option("--seed", default=0, show_default=True, help="Other seeds give other inputs.")
def fuzz(*, parser: str | None, runs: int | None, seed: int) -> None:
    """Feed broken inputs to PARSER, or to every parser of foreign bytes; what breaks one is kept in fuzz-failures/."""
    sys.exit(checks.run_fuzz(parser, runs, seed))


@dev.command()
def lint() -> None:
    """Check style, format, types, package borders and generated code."""
    sys.exit(checks.run_lint())


@dev.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if the page is not what the settings say.")
def docs(*, check: bool) -> None:
    """Write the tables of docs/configuration.md from the settings."""
    from soci_dev.docs import run  # noqa: PLC0415

    sys.exit(run(check=check))


@dev.command("compose-proof")
def compose_proof() -> None:
    """Bring compose.yaml up in a private Docker engine and launch an image lazily through it.

    Status 77 and a sentence where no engine can be started.
    """
    from soci_dev.compose import run_proof  # noqa: PLC0415

    sys.exit(run_proof())


@dev.command()
def lock() -> None:
    """Say how to renew the lock files."""
    click.echo(checks.HOW_TO_LOCK)


def main() -> None:
    """Run a sub-command; our own errors end as one line, SIGTERM as an orderly end."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control starts us deaf to it
    try:
        dev.main(prog_name="./dev", standalone_mode=False)
    except SociError as error:
        click.echo(f"dev: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("dev: stopped", err=True)
        sys.exit(130)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
