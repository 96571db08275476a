# SPDX-License-Identifier: Apache-2.0
"""What every service has from the runtime: log lines, steps without an endpoint, which error is told and how."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator

import nats.errors
import pytest
import structlog

from soci.errors import BusUnavailable, Mismatch, SociError
from soci.launch import LaunchId, TraceParent
from soci_bus.events import NO_LAUNCH
from soci_runtime.config import Config
from soci_runtime.logs import configure_logs, log
from soci_runtime.serve import Process, _plain, notify, serve, trouble
from soci_runtime.tracing import configure_tracing, step, stop_tracing

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No test leaves its logging to the next."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """No traces are sent."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)


def lines(captured: Captured) -> list[dict[str, object]]:
    return [json.loads(line) for line in captured.readouterr().out.splitlines()]


def test_a_line(capsys: Captured) -> None:
    """One JSON object with level, message, time in UTC to the nanosecond, service and facts, in this order."""
    configure_logs("info", "fetcher")
    log.info("ready", node="n1", count=3)
    (line,) = lines(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", str(line.pop("time")))
    assert line == {"level": "info", "msg": "ready", "service": "fetcher", "node": "n1", "count": 3}
    assert list(line)[:2] == ["level", "msg"]


def test_lines_below_the_level_are_not_written(capsys: Captured) -> None:
    """And those at it are."""
    configure_logs("warning", "x")
    log.debug("no")
    log.info("no")
    log.warning("yes")
    log.error("yes")
    assert [line["level"] for line in lines(capsys)] == ["warning", "error"]


def test_an_error_is_its_text_and_class(capsys: Captured) -> None:
    """An exception as a fact is told by its text, by its class where it has none, and always on one line."""
    configure_logs("info", "x")
    log.info("a", error=Mismatch("two\nlines"))
    log.info("b", error=KeyError())
    log.info("c", error="text")
    first, second, third = lines(capsys)
    assert (first["error"], first["error_type"]) == ("two\nlines", "Mismatch")
    assert (second["error"], second["error_type"]) == ("KeyError", "KeyError")
    assert (third["error"], third.get("error_type")) == ("text", None)


@pytest.mark.parametrize("fact", ["\udce4", "日本", "\x1b[31m", b"\xff", object, {"a": {1, 2}}, float("nan"), "\u2028"])
def test_no_fact_breaks_a_line(capsys: Captured, fact: object) -> None:
    """Whatever a fact is, it is one line of ASCII."""
    configure_logs("info", "x")
    log.info("a", fact=fact)
    text = capsys.readouterr().out
    assert text.isascii()
    assert text.count("\n") == 1
    assert json.loads(text)["msg"] == "a"


def test_facts_do_not_hide_the_message(capsys: Captured) -> None:
    """A fact named as one of the line's own keys does not take its place."""
    configure_logs("info", "x")
    log.info("the message", msg="other", time="never")
    (line,) = lines(capsys)
    assert line["msg"] == "the message"
    assert line["time"] != "never"


def test_trouble_has_a_traceback_only_for_defects(capsys: Captured) -> None:
    """What the other side refuses is its text; a defect of ours says where."""
    configure_logs("info", "x")
    for error in (None, BusUnavailable("away"), ConnectionRefusedError(), nats.errors.NoServersError()):
        trouble("what", error)
    trouble("what", ZeroDivisionError("defect"))
    assert ["exception" in line for line in lines(capsys)] == [False] * 4 + [True]


# --- steps without an endpoint


def test_steps_without_an_endpoint_pass_ids_on() -> None:
    """The parent is passed through; without one a trace begins, with the launch's id where there is one."""
    configure_tracing("x", "n")
    parent = TraceParent(LaunchId("ab" * 16), "1" * 16)
    with step("a", parent, fact=1) as place:
        assert place is parent
    with step("a", None, launch=LaunchId("cd" * 16)) as place:
        assert place.launch == "cd" * 16
    with step("a", None) as one, step("a", None) as two:
        assert one.launch != two.launch
    with pytest.raises(ZeroDivisionError), step("a", None):
        raise ZeroDivisionError
    stop_tracing()


@pytest.mark.parametrize("disabled", ["true", "TRUE"])
def test_tracing_that_was_disabled_gives_ids(monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    """With the SDK turned off by its own variable, steps have ids all the same."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", disabled)
    configure_tracing("x", "n")
    with step("a", None) as place:
        assert int(place.launch, 16)
    stop_tracing()


def test_a_step_of_no_launch_begins_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id of "no launch" is no valid trace id and is never used as one."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")  # nothing is sent
    configure_tracing("x", "n")
    try:
        with step("a", None, launch=LaunchId(NO_LAUNCH)) as place:
            assert int(place.launch, 16)
        with step("a", None, launch=LaunchId("ab" * 16)) as place:
            assert place.launch == "ab" * 16
            assert not place.sampled
    finally:
        stop_tracing()


# --- which error is told


ONE = BusUnavailable("NATS is away")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ONE, ONE),
        (ExceptionGroup("", [ONE]), ONE),
        (BaseExceptionGroup("", [ExceptionGroup("", [ExceptionGroup("", [ONE])])]), ONE),
        (ExceptionGroup("", [BusUnavailable("NATS is away"), BusUnavailable("NATS is away")]), BusUnavailable("NATS is away")),
        (ExceptionGroup("", [ONE, Mismatch("other")]), None),
        (ExceptionGroup("", [ONE, ZeroDivisionError()]), None),
        (ZeroDivisionError(), None),
        (OSError(98, "Address already in use"), OSError(98, "Address already in use")),
    ],
)  # fmt: skip
def test_the_one_error_that_says_it_all(error: BaseException, told: SociError | None) -> None:
    """Groups around one error are taken off; several different ones are a defect to look at."""
    found = _plain(error)
    assert (type(found), str(found)) == (type(told), str(told))


@pytest.mark.parametrize(
    ("error", "words", "traceback"),
    [
        (ONE, "NATS is away", False),
        (ExceptionGroup("group", [ONE]), "NATS is away", False),
        (OSError("no socket"), "no socket", False),
        (ZeroDivisionError("defect"), "defect", True),
        (ExceptionGroup("group", [ONE, ZeroDivisionError()]), "group", True),
    ],
)
def test_an_error_ends_the_service_with_one_line(
    capsys: Captured, error: Exception, words: str, *, traceback: bool
) -> None:
    """The status is 1, and the log has one line with the text."""

    async def service(_config: Config, _process: Process) -> None:
        raise error

    assert serve("x", Config(node="n"), service) == 1
    (line,) = lines(capsys)
    assert words in str(line["error"])
    assert line["level"] == "error"
    assert ("exception" in line) is traceback


def test_a_service_that_returns_is_a_success(capsys: Captured) -> None:
    """The status is 0, and it is stopped only once, however many signals come."""

    async def service(_config: Config, process: Process) -> None:
        process.ready(a=1)
        process.stop(signal.SIGTERM)
        process.stop(signal.SIGINT)
        await process.stopping.wait()
        assert process.signal == signal.SIGTERM

    assert serve("x", Config(node="n"), service) == 0
    assert [line["msg"] for line in lines(capsys)] == ["ready", "stopping"]


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@nobody-listens-here", "/" + "x" * 200])
def test_a_socket_that_is_not_there_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, address: str
) -> None:
    """Without systemd, or with one that does not listen, the service goes on."""
    configure_logs("info", "x")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")
    assert len(lines(capsys)) == (1 if address[:1] in {"/", "@"} else 0)
