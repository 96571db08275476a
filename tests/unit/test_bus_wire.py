# SPDX-License-Identifier: Apache-2.0
"""What sentences look like on the bus: bodies, subjects, headers, and hostile forms of all three."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soci import errors
from soci.errors import InvalidMessage
from soci.launch import TraceParent
from soci_bus import asks, events, wire
from support.bus import ASKS, D1, LAUNCH, MESSAGES, values

PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20)
    | st.just("sha256:../../etc")
    | st.just(D1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@quick
@given(data=st.data())
def test_a_message_comes_out_as_it_went_in(cls: type[Any], data: st.DataObject) -> None:
    """Every ask, answer and event decodes to an equal value of its own class."""
    value = data.draw(values(cls))
    decoded = wire.decode(wire.encode(value), cls)
    assert decoded == value
    assert type(decoded) is cls


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@quick
@given(data=st.data())
def test_fields_of_newer_writers_are_passed_over(cls: type[Any], data: st.DataObject) -> None:
    """A field that this version does not know changes nothing."""
    value = data.draw(values(cls))
    body = msgpack.packb(msgpack.unpackb(wire.encode(value)) | {"a field of tomorrow": [1, {"x": None}]})
    assert wire.decode(body, cls) == value


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_fields_of_older_writers_get_their_defaults(cls: type[Any]) -> None:
    """What has a default may be left out; what has none may not."""
    plain = msgpack.unpackb(wire.encode(_example(cls)))
    for field in dataclasses.fields(cls):
        less = {key: content for key, content in plain.items() if key != field.name}
        if field.default is dataclasses.MISSING:
            with pytest.raises(InvalidMessage):
                wire.decode(msgpack.packb(less), cls)
        else:
            assert getattr(wire.decode(msgpack.packb(less), cls), field.name) == field.default


def _example(cls: type[Any]) -> Any:
    found: list[Any] = []

    @settings(max_examples=1, database=None, deadline=None)
    @given(values(cls))
    def draw(value: Any) -> None:
        found.append(value)

    draw()
    return found[0]


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@quick
@given(body=st.binary(max_size=200))
def test_hostile_bytes_are_invalid_messages(cls: type[Any], body: bytes) -> None:
    """Bytes of any kind give a value or `InvalidMessage`, nothing else."""
    with suppress(InvalidMessage):
        wire.decode(body, cls)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@quick
@given(data=st.data())
def test_well_formed_nonsense_is_an_invalid_message(cls: type[Any], data: st.DataObject) -> None:
    """Right names with values of other types give `InvalidMessage`, or a value that encodes to itself again."""
    names = [field.name for field in dataclasses.fields(cls)]
    body = msgpack.packb({name: data.draw(PLAIN, label=name) for name in names})
    try:
        value = wire.decode(body, cls)
    except InvalidMessage:
        return
    assert wire.decode(wire.encode(value), cls) == value


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items, none of which is there
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,  # nested deeper than any stack
        b"\x81\x90\x00",  # a list as a key
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc7\x01\xff\x00",  # a timestamp of an impossible length
        b"\xc1",
        b"",
        b"\x80\x80",
        b"\x00" * (wire.MESSAGE_LIMIT + 1),
    ],
    ids=lambda body: f"{body[:6].hex()}x{len(body)}",
)
@pytest.mark.parametrize("cls", [asks.FindIndex, asks.Done, events.LaunchStarted], ids=lambda cls: cls.__name__)
def test_bombs_are_invalid_messages(cls: type[Any], body: bytes) -> None:
    """Bodies that promise more than they hold, or nest without end, are refused."""
    with pytest.raises(InvalidMessage):
        wire.decode(body, cls)


@pytest.mark.parametrize(
    "digest", ["sha256:../../../../etc", "sha256:" + "A" * 64, "md5:" + "1" * 32, "", 5, None, b"x"]
)
def test_what_is_no_digest_does_not_get_in(digest: Any) -> None:
    """Digests become paths: a text that is none is refused at the border, wherever it stands."""
    plain = msgpack.unpackb(wire.encode(asks.FetchLayer("a/b", D1)))
    with pytest.raises(InvalidMessage):
        wire.decode(msgpack.packb(plain | {"layer": digest}), asks.FetchLayer)
    body = {"index": D1, "found_by": "", "layers": [{"layer": digest, "ztoc": D1, "ztoc_size": 1}]}
    with pytest.raises(InvalidMessage):
        wire.decode(msgpack.packb(body), asks.IndexFound)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", "12"), ("size", 1.5), ("size", True), ("path", 5), ("path", b"/x"), ("path", None)],
)
def test_values_are_not_turned_into_other_types(field: str, value: Any) -> None:
    """A number is not taken for a text, nor a text for a number."""
    plain = {"path": "/x", "size": 1} | {field: value}
    with pytest.raises(InvalidMessage):
        wire.decode(msgpack.packb(plain), asks.LayerFetched)


@pytest.mark.parametrize("mounts", ["abc", {"a": 1}, [["a"]], 5, None])
def test_a_tuple_is_a_list_on_the_wire(mounts: Any) -> None:
    """Neither a text nor a map passes for a list of texts."""
    with pytest.raises(InvalidMessage):
        wire.decode(msgpack.packb({"mounts": mounts}), asks.CheckMounts)


@pytest.mark.parametrize(
    "ask",
    [
        asks.UnmountLayer("\udce4"),
        asks.UnmountLayer("x" * wire.MESSAGE_LIMIT),
        asks.FetchSpans("a", D1, D1, 1 << 64, 0),
    ],
    ids=["surrogate", "too large", "beyond 64 bits"],
)
def test_what_cannot_be_written_is_an_invalid_message(ask: Any) -> None:
    """`encode` never lets an exception of msgpack's out."""
    with pytest.raises(InvalidMessage):
        wire.encode(ask)


