# SPDX-License-Identifier: Apache-2.0
"""How each service runs: flags, log, traces, event loop, signals and readiness, the same for all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from soci.errors import SociError
from soci_runtime.config import Config, Loaded, load
from soci_runtime.config_text import default_text, dump_text
from soci_runtime.kinds import LEVEL_NAMES, LEVELS
from soci_runtime.logs import configure_logs, log
from soci_runtime.tracing import configure_tracing, stop_tracing

NOTIFY_TIMEOUT = 1.0
"""Seconds that systemd's socket may hold us up."""
WATCHDOG_LEAST = 0.1
"""Seconds between signs of life, however often systemd wants them."""


class Process:
    """This process as its service sees it: it says that it is ready, and waits until it is to stop."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.signal: signal.Signals | None = None  # the one that asked us to stop

    def ready(self, **facts: Any) -> None:
        """Tell log and systemd (sd_notify(3)) that the service serves."""
        log.info("ready", **facts)
        notify("READY=1")

    def stop(self, number: signal.Signals) -> None:
        """Ask the service to end; a second signal changes nothing."""
        if not self.stopping.is_set():
            self.signal = number
            log.info("stopping", signal=number.name)
            notify("STOPPING=1")
            self.stopping.set()


Service = Callable[[Config, Process], Awaitable[None]]


def notify(state: str) -> None:
    """Send ``state`` to systemd's socket, where there is one; an abstract name begins with ``@``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(NOTIFY_TIMEOUT)
        try:
            channel.connect("\0" + address[1:] if address[0] == "@" else address)
            channel.sendall(state.encode())
        except OSError as error:
            log.warning("systemd was not told", state=state, error=error)


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Seconds between signs of life for systemd (sd_watchdog_enabled(3)): half of what it waits. None: it does not."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid) or not microseconds.isascii():
        return None
    if not microseconds.isdecimal() or not int(microseconds[:19]):
        return None
    return max(int(microseconds[:19]) / 2_000_000, WATCHDOG_LEAST)


@asynccontextmanager
async def _watched() -> AsyncIterator[None]:
    """Tell systemd's watchdog that this event loop turns while the block runs."""
    interval = watchdog_interval(os.environ, os.getpid())
    if interval is None:
        yield
        return

    async def live() -> None:
        while True:
            notify("WATCHDOG=1")
            await asyncio.sleep(interval)

    living = asyncio.create_task(live())
    try:
        yield
    finally:
        living.cancel()
        await asyncio.wait([living])


async def _run(config: Config, service: Service) -> None:
    process = Process()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, process.stop, number)
    async with _watched():
        await service(config, process)


def trouble(what: str, error: BaseException | None) -> None:
    """The ``trouble`` seam of `soci_bus`, as log lines; with a traceback where the error is a defect of ours."""
    foreign = isinstance(error, (SociError, OSError)) or type(error).__module__.partition(".")[0] == "nats"
    log.warning(what, error=error, **({} if error is None or foreign else {"exc_info": error}))


def serve(name: str, loaded: Loaded | Config, service: Service) -> int:
    """Run ``service`` until it returns; the exit status is 0, or 1 after an error, which is one line in the log.

    What we or the machine refuse is told by its text alone, a defect with its traceback in the same line.
    """
    loaded = Loaded(loaded) if isinstance(loaded, Config) else loaded
    config = loaded.config
    configure_logs(config.log_level, name)
    try:
        _tell(loaded)
        configure_tracing(name, config.node)
        with asyncio.Runner(loop_factory=_loop) as runner:
            runner.run(_run(config, service))
    except Exception as error:  # noqa: BLE001  the border of the process
        plain = _plain(error)
        if plain is None:
            log.error("failed", error=error, exc_info=error)
        else:
            log.error("cannot go on", error=plain)
        return 1
    finally:
        stop_tracing()
    return 0


def _tell(loaded: Loaded) -> None:
    """What is to be said of the configuration file, once."""
    if loaded.unknown:
        log.warning("the configuration has keys that nobody knows", file=loaded.file, keys=list(loaded.unknown))
    for key, why in loaded.without_effect:
        log.info("a setting has no effect here", file=loaded.file, key=key, why=why)


def _plain(error: BaseException) -> SociError | OSError | None:
    """The one error that says it all: ``error``, or what task groups wrapped it in; None where there is no such one.

    One failure often ends several tasks that waited for the same thing: the same text counts once.
    """
    if isinstance(error, BaseExceptionGroup):
        inside = {str(one): one for one in map(_plain, error.exceptions)}
        return next(iter(inside.values())) if len(inside) == 1 else None
    return error if isinstance(error, (SociError, OSError)) else None


def _loop() -> asyncio.AbstractEventLoop:
    import uvloop  # noqa: PLC0415  not for those who only read the configuration

    return uvloop.new_event_loop()


def service_command(name: str, service: Service, *, address: bool = False) -> click.Group:
    """The command line of a service: the flags that all have, and what they set."""

    @click.group(name, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
    @click.option("--config", "file", type=click.Path(path_type=Path), help="configuration file (TOML)")
    @click.option("--strict", is_flag=True, help="refuse a configuration file with unknown keys")
    @click.option("--root", type=click.Path(path_type=Path), help="folder of all state")
    @click.option("--nats-url", help="NATS server, e.g. nats://127.0.0.1:4222")
    @click.option("--node", help="this node's name on the bus; default: the host's name")
    @click.option("--log-level", type=click.Choice([*LEVELS, *LEVEL_NAMES]))
    @click.version_option(package_name="sociable", message=f"{name} %(version)s")
    @click.pass_context
    def command(context: click.Context, /, file: Path | None, *, strict: bool, **flags: Any) -> None:
        try:
            loaded = load(file, flags, strict=strict)
        except SociError as error:
            click.echo(f"{name}: {error}", err=True)
            sys.exit(1)
        if context.invoked_subcommand is None:
            sys.exit(serve(name, loaded, service))
        context.obj = loaded

    if address:
        command.params.append(click.Option(["--address"], help="socket on which containerd finds us; fd://: systemd's"))
    command.add_command(_config_command())
    return command


def _config_command() -> click.Group:
    @click.group("config")
    def group() -> None:
        """Print the configuration file."""

    @group.command("default")
    def default() -> None:
        """Every setting with its default and its meaning."""
        click.echo(default_text(), nl=False)

    @group.command("dump")
    @click.pass_obj
    def dump(loaded: Loaded) -> None:
        """What holds now, and who set it: default, file and key, variable or flag."""
        click.echo(dump_text(loaded), nl=False)

    return group
