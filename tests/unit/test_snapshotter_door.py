# SPDX-License-Identifier: Apache-2.0
"""What clients see of errors, and how the log leaves for the bus."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from soci import errors
from soci.errors import BusUnavailable, SociError
from soci_bus import wire
from soci_bus.events import Event, SnapshotChanged
from soci_snapshotter import outbox
from soci_snapshotter.grpc_door import ERROR_TEXT, _text, status_of
from soci_snapshotter.outbox import publish_batch
from soci_snapshotter.store import SnapshotStore

STATUS = {
    "NOT_FOUND": {"NotFound", "NoIndex", "NoZtoc"},
    "ALREADY_EXISTS": {"AlreadyExists"},
    "INVALID_ARGUMENT": {
        "InvalidInput", "InvalidDigest", "InvalidReference", "InvalidManifest", "InvalidTar", "InvalidGzip",
        "InvalidZtoc", "InvalidConfig", "InvalidMessage",
    },
    "FAILED_PRECONDITION": {"FailedPrecondition"},
    "UNAVAILABLE": {"Unavailable", "RegistryUnavailable", "BusUnavailable"},
    "DEADLINE_EXCEEDED": {"DeadlineExceeded"},
    "UNIMPLEMENTED": {"Unsupported"},
    "UNKNOWN": {"SociError", "Mismatch", "Unauthorized", "LimitExceeded"},
}  # fmt: skip


@pytest.mark.parametrize("cls", errors.BY_CODE.values())
def test_status(cls: type[SociError]) -> None:
    """Each class of error has the status that containerd's clients branch on."""
    (expected,) = [name for name, classes in STATUS.items() if cls.__name__ in classes]
    assert status_of(cls("x")) == getattr(grpc.StatusCode, expected)
    assert status_of(ZeroDivisionError()) == grpc.StatusCode.UNKNOWN


def test_texts_fit_the_protocol() -> None:
    """A long text is cut between characters, an empty one says the class."""
    assert len(_text(SociError("é" * 5000)).encode()) == ERROR_TEXT
    assert len(_text(SociError("x" + "é" * 5000)).encode()) == ERROR_TEXT - 1
    assert _text(SociError()) == "SociError"


class Kept:
    """Takes events as the bus does; fails where it is told to."""

    node = "here"

    def __init__(self, fails: Callable[[int], None] = lambda _sequence: None) -> None:
        self.events: list[SnapshotChanged] = []
        self.fails = fails

    async def publish_now(self, event: Event, *, at_ns: int, message_id: str) -> None:
        assert isinstance(event, SnapshotChanged)
        assert f"-{event.sequence}-{at_ns}" in message_id
        self.fails(event.sequence)
        wire.encode(event)
        self.events.append(event)


async def test_the_log_is_published_in_order_and_once(tmp_path: Path) -> None:
    """What went out before the bus went away is not sent again; the rest follows in order."""
    with ThreadPoolExecutor(1) as thread, closing(SnapshotStore(tmp_path / "db")) as store:
        for number in range(10):
            store.prepare(f"k{number}", "", "active", {}, lambda _: None)

        def away(sequence: int) -> None:
            if sequence == 5:
                raise BusUnavailable("away")

        first, second = Kept(away), Kept()
        with pytest.raises(BusUnavailable):
            await publish_batch(store, first, thread)
        assert await publish_batch(store, second, thread) == 6
        assert [event.sequence for event in first.events + second.events] == list(range(1, 11))
        assert await publish_batch(store, second, thread) == 0


async def test_an_event_that_no_message_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out; those behind it go."""
    monkeypatch.setattr(wire, "MESSAGE_LIMIT", 300)
    with ThreadPoolExecutor(1) as thread, closing(SnapshotStore(tmp_path / "db")) as store:
        for key in ("a", "b" * 1000, "c"):
            store.prepare(key, "", "active", {}, lambda _: None)
        kept = Kept()
        assert await publish_batch(store, kept, thread) == 3
        assert [event.name for event in kept.events] == ["a", "c"]
        assert await publish_batch(store, kept, thread) == 0


async def test_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a batch is read and sent at a time."""
    monkeypatch.setattr(outbox, "BATCH", 2)
    with ThreadPoolExecutor(1) as thread, closing(SnapshotStore(tmp_path / "db")) as store:
        for key in "abc":
            store.prepare(key, "", "active", {}, lambda _: None)
        assert [await publish_batch(store, Kept(), thread) for _ in range(3)] == [2, 1, 0]