@given(st.text(max_size=300))
def test_a_token_is_one_token(text: str) -> None:
    """Whatever the text, it gives one subject token without wildcards, and a token stays as it is."""
    made = wire.token(text)
    assert 1 <= len(made) <= 100
    assert not set(made) & set(". *>\t\r\n\0")
    assert wire.token(made) == made


def test_subjects() -> None:
    """Asks, jobs and events go where the design says."""
    assert wire.ask_subject("node.one", "find-index") == "soci.ask.node_one.find-index"
    assert wire.job_subject("build-index", "a b") == "soci.job.build-index.a_b"
    assert wire.job_subject("build-index", "*") == "soci.job.build-index.*"
    event = events.IndexBegun("job.1", "image")
    assert wire.event_subject("n", event) == "soci.evt.n.index.job_1.begun"
    assert wire.event_filter(id="a.>") == "soci.evt.*.*.a__.*".replace("__", "_")
    assert wire.event_filter("launch", happened="started") == "soci.evt.*.launch.*.started"


@pytest.mark.parametrize("cls", events.ALL, ids=lambda cls: f"{cls.noun}.{cls.happened}")
def test_events_are_known_by_their_subject(cls: type[events.Event]) -> None:
    """An event's subject leads back to its class, with node and time."""
    event = _example(cls)
    envelope = wire.decode_event(wire.event_subject("n1", event), {wire.TIME_HEADER: "17"}, wire.encode(event), 9)
    assert envelope == wire.Envelope(event, "n1", 17, 9)


def test_events_of_newer_writers_are_passed_over() -> None:
    """A name that this version does not know is no error."""
    assert wire.decode_event("soci.evt.n.launch.x.teleported", {}, b"\xff") is None


@pytest.mark.parametrize("time", ["x", "-1", str(1 << 63), "9" * 5000, "1e3", ""])
def test_an_event_at_no_time_is_invalid(time: str) -> None:
    """The time header is a number of nanoseconds of this epoch."""
    event = events.IndexBegun("1", "image")
    with pytest.raises(InvalidMessage):
        wire.decode_event(wire.event_subject("n", event), {wire.TIME_HEADER: time}, wire.encode(event))


@pytest.mark.parametrize("subject", ["", "soci.evt", "soci.ask.n.launch.x.started", "soci.evt.n.launch.x.y.started"])
def test_other_subjects_are_no_events(subject: str) -> None:
    """Only six tokens that begin as ours do."""
    with pytest.raises(InvalidMessage):
        wire.decode_event(subject, None, b"\x80")


def test_an_ask_s_headers_come_back() -> None:
    """Trace and remaining time cross."""
    trace = TraceParent(LAUNCH, "1" * 16, sampled=False)
    assert wire.read_ask_headers(wire.ask_headers(trace, 2.5), 300.0) == (trace, 2.5)
    assert wire.read_ask_headers(wire.ask_headers(None, 2.5), 300.0) == (None, 2.5)


@pytest.mark.parametrize(
    ("deadline", "seconds"),
    [(None, 300.0), ("x", 300.0), ("nan", 300.0), ("inf", 300.0), ("1e999", 300.0), ("-inf", 0.001), ("0", 0.001)],
)
def test_odd_deadlines(deadline: str | None, seconds: float) -> None:
    """An absent or odd deadline is the longest; one that has passed is the shortest."""
    headers = {} if deadline is None else {wire.DEADLINE_HEADER: deadline}
    assert wire.read_ask_headers(headers, 300.0) == (None, seconds)


@pytest.mark.parametrize("cls", errors.BY_CODE.values(), ids=lambda cls: cls.__name__)
def test_errors_cross_as_the_same_class(cls: type[errors.SociError]) -> None:
    """The other side raises what was raised here, with its text."""
    headers, body = wire.write_error(cls("the disk of größe is full"))
    with pytest.raises(errors.SociError) as caught:
        wire.read_answer(headers, body, ASKS[0])  # type: ignore[arg-type]
    assert type(caught.value) is cls
    assert str(caught.value) == "the disk of größe is full"


def test_an_unknown_error_is_the_root() -> None:
    """A code of tomorrow, however long, is a plain `SociError` with its text."""
    with pytest.raises(errors.SociError, match="why") as caught:
        wire.read_answer({wire.ERROR_HEADER: "x" * 10_000}, b"why\xff", ASKS[0])  # type: ignore[arg-type]
    assert type(caught.value) is errors.SociError
    assert len(str(caught.value)) < 200


def test_an_error_s_text_is_cut() -> None:
    """An error's text cannot be larger than a message, and odd characters in it do no harm."""
    _, body = wire.write_error(errors.NotFound("\udce4" + "ä" * 100_000))
    assert len(body) == wire.ERROR_LIMIT


def test_verbs_and_names_are_unique() -> None:
    """No two asks share a verb, no two events a name."""
    assert len({cls.verb for cls in ASKS}) == len(ASKS)
    named = [cls for cls in vars(events).values() if isinstance(cls, type) and issubclass(cls, events.Event)]
    assert len(events.BY_NAME) == len(events.ALL) == len(named) - 1
